"""ctypes mirror of native/include/llama-depthkv.h, in its order."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from depthkv_edge.engine import library
from depthkv_edge.errors import DepthKVError

llama_cpp = library.import_bindings()
_api = llama_cpp.llama_cpp  # the module that mirrors llama.h, and owns the library handle

VERSION = 9  # LLAMA_DEPTHKV_VERSION


class llama_depthkv_rule(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("desc", ctypes.c_char_p),
        ("needs_attn", ctypes.c_bool),
    ]


class llama_depthkv_budget(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("value", ctypes.c_double),
    ]


class llama_depthkv_params(ctypes.Structure):
    _fields_ = [
        ("budget", ctypes.c_char_p),
        ("memory", ctypes.c_size_t),
        ("scorer", ctypes.c_char_p),
        ("rule", ctypes.c_char_p),
        ("n_sink", ctypes.c_int32),
        ("n_recent", ctypes.c_int32),
        ("n_layers", ctypes.c_size_t),
        ("cells", ctypes.POINTER(ctypes.c_uint32)),
        ("type_k", ctypes.POINTER(ctypes.c_int)),
        ("type_v", ctypes.POINTER(ctypes.c_int)),
    ]


class llama_depthkv_layer(ctypes.Structure):
    _fields_ = [
        ("layer", ctypes.c_int32),
        ("cells", ctypes.c_uint32),
        ("used", ctypes.c_uint32),
        ("evicted", ctypes.c_uint64),
        ("bytes", ctypes.c_size_t),
        ("sinks", ctypes.c_uint32),
        ("pinned", ctypes.c_uint32),
        ("recent", ctypes.c_uint32),
    ]


class llama_depthkv_stats(ctypes.Structure):
    _fields_ = [
        ("active", ctypes.c_bool),
        ("budget", ctypes.c_float),
        ("n_layers", ctypes.c_int32),
        ("n_ctx_seq", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("bytes", ctypes.c_size_t),
        ("bytes_full", ctypes.c_size_t),
        ("bytes_scorer", ctypes.c_size_t),
        ("bytes_compute", ctypes.c_size_t),
        ("bytes_work", ctypes.c_size_t),
        ("bytes_weights", ctypes.c_size_t),
        ("bytes_other", ctypes.c_size_t),
        ("bytes_device", ctypes.c_size_t),
        ("n_score", ctypes.c_uint64),
        ("n_evict", ctypes.c_uint64),
        ("n_reeval", ctypes.c_uint64),
        ("t_evict_us", ctypes.c_int64),
        ("scorer", ctypes.c_char * 32),
        ("rule", ctypes.c_char * 32),
        ("calibrated", ctypes.c_char * 32),
    ]


class llama_depthkv_alloc_params(ctypes.Structure):
    _fields_ = [
        ("rule", ctypes.c_char_p),
        ("n_layers", ctypes.c_uint32),
        ("n_ctx", ctypes.c_uint32),
        ("budget", ctypes.c_double),
        ("n_floor", ctypes.c_uint32),
        ("n_align", ctypes.c_uint32),
        ("n_ratios", ctypes.c_uint32),
        ("keep_ratios", ctypes.POINTER(ctypes.c_float)),
        ("sensitivity", ctypes.POINTER(ctypes.c_float)),
        ("cell_bytes", ctypes.POINTER(ctypes.c_uint64)),
    ]


class llama_depthkv_constants(ctypes.Structure):
    _fields_ = [
        ("n_sink", ctypes.c_uint32),
        ("n_recent", ctypes.c_uint32),
        ("n_align", ctypes.c_uint32),
        ("n_ubatch_min", ctypes.c_uint32),
        ("n_query_span", ctypes.c_uint32),
        ("n_warmup", ctypes.c_uint32),
    ]


def _other_build(what: str) -> DepthKVError:
    return DepthKVError(
        f"{_api._lib._name} {what}: it is not, or no longer, this package's build; "
        "run scripts/setup.sh in the source tree"
    )


def _bind(name: str, argtypes: list[Any], restype: Any) -> Any:
    try:
        function = getattr(_api._lib, name)
    except AttributeError:
        raise _other_build(f"has no {name}") from None
    function.argtypes = argtypes
    function.restype = restype
    return function


_model_p = _api.llama_model_p_ctypes
_context_p = _api.llama_context_p_ctypes
_context_params = _api.llama_context_params
_seq_id = _api.llama_seq_id
_pos = _api.llama_pos

llama_depthkv_version = _bind("llama_depthkv_version", [], ctypes.c_int32)
if llama_depthkv_version() != VERSION:
    raise _other_build(f"has version {llama_depthkv_version()} of llama-depthkv.h, not {VERSION}")

llama_depthkv_last_error = _bind("llama_depthkv_last_error", [], ctypes.c_char_p)
llama_depthkv_clear_error = _bind("llama_depthkv_clear_error", [], None)

# rules
_rule_p = ctypes.POINTER(llama_depthkv_rule)
llama_depthkv_get_scorer = _bind("llama_depthkv_get_scorer", [ctypes.c_int32, _rule_p], ctypes.c_bool)
llama_depthkv_get_alloc = _bind("llama_depthkv_get_alloc", [ctypes.c_int32, _rule_p], ctypes.c_bool)

# budget
llama_depthkv_budget_parse = _bind(
    "llama_depthkv_budget_parse", [ctypes.c_char_p, ctypes.POINTER(llama_depthkv_budget)], ctypes.c_bool
)

# context
llama_depthkv_default_params = _bind("llama_depthkv_default_params", [], llama_depthkv_params)
llama_depthkv_init_from_model = _bind(
    "llama_depthkv_init_from_model", [_model_p, _context_params, llama_depthkv_params], _context_p
)
llama_depthkv_layer_count = _bind("llama_depthkv_layer_count", [_model_p], ctypes.c_int32)
llama_depthkv_layer_id = _bind("llama_depthkv_layer_id", [_model_p, ctypes.c_int32], ctypes.c_int32)

# statistics
llama_depthkv_get_stats = _bind(
    "llama_depthkv_get_stats", [_context_p, ctypes.POINTER(llama_depthkv_stats)], ctypes.c_bool
)
llama_depthkv_get_layer = _bind(
    "llama_depthkv_get_layer",
    [_context_p, ctypes.c_int32, _seq_id, ctypes.POINTER(llama_depthkv_layer)],
    ctypes.c_bool,
)
llama_depthkv_get_positions = _bind(
    "llama_depthkv_get_positions",
    [_context_p, ctypes.c_int32, _seq_id, ctypes.POINTER(_pos), ctypes.c_int32],
    ctypes.c_int32,
)

# plan
llama_depthkv_memory_free = _bind("llama_depthkv_memory_free", [], ctypes.c_size_t)
llama_depthkv_plan = _bind(
    "llama_depthkv_plan",
    [
        _model_p,
        _context_params,
        llama_depthkv_params,
        ctypes.POINTER(llama_depthkv_stats),
        ctypes.POINTER(llama_depthkv_layer),
        ctypes.c_int32,
    ],
    ctypes.c_int32,
)

# going back
llama_depthkv_seq_pos_rollback = _bind("llama_depthkv_seq_pos_rollback", [_context_p, _seq_id, _pos], _pos)
llama_depthkv_seq_rollback = _bind("llama_depthkv_seq_rollback", [_context_p, _seq_id, _pos], _pos)

# pinning
llama_depthkv_pin = _bind("llama_depthkv_pin", [_context_p, _seq_id, _pos, _pos], ctypes.c_bool)
llama_depthkv_unpin = _bind("llama_depthkv_unpin", [_context_p, _seq_id], None)

# evicting
llama_depthkv_seq_keep = _bind(
    "llama_depthkv_seq_keep",
    [_context_p, ctypes.c_int32, _seq_id, ctypes.POINTER(_pos), ctypes.c_int32],
    ctypes.c_bool,
)

# allocation
llama_depthkv_alloc = _bind(
    "llama_depthkv_alloc", [llama_depthkv_alloc_params, ctypes.POINTER(ctypes.c_uint32)], ctypes.c_bool
)

# keys
llama_depthkv_check_file = _bind("llama_depthkv_check_file", [ctypes.c_char_p], ctypes.c_bool)

# simulation
_sim_p, _pos_p = ctypes.c_void_p, ctypes.POINTER(_pos)
llama_depthkv_get_constants = _bind("llama_depthkv_get_constants", [], llama_depthkv_constants)
llama_depthkv_n_ubatch = _bind("llama_depthkv_n_ubatch", [ctypes.c_uint32, ctypes.c_uint32], ctypes.c_uint32)
llama_depthkv_sim_init = _bind(
    "llama_depthkv_sim_init",
    [ctypes.c_char_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32],
    _sim_p,
)
llama_depthkv_sim_free = _bind("llama_depthkv_sim_free", [_sim_p], None)
llama_depthkv_sim_queries = _bind(
    "llama_depthkv_sim_queries", [_sim_p, ctypes.c_uint32, _pos_p, ctypes.c_int32], ctypes.c_int32
)
llama_depthkv_sim_pending = _bind("llama_depthkv_sim_pending", [_sim_p, _pos_p, ctypes.c_int32], ctypes.c_int32)
llama_depthkv_sim_count = _bind("llama_depthkv_sim_count", [_sim_p, ctypes.POINTER(ctypes.c_float)], None)
llama_depthkv_sim_evict = _bind("llama_depthkv_sim_evict", [_sim_p, ctypes.c_uint32], None)
llama_depthkv_sim_add = _bind("llama_depthkv_sim_add", [_sim_p, ctypes.c_uint32], None)
llama_depthkv_sim_positions = _bind("llama_depthkv_sim_positions", [_sim_p, _pos_p, ctypes.c_int32], ctypes.c_int32)
llama_depthkv_sim_sample = _bind(
    "llama_depthkv_sim_sample",
    [ctypes.c_char_p, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32), ctypes.c_int32],
    ctypes.c_int32,
)


def last_error() -> str:
    """Why the last call of the C API on this thread failed; empty if nothing failed."""
    return (llama_depthkv_last_error() or b"").decode("utf-8", "replace").strip()


def alloc(
    budget: float,
    n_layers: int,
    n_ctx: int,
    *,
    rule: str | None = None,
    keep_ratios: ArrayLike | None = None,
    sensitivity: ArrayLike | None = None,
    n_floor: int = 1,
    n_align: int = 1,
) -> list[int]:
    """Cells of each layer for a budget: `n_layers` values whose sum never exceeds `budget * n_layers * n_ctx`.

    Args:
        budget: fraction of the full cache, in (0, 1].
        rule: one of `engine.rules.ALLOC_RULES`. None: `optimal` if there are curves, else `uniform`.
        keep_ratios: [R] ascending, in (0, 1].
        sensitivity: [n_layers, R] nats per token, not increasing with the keep ratio.
        n_floor: least cells of a layer.
        n_align: granularity of a layer, in cells.

    Raises:
        DepthKVError: the budget is out of range or below the floor, or the rule is unknown or needs curves that are
            missing or nonsense.
    """
    cells = (ctypes.c_uint32 * n_layers)()
    params = llama_depthkv_alloc_params(
        rule=rule.encode() if rule else None,
        n_layers=n_layers,
        n_ctx=n_ctx,
        budget=budget,
        n_floor=n_floor,
        n_align=n_align,
    )
    if keep_ratios is not None and sensitivity is not None:
        ratios = np.ascontiguousarray(keep_ratios, np.float32)
        curves = np.ascontiguousarray(sensitivity, np.float32)
        if curves.shape != (n_layers, ratios.size):
            raise DepthKVError(
                f"sensitivity has shape {curves.shape}: {n_layers} layers and {ratios.size} keep ratios are needed"
            )
        params.n_ratios = ratios.size
        params.keep_ratios = ratios.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.sensitivity = curves.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if not llama_depthkv_alloc(params, cells):
        raise DepthKVError(last_error())
    return list(cells)
