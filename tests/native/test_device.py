"""What a token costs a device, counted behind ggml's RPC: a device of its own machine as far as the scheduler knows."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

BIN = Path(os.environ.get("DEPTHKV_TEST_PROGRAMS", Path(__file__).parents[2] / "build" / "engine" / "bin"))

N_DEPTH, N_DECODE = 192, 8  # of a context of 256: half of it evicts


def commands(log: Path) -> list[str]:
    """What the server was asked for, one after the other."""
    return re.findall(r"^\[(\w+)\]", log.read_text(errors="replace"), re.MULTILINE)


@pytest.fixture
def bench(smollm2, tmp_path):
    """Runs llama-bench with every layer on a server; the commands that decoding took."""

    def run(*options: str) -> list[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path / "server.log"
        environment = {**os.environ, "GGML_RPC_DEBUG": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            server = subprocess.Popen(
                [BIN / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                stdout=output,
                stderr=output,
                env=environment,
            )
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            command = [BIN / "llama-bench", "-m", smollm2, "-ngl", "99", "--rpc", f"127.0.0.1:{port}"]
            command += ["-p", "0", "-n", str(N_DECODE), "-d", str(N_DEPTH), "-r", "1", "--no-warmup", *options]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
        finally:
            server.terminate()
            server.wait(30)
        asked = commands(log)
        computed = [i for i, name in enumerate(asked) if name.startswith("graph_")]
        return asked[computed[-5] : computed[-1]]

    return run


@pytest.mark.parametrize("flash_attn", ["0", "1"])
def test_a_token_takes_no_more_copies_than_with_the_stock_cache(bench, flash_attn):
    """Every copy waits for the device; a view of an input for each layer was one for each layer."""
    stock = bench("-fa", flash_attn)
    ours = bench("-fa", flash_attn, "--kv-budget", "0.5")
    assert stock.count("set_tensor") > 0
    assert ours == stock
