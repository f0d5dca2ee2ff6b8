"""Tries every shape and writes docs/support.md. Needs scripts/setup.sh --test.

.venv/bin/python -m benchmarks.zoo                   # everything
.venv/bin/python -m benchmarks.zoo 'Llama 3.2 1B'    # one shape, and writes no page
.venv/bin/python -m benchmarks.zoo 'Llama 3.2 1B' --write FILE.gguf    # the few layers that are run, for other programs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from benchmarks.zoo.check import check_shape, refused
from benchmarks.zoo.page import PAGE, render, row
from benchmarks.zoo.shapes import SHAPES
from benchmarks.zoo.write import write_model


@click.command()
@click.argument("names", nargs=-1)
@click.option("--write", "out", type=Path, help="Write the one shape with this name, and try nothing.")
def main(names: tuple[str, ...], out: Path | None) -> None:
    """Try the shapes with these names, or all."""
    shapes = [shape for shape in SHAPES if not names or shape.name in names]
    if unknown := set(names) - {shape.name for shape in shapes}:
        raise click.UsageError(f"no shape is called {', '.join(sorted(unknown))}")
    if out:
        if len(names) != 1:
            raise click.UsageError("--write takes the name of one shape")
        write_model(out, shapes[0], n_layers=min(shapes[0].n_layers, shapes[0].n_layers_run))
        return
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as directory:
        with click.progressbar(shapes, label="models", file=sys.stderr) as progress:
            for shape in progress:
                check = check_shape(shape, Path(directory))
                rows.append(row(check))
                failed += [f"{shape.name}: {line}" for line in check.failed]
        if failed:
            sys.exit("\n".join(failed))
        if not names:
            PAGE.write_text(render(rows, refused(Path(directory))))


if __name__ == "__main__":
    main()
