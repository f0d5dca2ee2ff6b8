"""Memory of a device: a server of ggml's RPC on this machine, which has its own as far as the engine knows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(os.environ.get("DEPTHKV_TEST_PROGRAMS", Path(__file__).parents[2] / "build" / "engine" / "bin"))

# in a process of its own: what is registered stays
CONNECT = """
import ctypes, json, sys
from pathlib import Path
from click.testing import CliRunner
from depthkv_edge import DepthKVError, Llama
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.devices import ALL_LAYERS, EVERYWHERE, Offload, devices, _ggml

path, endpoint = Path(sys.argv[1]), sys.argv[2]
llama_cpp.llama_cpp.llama_backend_init()
reg = _ggml("ggml_backend_reg_by_name", [ctypes.c_char_p], ctypes.c_void_p)(b"RPC")
address = _ggml("ggml_backend_reg_get_proc_address", [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p)(
    reg, b"ggml_backend_rpc_add_server"
)
added = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(endpoint.encode())
_ggml("ggml_backend_register", [ctypes.c_void_p], None)(added)
gpu = next(device for device in devices() if device.is_gpu)
assert gpu.name == "RPC0" and gpu.memory_free > 2**30
"""


@pytest.fixture(scope="module")
def on_device(smollm2):
    """Runs a program with a device; what it prints."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [BIN / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)

    def run(program: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", CONNECT + program, str(smollm2), f"127.0.0.1:{port}"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    server.terminate()
    server.wait(30)


def test_what_lies_there_does_not_count(on_device):
    on_device("""
from depthkv_edge.sizing.fit import measuring

with measuring(path, process_bytes=0) as cpu, measuring(path, process_bytes=0, offload=EVERYWHERE) as gpu:
    for n_ctx, budget in ((2048, 1.0), (8192, 0.4)):
        there, here = gpu(n_ctx, budget, 512), cpu(n_ctx, budget, 512)
        assert here.on_devices == 0 and there.kv == here.kv
        # the embeddings, which are read on the CPU, stay
        assert there.on_devices > there.kv + 0.6 * there.weights
        assert there.total < here.total - there.kv
        assert there.fits_devices and here.fits_devices
with measuring(path, process_bytes=0, offload=Offload(10)) as some:
    assert 0 < some(8192, 0.4, 512).on_devices < there.on_devices, "ten layers of thirty"
""")


def test_what_a_device_has_no_room_for(on_device):
    """However much the host has."""
    on_device("""
from depthkv_edge.engine.budget import parse_budget
from depthkv_edge.sizing.fit import fit_memory, measuring

n_ctx = next(2**i for i in range(12, 30) if 2**i * 23040 > 1.5 * gpu.memory_free)
with measuring(path, process_bytes=0, offload=EVERYWHERE) as need_of:
    assert not need_of(n_ctx, 1.0, 512).fits_devices
try:
    fit_memory(path, 2**50, n_ctx, parse_budget("1"), offload=EVERYWHERE)
except DepthKVError as error:
    assert "device RPC0" in str(error) and "offload fewer layers" in str(error), error
else:
    raise AssertionError("it fits")
fit = fit_memory(path, 2**50, n_ctx, parse_budget("auto"), offload=EVERYWHERE)
assert 0.2 <= fit.budget < 1 and fit.need.fits_devices and fit.need.on_devices < gpu.memory_free
assert "in devices" in dict(fit.rows)["memory"]
assert fit_memory(path, 2**50, n_ctx, parse_budget("1")).budget == 1, "on the CPU"
""")


def test_auto_of_layers_there(on_device):
    """`Llama` plans with the layers where it will put them, and decodes."""
    on_device("""
with_gpu = Llama(path, n_ctx=512, kv_budget="auto", n_gpu_layers=ALL_LAYERS, verbose=False)
assert with_gpu.kv_stats().bytes_device > with_gpu.kv_stats().bytes
text = with_gpu("The capital of France is", max_tokens=4, temperature=0)["choices"][0]["text"]
on_cpu = Llama(path, n_ctx=512, verbose=False)
assert on_cpu.kv_stats().bytes_device == 0
assert on_cpu("The capital of France is", max_tokens=4, temperature=0)["choices"][0]["text"] == text
""")


def test_doctor(on_device):
    said = on_device("""
from depthkv_edge.cli.doctor import doctor
for options in ([], ["--gpu-layers", "0"]):
    print(CliRunner().invoke(doctor, [str(path), "--json", *options], catch_exceptions=False).stdout)
""")
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(said)
    second, _ = decoder.raw_decode(said[end:].lstrip())
    for report, there in ((first, True), (second, False)):
        assert any(device["name"] == "RPC0" for device in report["devices"])
        for case in report["model"]["cases"]:
            assert (case["need"]["on_devices"] > 0) == there
