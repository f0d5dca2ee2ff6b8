"""The command. `scripts/peers.sh` makes both environments and runs it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.peers import bounded, oneshot
from benchmarks.peers.export import export_model, load_exported, write_reference
from benchmarks.peers.generate import make_retrievals, make_windows
from benchmarks.peers.plan import FACTS, KVPRESS_STORE, ONCE, OURS_STORE, Plan
from benchmarks.peers.table import build_report, print_report
from depthkv_edge import __version__
from depthkv_edge.checks import default_threads
from depthkv_edge.engine.model import Model, load_model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.facts import engine_facts, machine_facts, model_facts
from depthkv_edge.modelfile.f32 import write_f32
from depthkv_edge.modelfile.keys import Calibration, read_calibration
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.quality.rows import FULL, Row, kv_bytes
from depthkv_edge.quality.store import Store, digest
from depthkv_edge.quality.texts import read_texts

PRESSES = ("SnapKV", "ExpectedAttention", "KeyDiff", "StreamingLLM", "PyramidKV")

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build" / "peers"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_MAX_KEYS = 24
_PROMPT_SHARE = 0.75  # of a window; the rest is predicted


@click.command()
@click.argument("model")
@click.option("--window-tokens", type=int, default=4096, show_default=True, help="Prompt and what is predicted.")
@click.option("--texts", default="scripture,documentation", show_default=True, help="Names, or text files.")
@click.option("--windows", type=int, default=1, show_default=True, help="Of each text.")
@click.option("--ratios", default="0.2,0.4,0.6", show_default=True, help="Shares of the prompt that are kept.")
@click.option("--presses", default=",".join(PRESSES), show_default=True, help="Of kvpress.")
@click.option("--contexts", type=int, default=2, show_default=True, help="That hide a pass key and named keys.")
@click.option("--keys", type=int, default=12, show_default=True, help="Named ones in each context.")
@click.option("--threads", type=int, help="CPU threads. Default: the physical cores.")
@click.option("--python", "peers_python", default=str(_ROOT / ".venv-peers/bin/python"), help="That has kvpress.")
@click.option("--restart", is_flag=True, help="Measure again what an earlier run has measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def main(
    model: str,
    window_tokens: int,
    texts: str,
    windows: int,
    ratios: str,
    presses: str,
    contexts: int,
    keys: int,
    threads: int | None,
    peers_python: str,
    restart: bool,
    as_json: bool,
) -> None:
    """Compare kvpress's presses with ours on a calibrated GGUF. An interrupted run goes on where it was."""
    try:
        settings = {
            "prompt_tokens": round(_PROMPT_SHARE * window_tokens),
            "tail_tokens": window_tokens - round(_PROMPT_SHARE * window_tokens),
            "texts": _split(texts),
            "windows": windows,
            "ratios": _numbers(ratios),
            "presses": _split(presses),
            "contexts": contexts,
            "keys": keys,
            "threads": threads or default_threads(),
        }
        check_settings(settings, window_tokens)
        path = resolve_model(model)
        calibration = _read_calibration(path)
        report = _compare(path, calibration, settings, peers_python, restart)
    except DepthKVError as error:
        raise SystemExit(_complain(error)) from None
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        print_report(report)


def _compare(
    path: Path, calibration: Calibration, settings: dict[str, Any], peers_python: str, restart: bool
) -> dict[str, Any]:
    stat = path.stat()
    engine = engine_facts()
    facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, engine["library_sha256"], _REQUIREMENTS.read_text()]
    directory = _BUILD / f"{path.stem}-{digest(facts)[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    if restart:
        for name in (OURS_STORE, KVPRESS_STORE):
            (directory / name).unlink(missing_ok=True)
    _say("preparing: the model in full precision, tokens")
    f32 = directory / "f32.gguf"
    write_f32(path, f32)
    export_model(path, directory / "hf")
    with load_model(f32, settings["threads"]) as model:
        plan = _plan(model, calibration, directory, settings)
    plan_path = directory / f"plan-{digest(settings)[:8]}.json"
    plan.write(plan_path)

    store = Store(directory / OURS_STORE)
    reference = Path(plan.reference)
    needs_torch = bool(plan.missing(store, ONCE, oneshot.METHODS)) or not reference.exists()
    torch.set_num_threads(settings["threads"])
    target = load_exported(directory / "hf") if needs_torch else None
    if target is not None:
        write_reference(target, plan.probe, reference)
    _say("kvpress, in its own environment")
    _run_kvpress(peers_python, plan_path)
    if target is not None:
        _say("ours: one eviction after the prompt, in torch")
        oneshot.measure(target, calibration, plan, store)
        del target
    _say("ours: bounded, in the engine")
    with load_model(f32, settings["threads"]) as model:
        bounded.measure(model, f32, plan, store)

    theirs = Store(directory / KVPRESS_STORE)
    report = build_report(plan, lambda key: (theirs if key in theirs else store)[key])
    report["checks"] = {"logits of both environments": theirs[FACTS]["logit_difference"]} | report["checks"]
    return {
        "command": shlex.join(["scripts/peers.sh", *sys.argv[1:]]),
        "version": __version__,
        "versions": theirs[FACTS]["versions"],
        "engine": engine,
        "machine": machine_facts(settings["threads"]),
        "model": model_facts(path) | {"reference": "f32"},
        "settings": settings,
    } | report


def _plan(model: Model, calibration: Calibration, directory: Path, settings: dict[str, Any]) -> Plan:
    chosen = read_texts(settings["texts"])
    n_prompt = settings["prompt_tokens"]
    n_tokens = n_prompt + settings["tail_tokens"]
    windows = make_windows(model, chosen, n_tokens, n_prompt, settings["windows"])
    retrievals = make_retrievals(model, chosen, n_tokens, settings["contexts"], settings["keys"])
    for ratio in settings["ratios"]:
        oneshot.allocate(calibration, "uniform", ratio, n_prompt)  # one below the floor is refused now, not in an hour
    n_layers = len(calibration.layer_ids)
    first = (windows or retrievals)[0]
    return Plan(
        model=str(directory / "hf"),
        reference=str(directory / f"reference-{first.key}.npz"),
        records=str(directory),
        presses=settings["presses"],
        ratios=settings["ratios"],
        windows=windows,
        retrievals=retrievals,
        cell_bytes=kv_bytes(model, Row(FULL), n_tokens).bytes_full // (n_tokens * n_layers),
        n_layers=n_layers,
        n_threads=settings["threads"],
    )


def _run_kvpress(python: str, plan: Path) -> None:
    if not Path(python).is_file():
        raise DepthKVError(f"{python} is missing: run scripts/peers.sh, which makes kvpress's environment")
    command = [python, "-m", "benchmarks.peers.presses", str(plan)]
    if subprocess.run(command, cwd=_ROOT).returncode:
        raise DepthKVError("kvpress's part failed, see above")


def _read_calibration(path: Path) -> Calibration:
    calibration = read_calibration(path)
    if calibration is None:
        raise DepthKVError(f"{path} carries no calibration: run `depthkv-edge calibrate {path} -o calibrated.gguf`")
    return calibration


def check_settings(settings: dict[str, Any], window_tokens: int) -> None:
    """Raises DepthKVError for what cannot be run."""
    if window_tokens < 512 or window_tokens % 256:
        raise DepthKVError(f"--window-tokens {window_tokens}: give a multiple of 256, 512 or more")
    for name in ("texts", "ratios", "presses"):
        if not settings[name]:
            raise DepthKVError(f"--{name} is empty: give one or more, or leave it out")
    if settings["threads"] < 1:
        raise DepthKVError(f"--threads {settings['threads']} is too small: give 1 or more")
    if not all(0 < ratio < 1 for ratio in settings["ratios"]):
        raise DepthKVError("--ratios are shares of the prompt: give some between 0 and 1, such as 0.2,0.4")
    if settings["windows"] < 0 or settings["contexts"] < 0 or not settings["windows"] + settings["contexts"]:
        raise DepthKVError("there is nothing to measure: give --windows or --contexts")
    if not 1 <= settings["keys"] <= _MAX_KEYS:
        raise DepthKVError(f"--keys {settings['keys']} is out of range: give from 1 to {_MAX_KEYS}")
    for name in settings["presses"]:
        if name not in PRESSES:
            raise DepthKVError(f"press {name!r} is not known: give some of {', '.join(PRESSES)}")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in _split(text)})
    except ValueError:
        raise DepthKVError(f"--ratios {text!r} is no list of numbers: give shares such as 0.2,0.4") from None


def _say(what: str) -> None:
    click.echo(what, err=True)


def _complain(error: DepthKVError) -> int:
    click.echo(f"Error: {error}", err=True)
    return 2


if __name__ == "__main__":
    main()
