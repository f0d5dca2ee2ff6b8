"""`depthkv-edge calibrate`. Without the packages of its extra, it says which those are."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from depthkv_edge.checks import check_number
from depthkv_edge.cli.options import FILE, check_positive, list_rules
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.errors import DepthKVError

if TYPE_CHECKING:
    from depthkv_edge.calibrate.outcome import Outcome

_PACKAGES = ("torch", "transformers", "accelerate")
_INSTALL = "pip install torch==2.13.0 'depthkv-edge[calibrate]'"


@click.command()
@click.argument("hf_model")
@click.option(
    "--gguf", type=FILE, metavar="FILE", help="Model file to calibrate. Default: HF_MODEL itself, if it is one."
)
@click.option("-o", "--output", required=True, type=FILE, metavar="FILE", help="Where it goes; may be the same file.")
@click.option(
    "--corpus", multiple=True, type=FILE, metavar="FILE", help="Text or .jsonl file, or a data set. Repeat for more."
)
@click.option("--windows", type=int, metavar="N", help="Windows of text to measure. Default: 4, by the engine 2.")
@click.option("--recall", type=int, metavar="N", help="Windows that ask for hidden facts. Default: 2, by the engine 1.")
@click.option("--window-tokens", type=int, default=3072, show_default=True, metavar="N", help="Tokens of a window.")
@click.option(
    "--scorer",
    default="attention",
    show_default=True,
    metavar="NAME",
    is_eager=True,
    callback=list_rules,
    help="Token-scoring rule; help lists them.",
)
@click.option("--ratios", default="0.05,0.1,0.2,0.4,0.7", show_default=True, metavar="LIST", help="Keep ratios.")
@click.option(
    "--method",
    type=click.Choice(["exact", "fast", "both", "engine"]),
    help="Prune each layer in turn, or estimate it from gradients. Both: and compare. Engine: prune in the GGUF, "
    "without torch. Default: exact, or engine where torch is not installed.",
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, mps, or auto for all.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Precision. Less than float32 has a noise floor above what many layers lose.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of what is read.")
@click.option("--curves", type=FILE, metavar="FILE", help="Write the curves of every window as JSON, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def calibrate(
    hf_model: str,
    gguf: str | None,
    output: str,
    corpus: tuple[str, ...],
    windows: int | None,
    recall: int | None,
    window_tokens: int,
    scorer: str,
    ratios: str,
    method: str | None,
    device: str,
    dtype: str,
    seed: int,
    curves: str | None,
    as_json: bool,
) -> None:
    """Measure how much each layer suffers from eviction, and write it into a model file.

    HF_MODEL is a Hugging Face directory or hub id, a GGUF file, or smollm2 for the packaged model. An interrupted
    calibration goes on where it was when the same command runs again. Under `accelerate launch` the windows are split
    over its processes.
    """
    if not hf_model:
        raise DepthKVError("no model is named: give a Hugging Face directory, the path of a .gguf file, or smollm2")
    keep_ratios = _parse_ratios(ratios)
    check_positive(("--windows", windows), ("--window-tokens", window_tokens))
    if recall is not None:
        check_number("--recall", recall)
    if method is None:
        missing = [package for package in _PACKAGES if find_spec(package) is None]
        method = "engine" if missing else "exact"
        if missing:
            click.echo(f"{missing[0]} is not installed: the engine measures the GGUF (--method engine)", err=True)
    measure = _load(method)
    from depthkv_edge.calibrate.calibrate_settings import CalibrateSettings, default_windows
    from depthkv_edge.calibrate.outcome import check_dump, dump_curves

    default = default_windows(method)

    settings = CalibrateSettings(
        model=hf_model,
        gguf=Path(gguf) if gguf else None,
        output=Path(output),
        corpus=corpus,
        windows=default[0] if windows is None else windows,
        recall=default[1] if recall is None else recall,
        window_tokens=window_tokens,
        scorer=scorer,
        device=device,
        dtype=dtype,
        method=method,
        seed=seed,
        ratios=keep_ratios,
    )
    if curves:
        check_dump(Path(curves), settings)

    def show(outcome: Outcome) -> None:
        if as_json:
            echo_json(outcome.to_dict())
        else:
            _print_summary(outcome)
        if curves:  # last, for this may fail
            dump_curves(outcome, Path(curves))

    try:
        measure(settings, lambda line: click.echo(line, err=True), show)
    except KeyboardInterrupt:
        click.echo("interrupted: the same command goes on where this one was", err=True)
        raise


def _load(method: str) -> Callable[..., Outcome | None]:
    """What measures by a method.

    Raises:
        DepthKVError: a package that it needs is missing, or broken.
    """
    if method == "engine":
        from depthkv_edge.calibrate.by_engine import calibrate_with_engine

        return calibrate_with_engine
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise DepthKVError(
                f"--method {method} needs {package}, which is not installed: run `{_INSTALL}`, or measure with "
                "--method engine"
            )
    try:
        from depthkv_edge.calibrate.calibrate import calibrate as measure
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # one of them is too old, or broken
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DepthKVError(f"a package that calibration needs does not load ({why}): run `{_INSTALL}`") from None
    return measure


def _parse_ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DepthKVError(f"--ratios {text} is not a list of numbers: give some like 0.05,0.1,0.2,0.4") from None


def _print_summary(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in summary_rows(outcome):
        table.add_row(name, text)
    Console(stderr=True).print(table, highlight=False)


def summary_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """Rows of the table: a name, and what is to be said about it."""
    from depthkv_edge.calibrate.heldout import UNIFORM
    from depthkv_edge.modelfile.keys import CHECK_BUDGET

    calibration, held_out = outcome.calibration, outcome.held_out
    worst = sorted(zip(calibration.sensitivity[:, 0], calibration.layer_ids, strict=True), reverse=True)[:5]
    recall = f" and {calibration.recall_windows} that ask" if calibration.recall_windows else ""
    divergence = f"mean KL {held_out.calibrated:.4f} calibrated, {held_out.uniform:.4f} uniform"
    rows = [
        (
            "measured",
            f"{calibration.windows} windows{recall} of {calibration.window_tokens} tokens, {calibration.method}",
        ),
        ("sensitive", "layers " + ", ".join(str(layer) for _, layer in worst)),
    ]
    if not math.isnan(calibration.stability):  # as it is of one window
        rows.append(("stability", f"{calibration.stability:.2f} (Spearman between texts)"))
    if outcome.agreement is not None:
        points, layers = outcome.agreement
        rows.append(("fast", f"{points:.2f} Spearman with exact over all points, {layers:.2f} over layers"))
    if held_out.recall is not None:
        uniform, calibrated = held_out.recall
        rows.append(("facts", f"mean KL of hidden ones {calibrated:.4f} calibrated, {uniform:.4f} uniform"))
    if calibration.rule == UNIFORM:
        why = "none on held-out text" if held_out.gain <= 1 else "none on hidden facts, whatever it is on text"
        rows.append(("gain", f"{why}: {divergence}; the file asks for uniform budgets"))
    elif math.isinf(held_out.gain):
        rows.append(("gain", f"nothing is lost on held-out text at a budget of {CHECK_BUDGET:g}: {divergence}"))
    else:
        rows.append(("gain", f"{held_out.gain:.1f}x on held-out text at a budget of {CHECK_BUDGET:g}: {divergence}"))
    rows.append(("written", str(outcome.output)))
    return rows
