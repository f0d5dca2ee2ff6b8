"""`depthkv-edge doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from depthkv_edge.models import resolve_model

if TYPE_CHECKING:
    from depthkv_edge.doctor import Case, Diagnosis, ModelReport


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(model: str | None, as_json: bool) -> None:
    """Show the build, the machine, and what of a model fits it.

    MODEL is the path of a GGUF, or smollm2 for the packaged one. No weights are read.
    """
    path = None if model is None else resolve_model(model)

    # imported here, so that --help needs no library
    from depthkv_edge.doctor import diagnose

    diagnosis = diagnose(path)
    if as_json:
        click.echo(json.dumps(diagnosis.to_dict(), ensure_ascii=False, allow_nan=False))
        return
    for name, text in fact_rows(diagnosis):
        click.echo(f"{name:<13}{text}")
    if diagnosis.model is not None:
        click.echo()
        for name, text in model_rows(diagnosis.model):
            click.echo(f"{name:<13}{text}")
        if diagnosis.model.cases:
            click.echo()
            click.echo("\n".join(table_lines(diagnosis.model)))


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
        memory = f", {_mib(device.memory_free)} of {_mib(device.memory_total)} MiB free" if device.memory_total else ""
        rows.append(("device", f"{device.backend} {device.name} ({device.type}): {device.description}{memory}"))
    free = f"{_mib(diagnosis.memory_free)} of {_mib(machine['memory_bytes'])} MiB free"
    rows.append(("memory", f"{free}; --kv-budget auto would use {_mib(diagnosis.memory_usable)} MiB"))
    return rows


def model_rows(report: ModelReport) -> list[tuple[str, str]]:
    """What is said of a model above the table: a name, and a text."""
    facts = report.facts
    kind = ", ".join(str(fact) for fact in (facts["architecture"], facts["weights"]) if fact)
    rows = [
        ("model", f"{facts['name']} ({report.path})"),
        ("weights", f"{_mib(facts['bytes'])} MiB, {kind}, trained for {report.trained_ctx} tokens"),
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


def table_lines(report: ModelReport) -> list[str]:
    """MiB that a context (rows) and a budget (columns) need; what does not fit is in brackets."""
    budgets = sorted({case.budget for case in report.cases}, reverse=True)
    cases = {(case.n_ctx, case.budget): case for case in report.cases}
    header = "".join(f"{f'{budget:.0%}':>12}" for budget in budgets)
    lines = [f"{'context':>9}{header}   MiB for everything, by KV budget; [does not fit]"]
    for n_ctx in sorted({case.n_ctx for case in report.cases}):
        cells = (_cell(cases[n_ctx, budget]) for budget in budgets)
        lines.append(f"{n_ctx:>9}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _cell(case: Case) -> str:
    if case.need is None:
        return "too small"
    return _mib(case.need.total) if case.fits else f"[{_mib(case.need.total)}]"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f}"
