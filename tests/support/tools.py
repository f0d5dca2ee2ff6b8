"""llama.cpp's own programs, as they are built here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from depthkv_edge.engine import library


def run(tool: str, *arguments: Any, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    path = library.library_dir() / tool
    if not path.is_file():  # tools are not part of the package: they are in the build directory that made it
        path = Path(__file__).parents[2] / "build" / "engine" / "bin" / tool
    return subprocess.run(
        [path, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=120,
    )
