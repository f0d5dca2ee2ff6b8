"""One context of one library in a process of its own, driven over pipes: two libraries cannot share a process, and peak
memory is a property of a process.

As a program, it reads one JSON request a line and answers each with one line; `Worker` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Worker:
    """A context in another process.

    Args:
        library: directory with libllama.
        **options: arguments of `llama_cpp.Llama`.
    """

    def __init__(self, library: Path, **options: Any):
        env = os.environ | {"LLAMA_CPP_LIB_PATH": str(library)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ask(options)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker for {request} died")
        return json.loads(line)

    def eval(self, tokens: list[int], *, at: int, one_by_one: bool = False) -> float:
        """Seconds to compute tokens from position `at` on; what was there before is removed first."""
        return self._ask({"eval": tokens, "at": at, "one_by_one": one_by_one})["seconds"]

    def save(self) -> None:
        """Keep the state of the context, in the worker."""
        self._ask({"save": True})

    def load(self) -> None:
        """Go back to the state that was kept: what was evicted then, and nothing since."""
        self._ask({"load": True})

    def logits_sha256(self) -> str:
        """Hash of the logits of the last token."""
        return self._ask({"logits": True})["sha256"]

    def tokenize(self, text: str) -> list[int]:
        return self._ask({"tokenize": text})["tokens"]

    def peak_rss_bytes(self) -> int:
        return self._ask({"memory": True})["peak_rss_bytes"]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    import hashlib
    import time

    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(**json.loads(sys.stdin.readline()), verbose=False)
    print("{}", flush=True)
    state: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "eval" in request:
            tokens = request["eval"]
            llama.n_tokens = request["at"]
            started = time.perf_counter()
            for chunk in [[token] for token in tokens] if request["one_by_one"] else [tokens]:
                llama.eval(chunk)
                llama_cpp.llama_synchronize(llama.ctx)
            answer["seconds"] = time.perf_counter() - started
        elif "save" in request:
            state = llama.save_state()
        elif "load" in request:
            llama.load_state(state)
        elif "logits" in request:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))
            answer["sha256"] = hashlib.sha256(logits.tobytes()).hexdigest()
        elif "tokenize" in request:
            answer["tokens"] = llama.tokenize(request["tokenize"].encode())
        elif "memory" in request:
            status = Path("/proc/self/status").read_text()
            answer["peak_rss_bytes"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
