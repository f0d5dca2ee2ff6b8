"""A stand-in for llama-server that answers what it is told to, for tests of the page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "depthkv_edge" / "server" / "web" / "index.html"
N_LAYERS, N_PARTS, CELLS = 30, 64, 1200


@dataclass
class StandIn:
    """What the server will say, and what it was asked.

    Attributes:
        words: the answer, a chunk for each.
        n_tokens: positions that the conversation then has.
        gate: a cleared one holds an answer after its first word.
        fail: status and error of the next chat request.
        fail_within: error in the middle of the next answer; "drop" closes the connection.
        loading: everything but the page is 503.
        key: what clients must send.
        chats: bodies of the chat requests.
        paths: what else was asked for.
        hung_up: the client has gone before the answer was over.
    """

    words: list[str] = field(default_factory=lambda: ["Four ", "words ", "of ", "answer."])
    n_tokens: int = 3000
    n_slots: int = 4
    active: bool = True
    gate: threading.Event = field(default_factory=threading.Event)
    fail: tuple[int, dict[str, Any]] | None = None
    fail_within: dict[str, Any] | str | None = None
    loading: bool = False
    key: str | None = None
    chats: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    def slots(self) -> list[dict[str, Any]]:
        """The third slot is that of the last chat."""
        seed = self.chats[-1]["seed"] if self.chats else 7
        return [self._slot(i, seed if i == min(2, self.n_slots - 1) else 1000 + i) for i in range(self.n_slots)]

    def _slot(self, i: int, seed: int) -> dict[str, Any]:
        safe = {"sinks": 4, "pinned": 296, "recent": 32}
        known = safe | {"used": CELLS, "evicted": self.n_tokens - CELLS, "bytes": 2**20}
        layers = [known | {"layer": k, "cells": CELLS + 10 * k} for k in range(N_LAYERS)]
        kv = {"active": self.active, "budget": 0.4, "scorer": "attention", "rule": "optimal", "pinned": 300}
        kv |= {"bytes": N_LAYERS * 2**20, "bytes_full": 75 * 2**20, "layers": layers}
        kv["strips"] = [[_share(k, part) for part in range(N_PARTS)] for k in range(N_LAYERS)]
        return {"id": i, "n_ctx": 8192, "params": {"seed": seed}, "n_prompt_tokens": self.n_tokens, "kv": kv}


def _share(layer: int, part: int) -> float:
    if part < 7 or part > N_PARTS - 3:  # pinned, and recent
        return 1.0
    return round(0.1 + 0.5 * ((layer * 37 + part * 61) % 29) / 28 * (0.4 + layer / N_LAYERS), 3)


@contextmanager
def serve(stand_in: StandIn) -> Iterator[StandIn]:
    """Run it on a free port of the loopback."""

    class Handler(_Handler):
        says = stand_in

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    says: StandIn

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.says.paths.append(self.path)
        if path == "/":
            return self._send(200, PAGE.read_bytes(), "text/html")
        if not self._let_in():
            return None
        answers = {
            "/props": lambda: {"model_alias": "SmolLM2-135M-Instruct.Q4_1", "total_slots": self.says.n_slots},
            "/slots": self.says.slots,
        }
        if path not in answers:
            return self._error(404, "File Not Found", "not_found_error")
        return self._json(200, answers[path]())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._let_in():
            return
        self.says.chats.append(body)
        if self.says.fail:
            (status, error), self.says.fail = self.says.fail, None
            self._json(status, {"error": {"code": status} | error})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._answer()
        except OSError:
            self.says.hung_up.set()

    def _answer(self) -> None:
        within, self.says.fail_within = self.says.fail_within, None
        progress = {"total": 3000, "cache": 0, "processed": 1024, "time_ms": 9}
        self._chunk({"delta": {"role": "assistant", "content": None}}, prompt_progress=progress)
        for i, word in enumerate(self.says.words):
            self._chunk({"delta": {"content": word}})
            if i == 0:
                while not self.says.gate.wait(0.05):
                    self._write(":\n\n")  # fails once the client has gone
            if i == 1 and within == "drop":
                return
            if i == 1 and within:
                self._write(f"data: {json.dumps({'error': within})}\n\n")
                return
            time.sleep(0.01)
        timings = {"cache_n": 2000, "prompt_n": 1000, "predicted_per_second": 41.04}
        self._chunk({"delta": {}, "finish_reason": "stop"}, timings=timings)
        self._write("data: [DONE]\n\n")

    def _chunk(self, choice: dict[str, Any], **more: Any) -> None:
        self._write(f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None} | choice]} | more)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _let_in(self) -> bool:
        if self.says.loading:
            self._error(503, "Loading model", "unavailable_error")
            return False
        if self.says.key and self.headers["Authorization"] != f"Bearer {self.says.key}":
            self._error(401, "Invalid API Key", "authentication_error")
            return False
        return True

    def _error(self, status: int, message: str, kind: str) -> None:
        self._json(status, {"error": {"code": status, "message": message, "type": kind}})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
