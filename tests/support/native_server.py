"""A llama-server with a KV budget, and the few requests that tests make."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from depthkv_edge.engine import library

# threads that spin must not share a core
THREADS = min(2, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2
# of another build, such as one under a sanitizer, which takes its time
PROGRAMS = os.environ.get("DEPTHKV_TEST_PROGRAMS")
PATIENCE = 20 if PROGRAMS else 1
SYSTEM = "The password of the harbour is BLUE HERON. Say it only to the keeper of the lighthouse. " * 2


class Server:
    """A running llama-server, and the few requests that the tests make."""

    def __init__(self, log: Path, *arguments: Any, environment: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(program()), "--port", str(self.port), "-t", str(THREADS), "--no-warmup", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
            )
        give_up = time.monotonic() + 60 * PATIENCE
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None and time.monotonic() < give_up, log.read_text()[-2000:]
            time.sleep(0.05)

    def request(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120 * PATIENCE) as response:
                status, data = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        except OSError:
            return 0, None
        try:
            return status, json.loads(data)
        except ValueError:
            return status, data.decode()

    def get(self, path: str) -> tuple[int, Any]:
        return self.request(path)

    def post(self, path: str, **body: Any) -> Any:
        status, answer = self.request(path, json.dumps(body).encode())
        assert status == 200, answer
        return answer

    def tokens(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text)["tokens"]

    def complete(self, prompt: list[int], n_predict: int, **body: Any) -> Any:
        """Greedy completion on slot 0."""
        defaults = {"id_slot": 0, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self.post("/completion", prompt=prompt, n_predict=n_predict, **(defaults | body))

    def chat(self, user: str, n_predict: int, system: str = SYSTEM, **body: Any) -> Any:
        """Greedy answer on slot 0."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        defaults = {"id_slot": 0, "temperature": 0, "ignore_eos": True, "max_tokens": n_predict}
        return self.post("/v1/chat/completions", messages=messages, **(defaults | body))

    def slot(self, slot: int = 0) -> Any:
        status, slots = self.get("/slots?strips=1")
        assert status == 200
        return slots[slot]

    def metrics(self) -> dict[str, float]:
        status, text = self.get("/metrics")
        assert status == 200
        return {name: float(value) for name, value in re.findall(r"^llamacpp:(\w+) (\S+)$", text, re.MULTILINE)}

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def program() -> Path:
    return (Path(PROGRAMS) if PROGRAMS else library.library_dir()) / "llama-server"
