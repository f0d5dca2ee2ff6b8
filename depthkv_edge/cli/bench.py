"""`depthkv-edge bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from depthkv_edge.checks import check_threads, default_threads
from depthkv_edge.cli.options import FILE, check_positive
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.modelfile.packaged import resolve_model

_MOST_CTX = 8192  # unless told otherwise: a long prompt takes minutes for each configuration


@click.command()
@click.argument("model")
@click.option(
    "-c", "--ctx", type=int, metavar="TOKENS", help="Context. Default: what the model was trained for, at most 8192."
)
@click.option("--budgets", default="0.3,0.6", show_default=True, metavar="LIST", help="Shares of the full KV cache.")
@click.option(
    "--types", default="f16", show_default=True, metavar="LIST", help="Types of K and V: f16, q8_0, q4_0, ..."
)
@click.option(
    "--baseline", type=FILE, metavar="DIR", help="Libraries of an unpatched build. Default: this one without a budget."
)
@click.option("--repetitions", type=int, default=5, show_default=True, metavar="N", help="Least of each measurement.")
@click.option("--threads", type=int, metavar="N", help="CPU threads. Default: the physical cores.")
@click.option("--prompt", type=FILE, metavar="FILE", help="Text of the long prompt. Default: Python's reference.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def bench(
    model: str,
    ctx: int | None,
    budgets: str,
    types: str,
    baseline: str | None,
    repetitions: int,
    threads: int | None,
    prompt: str | None,
    as_json: bool,
) -> None:
    """Measure speed and memory beside the full cache.

    MODEL is the path of a GGUF, or a name that `fetch` lists. Every configuration runs in a process of its own,
    and all take turns.
    """
    # imported here, so that --help is quick
    from depthkv_edge.speed.bench_settings import BenchSettings, parse_budgets, parse_types
    from depthkv_edge.speed.rounds import bench as run_bench
    from depthkv_edge.speed.rounds import check_baseline

    n_threads = default_threads() if threads is None else check_threads("--threads", threads)
    check_positive(("-c", ctx), ("--repetitions", repetitions))
    shares, kinds = parse_budgets(budgets), parse_types(types)
    directory = None if baseline is None else check_baseline(Path(baseline))
    path = resolve_model(model)

    from depthkv_edge.measure.facts import trained_ctx
    from depthkv_edge.measure.progress import progress
    from depthkv_edge.speed.bench_table import print_result
    from depthkv_edge.speed.text import prompt_text

    settings = BenchSettings(
        n_ctx=min(trained_ctx(path) or _MOST_CTX, _MOST_CTX) if ctx is None else ctx,
        n_threads=n_threads,
        budgets=shares,
        types=kinds,
        repetitions=repetitions,
    )
    result = run_bench(
        path,
        settings,
        prompt_text(prompt),
        directory,
        command=shlex.join(["depthkv-edge", *sys.argv[1:]]),
        progress=lambda cost: progress("bench", cost),
    )
    if as_json:
        echo_json(result.to_dict())
    else:
        print_result(result)
