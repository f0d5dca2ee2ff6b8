"""The engine itself, with one layer pruned, holds what calibration says it holds."""

from __future__ import annotations

import ctypes

import pytest
import torch
from transformers.quantizers import quantizer_gguf

from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.load import find_source, quiet
from depthkv_edge.calibrate.load import load_model as load_hf
from depthkv_edge.calibrate.target import inspect_model
from depthkv_edge.calibrate.window import prefill, run_tail
from depthkv_edge.engine import capi, log
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.model import load_model
from depthkv_edge.engine.rules import n_ubatch
from depthkv_edge.modelfile.f32 import write_f32

_api = llama_cpp.llama_cpp
_F32 = 0  # enum ggml_type

N_TOKENS, N_TAIL = 512, 64
CASES = {"attention": [(7, 224), (20, 160)], "window": [(12, 160)]}  # layer, and its cells


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    with quiet(), pytest.MonkeyPatch.context() as patch:
        # whatever kernels are installed, calibration wants plain weights
        patch.setattr(quantizer_gguf, "get_gguf_kernel", lambda: pytest.fail("the weights would stay quantised"))
        return inspect_model(load_hf(find_source("smollm2"), "cpu", "float32"))


@pytest.fixture(scope="module")
def engine(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("f32") / "smollm2-f32.gguf"
    write_f32(smollm2, path)
    with load_model(path, n_threads=2) as model:
        yield model.handle
    path.unlink()


def held_by_engine(model: int, tokens: list[int], index: int, n_cells: int, scorer: str) -> set[int]:
    """Positions in the cells of one layer after a text, all other layers full."""
    n = len(tokens)
    params = _api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = _F32
    params.flash_attn_type = _api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    n_layers = capi.llama_depthkv_layer_count(model)
    cells = (ctypes.c_uint32 * n_layers)(*(n_cells if i == index else n for i in range(n_layers)))
    depth = capi.llama_depthkv_default_params()
    depth.scorer = scorer.encode()
    depth.n_layers, depth.cells = n_layers, ctypes.cast(cells, ctypes.POINTER(ctypes.c_uint32))
    with log.capture_errors(False):
        context = capi.llama_depthkv_init_from_model(model, params, depth)
    assert context, capi.last_error()
    try:
        ids = (ctypes.c_int32 * n)(*tokens)  # the batch points into it
        assert _api.llama_decode(context, _api.llama_batch_get_one(ids, n)) == 0
        positions = (ctypes.c_int32 * n)()
        found = capi.llama_depthkv_get_positions(context, index, 0, positions, n)
        return set(positions[:found])
    finally:
        _api.llama_free(context)


@pytest.fixture(scope="module")
def simulated(target, tokens):
    """Of each scorer, a window with a plan for each of its cases: the other layers are full."""

    def window(scorer: str):
        plans = []
        for index, n_cells in CASES[scorer]:
            cells = [N_TOKENS] * len(target.layer_ids)
            cells[index] = n_cells
            plans.append(LayerCells(tuple(cells)))
        return run_tail(prefill(target, tokens[:N_TOKENS], N_TAIL, scorer, plans))

    return {scorer: window(scorer) for scorer in CASES}


@pytest.mark.parametrize(("scorer", "case"), [(scorer, i) for scorer in CASES for i in range(len(CASES[scorer]))])
def test_same_cells_as_the_engine(target, engine, simulated, tokens, scorer, case):
    index, n_cells = CASES[scorer][case]
    assert n_ubatch(n_cells) == N_TAIL
    last = simulated[scorer].held[target.layer_ids[index]][case][-1]
    ours = set(last.pos.tolist()) | set(range(last.start, N_TOKENS))
    theirs = held_by_engine(engine, tokens[:N_TOKENS], index, n_cells, scorer)
    assert len(theirs) == len(ours) <= n_cells
    # all of them, on the machine where this was written; rounding may swap cells of nearly the same score
    assert len(theirs & ours) / len(theirs | ours) > 0.95
