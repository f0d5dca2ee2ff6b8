"""One context of one library, as a program: reads one JSON request a line, answers each with one line.

A process of its own because two libraries cannot share one, and because peak memory is a property of a process. The
other end is `depthkv_edge.speed.process`.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import re
import sys
import time
from typing import Any, TextIO

from depthkv_edge.errors import DepthKVError
from depthkv_edge.memory import peak_rss_bytes

_ERROR = 4  # enum ggml_log_level
_COMPUTE_BUFFER = re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB")


class _Log:
    """What llama.cpp says only through its log: sizes of compute buffers, and why something failed."""

    def __init__(self) -> None:
        self.compute_bytes: dict[str, int] = {}  # by backend, the last that was said
        self.errors: list[str] = []

    def listen(self, api: Any, forward: Any = None) -> None:
        """Take the place of whoever has listened so far, who may still be told."""

        @api.llama_log_callback
        def callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
            line = text.decode("utf-8", "replace")
            if match := _COMPUTE_BUFFER.search(line):
                self.compute_bytes[match[1]] = round(float(match[2]) * 2**20)
            if level == _ERROR:
                self.errors.append(line.strip())
            if forward is not None:
                forward(level, text, user_data)

        self._callback = callback  # keeps it alive
        api.llama_log_set(callback, ctypes.c_void_p(0))


class _Context:
    """A context that is being measured."""

    def __init__(self, llama: Any, bindings: Any, log: _Log):
        self._llama = llama
        self._api = bindings.llama_cpp
        self._log = log

    def tokenize(self, text: str, n: int) -> dict[str, Any]:
        """The first n tokens of a text."""
        return {"tokens": self._llama.tokenize(text.encode())[:n]}

    def clear(self) -> dict[str, Any]:
        """Empty the cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._llama.ctx), True)
        self._llama.n_tokens = 0
        return {}

    def compute(self, tokens: list[int], one_by_one: bool) -> dict[str, Any]:
        """Append tokens to what the cache holds."""
        chunks = [[token] for token in tokens] if one_by_one else [tokens]
        evict_seconds = self._evict_seconds()
        times = [time.perf_counter()]
        for chunk in chunks:
            self._llama.eval(chunk)
            self._api.llama_synchronize(self._llama.ctx)
            times.append(time.perf_counter())
        return {
            "seconds": times[-1] - times[0],
            "evict_seconds": self._evict_seconds() - evict_seconds,
            "token_seconds": [end - start for start, end in itertools.pairwise(times)] if one_by_one else [],
        }

    def logits_sha256(self) -> dict[str, Any]:
        """Hash of the logits of the last token."""
        import numpy as np

        pointer = self._api.llama_get_logits_ith(self._llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self._llama.n_vocab(),))
        return {"sha256": hashlib.sha256(logits.tobytes()).hexdigest()}

    def facts(self) -> dict[str, Any]:
        """Sizes in bytes; of a context without a budget, those that only this package's library knows are None."""
        return {
            "n_ctx": self._llama.n_ctx(),
            "compute_bytes": sum(self._log.compute_bytes.values()),
            "peak_rss_bytes": peak_rss_bytes(),
            "is_patched": hasattr(self._api._lib, "llama_depthkv_version"),
            "kv_bytes": None,
            "kv_bytes_full": None,
            "scorer_bytes": 0,
            "rule": None,
            "n_ubatch": self._api.llama_n_ubatch(self._llama.ctx),
        }

    def _evict_seconds(self) -> float:
        return 0.0


class _DepthContext(_Context):
    """A context of this package's library."""

    def facts(self) -> dict[str, Any]:
        kv = self._llama.kv_stats()
        more = {"kv_bytes": kv.bytes, "kv_bytes_full": self._bytes_full(), "scorer_bytes": kv.bytes_scorer}
        return super().facts() | more | {"rule": kv.rule if kv.active else None, "n_ubatch": kv.n_ubatch}

    def _bytes_full(self) -> int:
        """K and V of the full F16 cache of the same context."""
        from depthkv_edge.engine import capi
        from depthkv_edge.engine.context import plan_params

        params = type(self._llama.context_params).from_buffer_copy(self._llama.context_params)
        params.type_k = params.type_v = self._api.GGML_TYPE_F16
        depth = capi.llama_depthkv_default_params()
        depth.budget = b"1"
        return plan_params(self._llama.model, params, depth).kv.bytes

    def _evict_seconds(self) -> float:
        return self._llama.kv_stats().t_evict_us / 1e6


def _open(
    model: str,
    stock: bool,
    budget: float | None,
    kv_type: int,
    flash_attn: bool | None,
    n_ctx: int,
    n_batch: int,
    n_threads: int,
) -> _Context:
    """A context of whichever libllama the environment selects (`stock`), or of this package's."""
    options: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        "type_k": kv_type,
        "type_v": kv_type,
        "flash_attn": flash_attn,
        "swa_full": False,  # in every context: a budget needs it, and stock is not to look worse for lack of it
        "verbose": False,
    }
    log = _Log()
    if not stock:
        from depthkv_edge.engine.log import log_callback
        from depthkv_edge.llama import Llama, llama_cpp

        log.listen(llama_cpp.llama_cpp, forward=log_callback)
        return _DepthContext(Llama(model, kv_budget=budget, **options), llama_cpp, log)
    try:
        import llama_cpp

        log.listen(llama_cpp.llama_cpp)
        return _Context(llama_cpp.Llama(model, **options), llama_cpp, log)
    except (ValueError, RuntimeError, OSError, AttributeError) as error:
        # the bindings say only that something failed; a library that is none of theirs may lack any symbol
        raise DepthKVError(log.errors[-1] if log.errors else str(error)) from error


def _answer(out: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    """Serve until standard input ends."""
    # nobody else writes to what the answers go to
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        context = _open(**json.loads(sys.stdin.readline()))
        _answer(out, context.facts())
        for line in sys.stdin:
            request = json.loads(line)
            _answer(out, getattr(context, request.pop("do"))(**request))
    except DepthKVError as error:
        _answer(out, {"error": str(error)})


if __name__ == "__main__":
    main()
