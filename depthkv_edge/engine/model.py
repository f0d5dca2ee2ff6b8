"""A model and its contexts, fed token by token: what every measurement does with the engine."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from depthkv_edge.engine import capi, log
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.context import AUTO, OFF, ON, Options
from depthkv_edge.engine.context import open_context as open_with
from depthkv_edge.errors import DepthKVError

api = llama_cpp.llama_cpp

KV_TYPES = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0, "q4_0": api.GGML_TYPE_Q4_0}
_N_BATCH = 512
_N_LOGITS = 2**25  # logits of one batch: bounds the memory of a model with many tokens in its vocabulary


@dataclass(frozen=True)
class Model:
    """A loaded llama_model.

    Attributes:
        handle: the llama_model.
        path: its file.
        n_threads: CPU threads of every context.
        stopping: when set, streams raise Stopped.
    """

    handle: Any
    path: Path
    n_threads: int
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def n_vocab(self) -> int:
        return api.llama_vocab_n_tokens(self._vocab)

    @property
    def n_batch(self) -> int:
        """Most tokens of one `decode`."""
        return max(32, min(_N_BATCH, 1 << (_N_LOGITS // self.n_vocab).bit_length() - 1))

    @property
    def n_layers(self) -> int:
        """Layers whose KV cells grow with the context."""
        return capi.llama_depthkv_layer_count(self.handle)

    @property
    def bos(self) -> list[int]:
        """The token that begins a sequence, if the model wants one."""
        return [api.llama_vocab_bos(self._vocab)] if api.llama_vocab_get_add_bos(self._vocab) else []

    @property
    def _vocab(self) -> Any:
        return api.llama_model_get_vocab(self.handle)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """All tokens of a text, none added. `special`: control tokens in the text are tokens, as in a chat template."""
        data = text.encode()
        tokens = (ctypes.c_int32 * (len(data) + 8))()
        n = api.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, special)
        return list(tokens[:n])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        pieces = bytearray()
        buffer = ctypes.create_string_buffer(256)
        for token in tokens:
            n = api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            pieces += buffer.raw[: max(n, 0)]
        return pieces.decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return api.llama_vocab_is_eog(self._vocab, token)

    def chat_template(self) -> str | None:
        """The model's own, None for a base model."""
        template = api.llama_model_chat_template(self.handle, None)
        return template.decode() if template else None


@contextlib.contextmanager
def load_model(path: Path, n_threads: int) -> Iterator[Model]:
    """Load a model on the CPU.

    Raises:
        DepthKVError: it cannot be loaded.
    """
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    with log.capture_errors(False) as lines:  # for as long as the model is used: contexts log too
        handle = api.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise DepthKVError(f"{path}: {log.reason(lines, path) or 'cannot be loaded'}")
        try:
            yield Model(handle, path, n_threads)
        finally:
            api.llama_model_free(handle)


@dataclass(frozen=True)
class Cache:
    """The KV cache of a context; as it stands, stock llama.cpp's full one.

    Attributes:
        budget: share of the full cache, in (0, 1]; 1 is the stock cache.
        scorer, rule: None for the model's own.
        cells: of each layer that grows with the context, instead of a budget.
        kv_type: of K and V.
        n_ubatch: most tokens computed at once.
        flash_attn: use the fused kernel even where nothing asks for it.
    """

    budget: float = 1.0
    scorer: str | None = None
    rule: str | None = None
    cells: tuple[int, ...] | None = None
    kv_type: str = "f16"
    n_ubatch: int = _N_BATCH
    flash_attn: bool = False

    @property
    def is_stock(self) -> bool:
        return self.budget == 1.0 and self.cells is None


def options(model: Model, n_ctx: int, cache: Cache) -> Options:
    """Of a context of one sequence."""
    # without flash attention the softmax is F32 and decoding on a CPU faster; a quantised V cannot do without
    flash_attn = ON if cache.flash_attn else OFF if cache.kv_type == "f16" else AUTO
    return Options(
        n_ctx=n_ctx,
        n_batch=model.n_batch,
        n_ubatch=cache.n_ubatch,
        type_k=KV_TYPES[cache.kv_type],
        type_v=KV_TYPES[cache.kv_type],
        flash_attn=flash_attn,
        swa_full=False,
        n_threads=model.n_threads,
        budget=str(cache.budget) if cache.cells is None else None,
        scorer=cache.scorer,
        rule=cache.rule,
        cells=cache.cells,
    )


def open_context(model: Model, n_ctx: int, cache: Cache) -> contextlib.AbstractContextManager[Any]:
    """A llama_context of one sequence.

    Raises:
        DepthKVError: the engine refuses the cache.
    """
    return open_with(model.handle, options(model, n_ctx, cache))


def decode(context: Any, tokens: Sequence[int], at: int, *, n_outputs: int = 0) -> np.ndarray:
    """Decode at most `Model.n_batch` tokens from position `at`.

    Args:
        n_outputs: how many of the last tokens to predict the next one of.

    Returns:
        Logits [n_outputs, n_vocab], float32. A view that the next call overwrites.
    """
    batch = api.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= len(tokens) - n_outputs
        status = api.llama_decode(context, batch)
    finally:
        api.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"llama_decode of {len(tokens)} tokens at {at} failed with status {status}")
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    if n_outputs == 0:
        return np.empty((0, n_vocab), np.float32)
    return np.ctypeslib.as_array(api.llama_get_logits(context), shape=(n_outputs * n_vocab,)).reshape(-1, n_vocab)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [n, n_vocab] in nats, float32."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
