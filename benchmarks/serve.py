"""The server under load: ten minutes of conversations that hang up, and decode speed beside llama-bench.

.venv/bin/python -m benchmarks.serve smollm2 --kv-budget 0.4 -c 8192
.venv/bin/python -m benchmarks.serve smollm2 --kv-budget 0.4 -c 8192 --minutes 0 --json      # speed only
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import psutil

from depthkv_edge.engine.library import library_dir
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import resolve_model

ROOT = Path(__file__).parents[1]
N_DECODE = 128  # tokens of a speed measurement
INSTALL_OPENAI = "pip install 'openai>=1.40'"


@dataclass(frozen=True)
class Server:
    """A running server; `pid` is the server's own, since `depthkv-edge serve` becomes it."""

    url: str
    pid: int
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, timeout: float = 30, **headers: str) -> Any:
        """JSON, or text, that a path answers with. Raises urllib.error.HTTPError for a status of 400 and above."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"} | headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read().decode()
        return json.loads(data) if data.startswith(("{", "[")) else data

    def post(self, path: str, body: Any, timeout: float = 600) -> Any:
        """The same, with a JSON body."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.loads(response.read())

    def busy(self) -> int:
        """Slots that compute."""
        return sum(slot["is_processing"] for slot in self.get("slots"))

    def rss(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.pid).memory_info().rss


@contextlib.contextmanager
def running(model: str, *arguments: str, log: Path, key: str = "benchmark", port: int = 0) -> Iterator[Server]:
    """`depthkv-edge serve MODEL ARGUMENTS` on a free port, until it is left.

    Raises:
        DepthKVError: it does not start within a minute.
    """
    port = port or _free_port()
    command = [sys.executable, "-m", "depthkv_edge", "serve", model, "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"LLAMA_API_KEY": key}
        )
    server = Server(f"http://127.0.0.1:{port}/", process.pid, key, process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            if server.get("health", timeout=5)["status"] == "ok":
                return
        time.sleep(0.1)
    lines = server.log.read_text("utf-8", "replace").strip().splitlines()
    raise DepthKVError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}; see {server.log}")


# conversations that hang up


@dataclass
class Soak:
    """What happened under load.

    Attributes:
        n_answers: read to their end.
        n_hung_up: left by the client before it.
        errors: what no client had caused.
        leaks: answers that had another conversation's secret in them.
        rss: seconds since the beginning, and resident bytes then.
        freed: seconds until every slot was free after the last client had gone.
    """

    n_answers: int = 0
    n_hung_up: int = 0
    errors: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    freed: float = 0.0

    def growth(self) -> float:
        """Resident bytes of the last tenth against those after the first half, as a share."""
        values = [n_bytes for _, n_bytes in self.rss]
        late = values[len(values) // 2 : len(values) // 2 + max(1, len(values) // 10)]
        return statistics.median(values[-max(1, len(values) // 10) :]) / statistics.median(late) - 1


def soak(server: Server, seconds: float, n: int = 4, seed: int = 0, every: float = 1.0) -> Soak:
    """Hold `n` conversations at the same time through the official client, and hang up on a third of the answers.

    Every conversation has a secret in its system prompt, is asked for it, and goes on for some turns.
    """
    try:
        import openai
    except ImportError:
        raise DepthKVError(f"openai is not installed: run `{INSTALL_OPENAI}`") from None
    result, lock, started = Soak(), threading.Lock(), time.monotonic()
    secrets = [f"{random.Random(seed + i).randrange(16**8):08x}" for i in range(n)]
    text = "\n".join(topics[name] for name in sorted(topics))
    client = openai.OpenAI(base_url=server.url + "v1", api_key=server.key, max_retries=0, timeout=300)

    def one_answer(rng: random.Random, messages: list[dict[str, str]]) -> str | None:
        """None if the client hung up."""
        stop_after = rng.choice([None, None, rng.randrange(6)])
        stream = client.chat.completions.create(
            model="any", messages=messages, stream=True, max_tokens=24, temperature=0.8, seed=rng.randrange(2**31)
        )
        said = ""
        with stream:
            for i, chunk in enumerate(stream):
                if i == stop_after:
                    return None
                said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return said

    def converse(i: int) -> None:
        rng = random.Random(seed * 1000 + i)
        while time.monotonic() - started < seconds:
            start = rng.randrange(len(text) - 4000)
            messages = [
                {"role": "system", "content": f"The code word is {secrets[i]}. Repeat it when asked."},
                {
                    "role": "user",
                    "content": text[start : start + rng.randrange(200, 2000)] + "\nWhat is the code word?",
                },
            ]
            for _ in range(rng.randrange(1, 5)):
                try:
                    said = one_answer(rng, messages)
                except Exception as error:
                    with lock:
                        result.errors.append(f"{type(error).__name__}: {error}")
                    break
                with lock:
                    result.n_hung_up += said is None
                    result.n_answers += said is not None
                    if said and any(secret in said for k, secret in enumerate(secrets) if k != i):
                        result.leaks.append(said)
                if said is None or time.monotonic() - started > seconds:
                    break
                messages += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": "What else? Code word?"},
                ]

    threads = [threading.Thread(target=converse, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        result.rss.append((time.monotonic() - started, server.rss()))
        time.sleep(every)
    gone = time.monotonic()
    while server.busy() and time.monotonic() - gone < 60:
        time.sleep(0.02)
    result.freed = time.monotonic() - gone
    return result


# decode speed


@dataclass(frozen=True)
class Decode:
    """Decoded tokens per second at a depth, in turns."""

    depth: int
    server: list[float]
    bench: list[float]

    @property
    def ratio(self) -> float:
        """Median over the pairs."""
        return statistics.median(one / other for one, other in zip(self.server, self.bench, strict=True))


def bench_program() -> Path:
    """`llama-bench` of the server's build: beside the libraries, or where the tools are built.

    Raises:
        DepthKVError: it is not there.
    """
    for directory in (library_dir(), ROOT / "build/engine/bin"):
        if (path := directory / "llama-bench").is_file():
            return path
    raise DepthKVError(f"no llama-bench in {directory}: build it with scripts/setup.sh --test")


def decode_speed(
    server: Server, model: Path, budget: float, threads: int, depth: int, n: int = N_DECODE, pairs: int = 5
) -> Decode:
    """Decode after `depth` tokens through the server, and in llama-bench of the same build and budget, by turns.

    llama-bench has a context of `depth + n` tokens, of which the budget is a share: the server needs the same.
    """
    tokens = server.post("tokenize", {"content": "\n".join(topics[name] for name in sorted(topics))})["tokens"][:depth]

    def from_server() -> float:
        body = {"prompt": tokens, "n_predict": n, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
        return float(server.post("completion", body)["timings"]["predicted_per_second"])

    program = bench_program()

    def from_bench() -> float:
        command = [str(program), "-m", str(model), "-p", "0", "-n", str(n), "-d", str(depth)]
        command += ["-t", str(threads), "-r", "1", "-o", "json", "--kv-budget", repr(budget)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DepthKVError(f"llama-bench failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return float(json.loads(done.stdout)[0]["avg_ts"])

    turns: Sequence[Callable[[], float]] = (from_server, from_bench)
    speeds: dict[Callable[[], float], list[float]] = {turn: [] for turn in turns}
    for i in range(pairs):
        for turn in turns if i % 2 == 0 else reversed(turns):
            speeds[turn].append(turn())
    return Decode(depth, speeds[from_server], speeds[from_bench])


@click.command()
@click.argument("model")
@click.option("--kv-budget", type=float, default=0.4, show_default=True, help="Share of the full KV cache.")
@click.option("-c", "--ctx", type=int, default=8192, show_default=True, help="Context.")
@click.option("--parallel", type=int, default=4, show_default=True, help="Conversations at the same time.")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Of conversations; 0 for none.")
@click.option("--depth", type=int, default=2048, show_default=True, help="Tokens before those that are decoded.")
@click.option("--pairs", type=int, default=5, show_default=True, help="Of speed measurements; 0 for none.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: str,
    kv_budget: float,
    ctx: int,
    parallel: int,
    minutes: float,
    depth: int,
    pairs: int,
    threads: int,
    as_json: bool,
) -> None:
    """Load a server with conversations, and compare its decode speed with llama-bench."""
    path, log = resolve_model(model), ROOT / "build/serve-benchmark.log"
    log.parent.mkdir(exist_ok=True)
    budget = ["--kv-budget", str(kv_budget)]
    report: dict[str, Any] = {"model": path.name, "kv_budget": kv_budget, "n_ctx": ctx, "threads": threads}
    if pairs:
        bench_program()  # that it is missing is said at once
    if minutes:
        with running(
            model, *budget, "-c", str(ctx), "--parallel", str(parallel), "--", "-t", str(threads), log=log
        ) as server:
            loaded = soak(server, 60 * minutes, parallel)
        report["soak"] = asdict(loaded) | {"parallel": parallel, "growth": loaded.growth()}
    if pairs:
        with running(model, *budget, "-c", str(depth + N_DECODE), "--", "-t", str(threads), log=log) as server:
            speed = decode_speed(server, path, kv_budget, threads, depth, pairs=pairs)
        report["decode"] = asdict(speed) | {"ratio": speed.ratio}
    if as_json:
        click.echo(json.dumps(report))
        return
    if minutes:
        click.echo(
            f"{loaded.n_answers} answers, {loaded.n_hung_up} hung up on, {len(loaded.errors)} errors, "
            f"{len(loaded.leaks)} leaks; resident {loaded.rss[0][1] / 2**20:.0f} MiB at the beginning, "
            f"{loaded.rss[-1][1] / 2**20:.0f} MiB at the end, {loaded.growth():+.1%} in the second half; "
            f"slots free {loaded.freed:.2f} s after the last client"
        )
    if pairs:
        click.echo(
            f"decode at {depth} tokens: server {statistics.median(speed.server):.1f} tokens/s, llama-bench "
            f"{statistics.median(speed.bench):.1f}, ratio {speed.ratio:.3f}"
        )


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (click.ClickException, DepthKVError) as error:
        sys.exit(f"benchmarks.serve: {error}")
