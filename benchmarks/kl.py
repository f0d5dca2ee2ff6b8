"""KL divergence of pruned contexts from the full cache, all of them fed the same tokens in lockstep."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from depthkv_edge import _log, _native
from depthkv_edge._native import llama_cpp

_api = llama_cpp.llama_cpp


@dataclass
class Agreement:
    """How a context agrees with the full cache, over the scored tokens.

    Attributes:
        kl: [n] nats per token.
        top1: [n] whether the most likely token is the same.
    """

    kl: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        return {
            "kl": float(np.mean(self.kl)),
            "kl_se": float(np.std(self.kl) / len(self.kl) ** 0.5),
            "top1": float(np.mean(self.top1)),
        }


@dataclass(frozen=True)
class Setting:
    """A context to compare: a budget, a scorer and an allocation rule, or explicit cells of every layer.

    Attributes:
        budget: fraction of the full cache; 0 for the model's own, or none.
        rule: None for the model's own.
        cells: of each KV layer that grows with the context.
    """

    budget: float = 0.0
    scorer: str = "attention"
    rule: str | None = None
    cells: tuple[int, ...] | None = None


@contextlib.contextmanager
def load_model(path: Path) -> Iterator[int]:
    """A llama_model on the CPU."""
    params = _api.llama_model_default_params()
    params.n_gpu_layers = 0
    with _log.capture_errors(False) as lines:
        model = _api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(_log.reason(lines) or f"{path} cannot be loaded")
    try:
        yield model
    finally:
        _api.llama_model_free(model)


def tokenize(model: int, text: str, *, add_bos: bool = False) -> list[int]:
    """All tokens of a text."""
    data = text.encode()
    tokens = (ctypes.c_int32 * (len(data) + 8))()
    n = _api.llama_tokenize(_api.llama_model_get_vocab(model), data, len(data), tokens, len(tokens), add_bos, False)
    return list(tokens[:n])


def first_tokens(model: int, text: str, n: int) -> list[int]:
    """The first n tokens of a text.

    Raises:
        ValueError: the text has fewer.
    """
    tokens = tokenize(model, text[: 12 * n], add_bos=True)
    if len(tokens) < n:
        raise ValueError(f"the text has {len(tokens)} tokens, {n} are needed: give a longer one")
    return tokens[:n]


def compare(
    model: int,
    tokens: list[int],
    settings: dict[str, Setting],
    *,
    n_threads: int,
    n_scored: int,
    chunk: int = 256,
    on_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Agreement]:
    """Agreement with the full cache over the last `n_scored` of the tokens.

    Args:
        n_scored: a multiple of chunk.
        chunk: tokens decoded by each context in turn.
        on_chunk: called when every context has decoded a chunk.
    """
    n_ctx = len(tokens)
    with contextlib.ExitStack() as stack, _log.capture_errors(False):
        reference = open_context(stack, model, n_ctx, Setting(cells=None), n_threads)
        contexts = {name: open_context(stack, model, n_ctx, setting, n_threads) for name, setting in settings.items()}
        result = {name: Agreement() for name in settings}
        for at in range(0, n_ctx, chunk):
            part = tokens[at : at + chunk]
            scored = at >= n_ctx - n_scored
            p = decode(reference, part, at, scored)
            for name, context in contexts.items():
                q = decode(context, part, at, scored)
                if p is not None and q is not None:
                    result[name].kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()
                    result[name].top1 += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
            on_chunk()
    return result


def open_context(stack: contextlib.ExitStack, model: int, n_ctx: int, setting: Setting, n_threads: int) -> int:
    """A llama_context that the stack frees, without flash attention. The full cache if the setting says nothing."""
    params = _api.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = _api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    depth = _native.llama_depthkv_default_params()
    depth.budget = setting.budget
    depth.scorer = setting.scorer.encode()
    depth.rule = setting.rule.encode() if setting.rule else None
    if setting.cells is not None:
        depth.n_layers = len(setting.cells)
        cells = (ctypes.c_uint32 * depth.n_layers)(*setting.cells)
        depth.cells = ctypes.cast(cells, ctypes.POINTER(ctypes.c_uint32))
    context = _native.llama_depthkv_init_from_model(model, params, depth)
    if not context:
        raise RuntimeError(_native.last_error())
    stack.callback(_api.llama_free, context)
    return context


def decode(context: int, tokens: list[int], at: int, scored: bool) -> np.ndarray | None:
    """Decode tokens from position `at`; log-probabilities [n, n_vocab] of the token after each, if they are scored."""
    n_vocab = _api.llama_vocab_n_tokens(_api.llama_model_get_vocab(_api.llama_get_model(context)))
    batch = _api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = scored or i == len(tokens) - 1
    status = _api.llama_decode(context, batch)
    _api.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"decode failed with status {status}")
    if not scored:
        return None
    logits = np.ctypeslib.as_array(_api.llama_get_logits(context), shape=(len(tokens) * n_vocab,))
    logits = logits.reshape(len(tokens), n_vocab).astype(np.float32)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
