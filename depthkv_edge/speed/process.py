"""Contexts in processes of their own, driven over pipes."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import KEY_BUDGET
from depthkv_edge.modelfile.reader import open_gguf, scalar
from depthkv_edge.speed.bench_settings import TYPES, BenchSettings
from depthkv_edge.speed.timing import Timing

# labels of the configurations that are always there
STOCK, STOCK_FLASH, NO_BUDGET = "stock", "stock, flash attention", "no budget (this library)"

# the engine names the options of `run`
_WAY_OUT = "raise --kv-budget or lower --ubatch", "give larger --budgets or a larger -c"


@dataclass(frozen=True)
class Configuration:
    """A context to measure.

    Attributes:
        label: as in the table.
        budget: share of the full cache; None: full.
        type: of K and V.
        flash_attn: None: what the engine picks.
        library: directory of another build's libraries; None: this package's.
    """

    label: str
    budget: float | None = None
    type: str = "f16"
    flash_attn: bool | None = None
    library: Path | None = None


@dataclass(frozen=True)
class ContextFacts:
    """What a context says of itself; None: only this package's library knows.

    Attributes:
        n_ctx: positions, after llama.cpp's rounding.
        n_ubatch: tokens computed at once.
        is_patched: it is a context of a library with `llama_depthkv_*`.
        kv_bytes: K and V.
        kv_bytes_full: K and V of the full F16 cache of the same context.
        compute_bytes: buffers for what a graph computes, all backends.
        scorer_bytes: query samples and buffers of the scoring pass.
        peak_rss_bytes: of the process, so far.
        rule: allocation rule; None without a budget.
    """

    n_ctx: int
    n_ubatch: int
    is_patched: bool
    kv_bytes: int | None
    kv_bytes_full: int | None
    compute_bytes: int
    scorer_bytes: int
    peak_rss_bytes: int
    rule: str | None


class Worker:
    """A context in another process; a context manager that ends it.

    Raises:
        DepthKVError: the context cannot be had. So does every method whose process dies.
    """

    def __init__(self, configuration: Configuration, model: Path, settings: BenchSettings):
        self.configuration = configuration
        self._rest = settings.sizes.rest
        # a failed assertion is one line, not a debugger's session
        environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
        if configuration.library is not None:
            environment["LLAMA_CPP_LIB_PATH"] = str(configuration.library)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "depthkv_edge.speed.worker"],
            env=environment,
            text=True,
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        budget = configuration.budget
        if budget is None and configuration.library is None and _brings_budget(model):
            budget = 1.0
        try:
            self._ask(
                model=str(model),
                stock=configuration.library is not None,
                budget=budget,
                kv_type=TYPES[configuration.type],
                flash_attn=configuration.flash_attn,
                n_ctx=settings.n_ctx,
                n_batch=settings.sizes.segment,
                n_threads=settings.n_threads,
            )
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str, n: int) -> list[int]:
        """The first n tokens of a text."""
        return self._ask(do="tokenize", text=text, n=n)["tokens"]

    def clear(self) -> None:
        """Empty the cache."""
        self._ask(do="clear")

    def compute(self, tokens: Sequence[int], *, one_by_one: bool) -> Timing:
        """Append tokens to what the cache holds."""
        answer = self._ask(do="compute", tokens=list(tokens), one_by_one=one_by_one)
        time.sleep(self._rest)
        return Timing(len(tokens), answer["seconds"], answer["evict_seconds"], tuple(answer["token_seconds"]))

    def logits_sha256(self) -> str:
        """Hash of the logits of the last token."""
        return self._ask(do="logits_sha256")["sha256"]

    def facts(self) -> ContextFacts:
        return ContextFacts(**self._ask(do="facts"))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a request that was not read
                    pass

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DepthKVError(f"{self.configuration.label}: its process {self._how_it_ended()}")
        answer = json.loads(line)
        if "error" in answer:
            raise DepthKVError(f"{self.configuration.label}: {answer['error'].replace(*_WAY_OUT)}")
        return answer

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code < 0 and signal.Signals(-code).name == "SIGKILL":
            return "was killed, as happens when memory runs out: give a smaller context or fewer budgets and types"
        if code < 0:
            return f"died of {signal.Signals(-code).name}" + (f" ({said})" if said else "")
        return f"ended ({said or f'exit code {code}'})"


@functools.cache
def _brings_budget(model: Path) -> bool:
    """Whether a model gets a budget even if none is given."""
    return scalar(open_gguf(model), KEY_BUDGET) is not None
