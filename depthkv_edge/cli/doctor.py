"""`depthkv-edge doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from depthkv_edge.cli.options import GPU_LAYERS, check_gpu_layers
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.units import mib

if TYPE_CHECKING:
    from depthkv_edge.sizing.diagnosis import Case, Diagnosis, ModelReport

_TABLE_WIDTH = 80  # columns, however narrow the terminal says it is: a number is never cut


@click.command()
@click.argument("model", required=False)
@GPU_LAYERS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(model: str | None, gpu_layers: int | None, as_json: bool) -> None:
    """Show the build, the machine, and what of a model fits it.

    MODEL is the path of a GGUF, or a name that `fetch` lists. No weights are read.
    """
    n_gpu_layers = check_gpu_layers(gpu_layers)
    path = None if model is None else resolve_model(model)

    # imported here, so that --help needs no library
    from depthkv_edge.sizing.diagnosis import diagnose

    diagnosis = diagnose(path, n_gpu_layers)
    if as_json:
        echo_json(diagnosis.to_dict())
        return
    for name, text in fact_rows(diagnosis):
        click.echo(f"{name:<13}{text}")
    if diagnosis.model is not None:
        click.echo()
        for name, text in model_rows(diagnosis.model):
            click.echo(f"{name:<13}{text}")
        if diagnosis.model.cases:
            click.echo()
            click.echo("MiB for everything, by context and KV budget; [does not fit]")
            print_cases(diagnosis.model)


def fact_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """What is said of the installation and the machine: a name, and a text."""
    engine, machine = diagnosis.engine, diagnosis.machine
    rows = [
        ("depthkv-edge", f"{diagnosis.version}, {diagnosis.python}"),
        ("llama.cpp", f"{engine['llama_cpp_commit']}, llama-cpp-python {engine['llama_cpp_python']}"),
        ("library", f"{diagnosis.library}, API version {engine['llama_depthkv_version']}"),
        ("sha256", engine["library_sha256"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {diagnosis.threads} threads"),
        ("system", machine["system"]),
        ("features", diagnosis.system_info),
    ]
    for device in diagnosis.devices:
        memory = f", {mib(device.memory_free)} of {mib(device.memory_total)} MiB free" if device.memory_total else ""
        rows.append(("device", f"{device.backend} {device.name} ({device.type}): {device.description}{memory}"))
    free = f"{mib(diagnosis.memory_free)} of {mib(machine['memory_bytes'])} MiB free"
    rows.append(("memory", f"{free}; --kv-budget auto would use {mib(diagnosis.memory_usable)} MiB"))
    return rows


def model_rows(report: ModelReport) -> list[tuple[str, str]]:
    """What is said of a model above the table: a name, and a text."""
    facts = report.facts
    kind = ", ".join(str(fact) for fact in (facts["architecture"], facts["weights"]) if fact)
    rows = [
        ("model", f"{facts['name']} ({report.path})"),
        ("weights", f"{mib(facts['bytes'])} MiB, {kind}, trained for {report.trained_ctx} tokens"),
        ("KV budget", f"refused: {report.refusal}" if report.refusal else "defined"),
    ]
    if not report.refusal:
        calibration = facts["calibration"]
        text = "none: all layers get the same number of cells"
        if calibration is not None:
            parts = [calibration["method"] or "the file does not say how", calibration["corpus"]]
            if calibration["gain"] is not None:
                parts.append(f"held-out KL {calibration['gain']:.2g} times lower than uniform")
            text = ", ".join(part for part in parts if part)
        rows.append(("calibration", text))
    return rows


def print_cases(report: ModelReport) -> None:
    """MiB that a context (rows) and a budget (columns) need, on standard output; what does not fit is in brackets."""
    # imported here, since every other command imports this module and shows no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    budgets = sorted({case.budget for case in report.cases}, reverse=True)
    cases = {(case.n_ctx, case.budget): case for case in report.cases}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for name in ("context", *(f"{budget:.0%}" for budget in budgets)):
        table.add_column(name, justify="right", no_wrap=True)
    for n_ctx in sorted({case.n_ctx for case in report.cases}):
        cells = (_cell(cases[n_ctx, budget], report.refusal) for budget in budgets)
        table.add_row(str(n_ctx), *(Text(cell) for cell in cells))  # plain text: brackets are no markup here
    Console(highlight=False, width=_TABLE_WIDTH).print(table, soft_wrap=True)


def _cell(case: Case, refusal: str) -> str:
    if case.need is None:
        return "-" if refusal else "too small"
    return mib(case.need.total) if case.fits else f"[{mib(case.need.total)}]"
