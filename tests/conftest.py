"""Models and documents that the tests share. A missing model fails: nothing is skipped unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from support.keys import example
from support.native_server import Server

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.modelfile.keys import Calibration
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.modelfile.writer import write_calibrated


@dataclass(frozen=True)
class Outcome:
    """One run of the command."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)


def run_python(*arguments: str, stdin: str = "", **environment: str) -> Outcome:
    """Run the interpreter in a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=600,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """Run `depthkv-edge` in a process of its own."""
    return lambda *arguments, **kwargs: run_python("-m", "depthkv_edge", *map(str, arguments), **kwargs)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return resolve_model(os.environ.get("DEPTHKV_TEST_MODEL", "smollm2"))  # scripts/sanitize.sh has a smaller one
    except DepthKVError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    try:
        return resolve_model("gemma3")
    except DepthKVError as error:
        pytest.fail(str(error))


@pytest.fixture
def load(smollm2: Path) -> Iterator[Callable[..., Llama]]:
    """Load a model (SmolLM2 unless told otherwise) with small defaults; all are closed at the end of the test."""
    opened: list[Llama] = []

    def make(path: Path = smollm2, **kwargs: Any) -> Llama:
        defaults = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
        opened.append(Llama(path, **(defaults | kwargs)))
        return opened[-1]

    yield make
    for llama in opened:
        llama.close()


@pytest.fixture(scope="session")
def text() -> str:
    """A long real text: the Python reference."""
    return "\n\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(scope="session")
def tokens(smollm2: Path, text: str) -> list[int]:
    """The same as SmolLM2 tokens: 8,000 of them."""
    with closing(Llama(smollm2, n_ctx=64, vocab_only=False, verbose=False)) as llama:
        return llama.tokenize(text[:60_000].encode(), add_bos=False)[:8000]


@pytest.fixture(scope="session")
def document(smollm2: Path, tokens: list[int]) -> Callable[[int], str]:
    """A document of about so many tokens."""

    def make(n_tokens: int) -> str:
        with closing(Llama(smollm2, n_ctx=64, verbose=False)) as llama:
            return llama.detokenize(tokens[:n_tokens]).decode("utf-8", "ignore")

    return make


@pytest.fixture(scope="session")
def calibration() -> Calibration:
    """What `depthkv-edge calibrate smollm2` measured, to three digits."""
    curves = json.loads((Path(__file__).parent / "data" / "smollm2-sensitivity.json").read_text())
    sensitivity = np.float32(curves["sensitivity"])
    return example(
        layer_ids=tuple(range(30)),
        keep_ratios=tuple(curves["keep_ratios"]),
        sensitivity=sensitivity,
        sensitivity_se=sensitivity / 4,
        rule="",
    )


@pytest.fixture(scope="session")
def calibrated(smollm2, calibration, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "smollm2.gguf"
    write_calibrated(smollm2, path, calibration)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def make(*arguments: Any, **kwargs: Any) -> Server:
        started.append(Server(tmp_path_factory.mktemp("server") / "log", *arguments, **kwargs))
        return started[-1]

    yield make
    for server in started:
        if server.process.poll() is None:
            server.close()
