"""`depthkv-edge inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from depthkv_edge.cli.options import FILE, check_positive
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.engine.budget import FORMS, parse_budget
from depthkv_edge.modelfile.packaged import resolve_model


@click.command()
@click.argument("model")
@click.option("--kv-budget", metavar="BUDGET", help=f"KV cache: {FORMS}. Default: the model's own, or all of it.")
@click.option("-c", "--ctx", type=int, metavar="TOKENS", help="Context. Default: what the model was trained for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw sensitivity and cells of every layer.")
def inspect(model: str, kv_budget: str | None, ctx: int | None, as_json: bool, plot: str | None) -> None:
    """Show how sensitive each layer is, and the KV cells it gets.

    MODEL is the path of a GGUF, or a name that `fetch` lists. No weights are read.
    """
    budget = None if kv_budget is None else parse_budget(kv_budget)
    check_positive(("-c", ctx))
    path = resolve_model(model)

    # imported here, so that what is wrong so far is said at once, and --help needs no library
    from depthkv_edge.cli.inspect_table import print_inspection
    from depthkv_edge.sizing.inspection import inspect_model

    inspection = inspect_model(path, budget, ctx or 0)
    if plot is not None:
        from depthkv_edge.sizing.plot import plot_inspection

        plot_inspection(inspection, Path(plot))
    if as_json:
        echo_json(inspection.to_dict())
    else:
        print_inspection(inspection)
