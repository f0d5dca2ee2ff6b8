"""What choosing the CPU code at run time costs: a wheel's libraries beside those of a build for this machine alone.

.venv/bin/python -m benchmarks.wheel smollm2 --wheel build/check-wheel/venv
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from depthkv_edge.engine.library import holds_libllama, library_dir
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.progress import progress
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.speed.bench_settings import BenchSettings, Sizes
from depthkv_edge.speed.pairs import compare_builds, pair_cost
from depthkv_edge.speed.process import Configuration, Worker
from depthkv_edge.speed.rounds import check_baseline
from depthkv_edge.speed.text import prompt_text


def wheel_libraries(environment: Path) -> Path:
    """Directory of the libraries in a virtual environment; one that holds them itself is taken as it is.

    Raises:
        DepthKVError: the package is not installed there.
    """
    if holds_libllama(environment):
        return environment.resolve()
    for pattern in ("lib/python*/site-packages", "Lib/site-packages"):
        for directory in environment.glob(f"{pattern}/depthkv_edge/lib"):
            return directory.resolve()
    raise DepthKVError(f"no depthkv_edge in {environment}: make it with scripts/check-wheel.sh")


@click.command()
@click.argument("model")
@click.option("--wheel", type=Path, required=True, help="Virtual environment that the wheel is installed in.")
@click.option("--native", type=Path, help="Libraries to compare with. Default: this installation's.")
@click.option("--pairs", type=int, default=20, show_default=True, help="Of fresh processes.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(model: str, wheel: Path, native: Path | None, pairs: int, threads: int, as_json: bool) -> None:
    """Compare prefill and decode, in pairs of processes that take turns of 64 tokens and of one token."""
    try:
        path = resolve_model(model)
        here = Configuration("native", library=check_baseline(native) if native else library_dir())
        there = Configuration("wheel", library=wheel_libraries(wheel))
        sizes = replace(Sizes(), pairs=pairs, pair_turns=6, pair_prefill=64, pair_decode=64)
        settings = BenchSettings(n_ctx=2048, n_threads=threads, repetitions=1, sizes=sizes)
        with Worker(here, path, settings) as worker:
            tokens = worker.tokenize(prompt_text(None), settings.n_ctx)
        with progress("bench", pair_cost(settings)) as advance:
            found = compare_builds(here, there, path, settings, tokens, advance)
    except DepthKVError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({"model": path.name, "threads": threads} | found.to_dict()))
        return
    for name, speed in (("prefill", found.prefill), ("decode", found.decode)):
        low, high = speed.interval
        click.echo(
            f"{name}: {speed.ratio:.3f} of the native speed, 95 % interval {low:.3f} to {high:.3f}, {speed.n} pairs"
        )


if __name__ == "__main__":
    main()
