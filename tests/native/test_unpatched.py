"""Without a budget the engine is the unpatched llama.cpp to the last bit, whatever attention, types and call order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from depthkv_edge.engine.library import library_dir

ROOT = Path(__file__).parents[2]

# In a process of its own, with the plain bindings: a process loads one library.
PROGRAM = """
import ctypes, hashlib, json, sys
import llama_cpp

model_path, configurations = sys.argv[1], json.loads(sys.argv[2])
log = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_default_params()
params.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
tokens = [(7919 * i + 13) % 1000 + 100 for i in range(300)]
seen = []
for configuration in configurations:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 128, 64
    params.n_threads = params.n_threads_batch = 2
    for name, value in configuration.items():
        setattr(params, name, value)
    ctx = llama_cpp.llama_init_from_model(model, params)
    digest = hashlib.sha256()

    def decode(part):
        array = (llama_cpp.llama_token * len(part))(*part)  # the batch does not keep it alive
        assert llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(array, len(part))) == 0
        logits = llama_cpp.llama_get_logits_ith(ctx, -1)
        digest.update(ctypes.string_at(logits, 4 * n_vocab))

    for start in range(0, 256, 128):
        decode(tokens[start : start + 128])
    for token in tokens[256:280]:
        decode([token])
    memory = llama_cpp.llama_get_memory(ctx)
    if llama_cpp.llama_memory_can_shift(memory):
        assert llama_cpp.llama_memory_seq_rm(memory, 0, 4, 68)
        llama_cpp.llama_memory_seq_add(memory, 0, 68, -1, -64)
        decode(tokens[280:281])
    llama_cpp.llama_memory_seq_rm(memory, 0, 150, -1)
    decode(tokens[281:299])
    size = llama_cpp.llama_state_get_size(ctx)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_get_data(ctx, state, size) == size
    digest.update(bytes(state))
    seen.append(digest.hexdigest())
    llama_cpp.llama_free(ctx)
print(json.dumps(seen))
"""

F16, Q4_0, Q8_0 = 1, 2, 8  # enum ggml_type
NO_FA, FA = 0, 1  # enum llama_flash_attn_type

CONFIGURATIONS = [
    {},
    {"flash_attn_type": NO_FA},
    {"flash_attn_type": NO_FA, "type_k": Q8_0},
    {"flash_attn_type": FA, "type_k": Q8_0, "type_v": Q8_0},
    {"flash_attn_type": FA, "type_k": Q4_0, "type_v": F16},
    {"swa_full": False, "n_seq_max": 2, "kv_unified": True},
    {"n_threads": 1, "n_threads_batch": 1, "n_ubatch": 100},
]


def logits_and_states(library: Path, model: Path) -> list[str]:
    """A digest for each configuration: every logit, and the saved state."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), json.dumps(CONFIGURATIONS)],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unpatched() -> Path:
    """llama.cpp from the same sources without our patches; some minutes where it is not built yet."""
    build = [ROOT / "scripts" / "build-baseline.sh", "--libraries"]
    return Path(subprocess.run(build, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def takes_a_budget(library: Path) -> bool:
    """Whether the libllama of a directory exports our API."""
    code = "import llama_cpp.llama_cpp as api; print(hasattr(api._lib, 'llama_depthkv_init_from_model'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LLAMA_CPP_LIB_PATH": str(library)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip() == "True"


def test_the_unpatched_build_is_unpatched(unpatched):
    assert takes_a_budget(library_dir()) and not takes_a_budget(unpatched)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_without_a_budget_every_bit_is_that_of_the_unpatched_build(model, unpatched, request):
    path = request.getfixturevalue(model)
    ours, theirs = logits_and_states(library_dir(), path), logits_and_states(unpatched, path)
    assert len(set(theirs)) > 1, "configurations that all give the same would compare nothing"
    assert ours == theirs
