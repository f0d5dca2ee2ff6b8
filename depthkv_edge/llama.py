"""`llama_cpp.Llama` with a budget for its KV cache."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

from depthkv_edge.checks import MAX_THREADS, check_number, check_threads
from depthkv_edge.engine import capi, log
from depthkv_edge.engine.budget import Budget, parse_budget
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.context import KEY_BUDGET, Options, default_flash_attn, flash_attn_type, plan_params
from depthkv_edge.engine.devices import Offload, devices
from depthkv_edge.engine.rules import check_alloc_rule, check_scorer
from depthkv_edge.engine.stats import KVStats, read_stats
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import check_gguf, resolve_model
from depthkv_edge.units import mib

_api = llama_cpp.llama_cpp

KEY_SCORER = "depthkv.scorer"
KEY_RULE = "depthkv.rule"
KEY_SINK = "depthkv.sink_tokens"
KEY_RECENT = "depthkv.recent_tokens"

# F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, BF16: what common/arg.cpp of llama.cpp takes
_KV_TYPES = frozenset((0, 1, 2, 3, 6, 7, 8, 20, 30))

Override = bool | int | float | str


class _Closed:
    """Stands in for the parts of a model that has been closed."""

    def __init__(self, path: str):
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise DepthKVError(f"{self._path} has been closed: load it again")


class Llama(llama_cpp.Llama):
    """A `llama_cpp.Llama` whose KV cache may be smaller than its context.

    Without a budget, in the arguments or in the model file, it behaves as the base class does.

    Args:
        model_path: path of a GGUF.
        kv_budget: a fraction of the full cache in (0, 1], `"60%"`, `"96MiB"`, `"4096t"` (tokens per layer on average)
            or `"auto"` (the largest that fits free memory). None: the model's own budget, or the full cache.
        scorer: token-scoring rule: `attention`, `window`, `streaming` or `random`. None: the model's, or attention.
        rule: allocation rule: `uniform`, `proportional` or `optimal`. None: the model's, or optimal if calibrated.
        n_sink: tokens never evicted at the front of a sequence. None: the model's, or 4.
        n_recent: tokens never evicted at the end of a sequence. None: the model's, or 32.
        flash_attn: None lets the engine pick the fastest when there is a budget, and is off without one.
        kv_overrides: as in the base class; an argument above wins over its `depthkv.*` key.
        **kwargs: as in the base class.

    Raises:
        DepthKVError: the file cannot be loaded, or the budget, the scorer or the context cannot be had.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_budget: Budget | float | str | None = None,
        scorer: str | None = None,
        rule: str | None = None,
        n_sink: int | None = None,
        n_recent: int | None = None,
        flash_attn: bool | None = None,
        kv_overrides: Mapping[str, Override] | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ):
        self._stack = contextlib.ExitStack()  # the base class closes it in __del__, even when __init__ stops early
        self._flash_attn = flash_attn

        budget = None if kv_budget is None else parse_budget(kv_budget)
        _check_options(scorer, rule, n_sink, n_recent, kwargs.get("n_ctx", 512))
        _check_kwargs(kwargs)
        kwargs |= _threads(kwargs)
        check_gguf(Path(model_path) if model_path else resolve_model(""))
        if budget is not None and budget.is_auto:
            budget, kwargs["n_ubatch"] = _fit_free_memory(Path(model_path), budget, kwargs, flash_attn, scorer, rule)
            kwargs.setdefault("use_mmap", False)  # see fit.py
        capi.llama_depthkv_clear_error()
        with log.capture_errors(verbose) as lines:
            try:
                overrides = dict(kv_overrides or {})
                text = None if budget is None else budget.text
                given = {KEY_BUDGET: text, KEY_SCORER: scorer, KEY_RULE: rule, KEY_SINK: n_sink, KEY_RECENT: n_recent}
                overrides |= {key: value for key, value in given.items() if value is not None}
                super().__init__(
                    os.fspath(model_path),
                    kv_overrides=overrides or None,
                    flash_attn=bool(flash_attn),
                    verbose=verbose,
                    **kwargs,
                )
            except DepthKVError:
                raise
            except (ValueError, RuntimeError) as error:
                reason = log.reason(lines, model_path) or str(error)
                raise DepthKVError(f"{model_path}: {reason}") from error
            except MemoryError as error:  # the buffers of the base class
                raise DepthKVError(
                    f"{model_path}: out of memory ({error}): give a smaller context or KV budget"
                ) from error
        if len(self.input_ids) < self.n_ctx():
            # the engine rounds a context up, the base class keeps what was asked for
            self.input_ids = np.zeros(self.n_ctx(), np.intc)
        if kwargs.get("seed") is not None:
            self.set_seed(kwargs["seed"])  # the base class takes 0 for none

    # The base class loads the model and creates the context in one __init__, with no hook between them. It stores the
    # model in `_model` in between, when the context's parameters are already filled in: the one place where they can
    # still be changed, and the first where the model file's own budget is known. Replacing the class that creates the
    # context, the alternative, would change it for every other `llama_cpp.Llama` of the process.
    @property
    def _model(self) -> Any:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        if self.model_params.vocab_only:
            return
        params = self.context_params
        try:
            plan = plan_params(model.model, params, capi.llama_depthkv_default_params())
        except DepthKVError as error:
            raise DepthKVError(f"{self.model_path}: {error}") from None
        if self._flash_attn is None:
            params.flash_attn_type = default_flash_attn(plan.kv.active, params.type_v)
        self._check_memory(plan.kv.bytes)

    def _check_memory(self, n_bytes: int) -> None:
        """Refuse at once what cannot be there; the engine would first set up and clear what it can get."""
        if self.model_params.n_gpu_layers and any(device.is_gpu for device in devices()):
            return
        total = psutil.virtual_memory().total
        if n_bytes > total:
            raise DepthKVError(
                f"{self.model_path}: the KV cache takes {mib(n_bytes)} MiB, and this machine has {mib(total)} MiB of "
                "memory: give a smaller context or KV budget"
            )

    # what the rest of the package needs of the base class's own parts

    @property
    def vocab(self) -> Any:
        """The `llama_vocab` of the model, for functions of llama.h."""
        return self._model.vocab

    def is_end(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return bool(llama_cpp.llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def make_sampler(self, temperature: float) -> Callable[[], int]:
        """Samples the next token. 0 is greedy; above it, top-k, top-p and min-p are what llama.cpp has by default."""
        sampler = self._init_sampler(temp=temperature)
        return lambda: sampler.sample(self._ctx, -1)

    @property
    def history(self) -> np.ndarray:
        """int32 [n_tokens] tokens of sequence 0, whether a layer still holds them or not."""
        return self.input_ids[: self.n_tokens]

    def forget(self, p0: int, p1: int) -> bool:
        """Remove the positions [p0, p1) of sequence 0, and move what follows up. False, and nothing done: refused."""
        memory = llama_cpp.llama_cpp.llama_get_memory(self.ctx)
        n, n_removed = self.n_tokens, p1 - p0
        if not llama_cpp.llama_cpp.llama_memory_seq_rm(memory, 0, p0, p1):
            return False
        llama_cpp.llama_cpp.llama_memory_seq_add(memory, 0, p1, -1, -n_removed)
        self.input_ids[p0 : n - n_removed] = self.input_ids[p1:n].copy()
        self.n_tokens = n - n_removed
        return True

    def kv_stats(self, seq_id: int = 0) -> KVStats:
        """What the KV cache holds, with the occupancy of one sequence.

        Raises:
            DepthKVError: there is no such sequence, or the model has been closed.
        """
        return read_stats(self.ctx, self._check_sequence(seq_id))

    def kv_positions(self, layer: int, seq_id: int = 0) -> list[int]:
        """Positions that the `layer`-th of `kv_stats().layers` holds for a sequence, ascending.

        Raises:
            DepthKVError: there is no such layer or sequence, or the model has been closed.
        """
        n = self.n_ctx()
        positions = (_api.llama_pos * n)()
        held = capi.llama_depthkv_get_positions(
            self.ctx, check_number("layer", layer), self._check_sequence(seq_id), positions, n
        )
        if held < 0:
            raise DepthKVError(capi.last_error() or f"KV layer {layer} does not exist")
        return list(positions[: min(held, n)])

    def pin(self, p0: int, p1: int, seq_id: int = 0) -> None:
        """Never evict positions [p0, p1) of a sequence. Removing the tokens removes the pin.

        Raises:
            DepthKVError: the pinned tokens would leave no room for the recent window and 32 tokens more, a position or
                the sequence does not exist, or the model has been closed.
        """
        begin, end = (check_number(name, p, -1) for name, p in (("p0", p0), ("p1", p1)))
        if not capi.llama_depthkv_pin(self.ctx, self._check_sequence(seq_id), begin, end):
            raise DepthKVError(capi.last_error() or f"positions {p0} to {p1} cannot be pinned: give a larger KV budget")

    def unpin(self, seq_id: int = 0) -> None:
        """Let every pinned position of a sequence be evicted again.

        Raises:
            DepthKVError: there is no such sequence, or the model has been closed.
        """
        capi.llama_depthkv_unpin(self.ctx, self._check_sequence(seq_id))

    def rollback(self, n_tokens: int) -> int:
        """Go back to the first `n_tokens` tokens of the context, or as little further as the KV cache can.

        What a layer has evicted since then does not come back, so the context may have to go back to where nothing is
        missing. Without evictions since then, that is never further than asked.

        Returns:
            how many tokens are left: `eval` the others again. `kv_stats().n_reeval` counts them.

        Raises:
            DepthKVError: the context has fewer tokens, or the model has been closed.
        """
        left = self._go_back(check_number("n_tokens", n_tokens, 0, self.n_tokens))
        if left < self.n_tokens:
            self.n_tokens = left
            self._requires_eval = True
        return left

    def eval(self, tokens: Sequence[int]) -> None:
        """As in the base class. Where a caller has set `n_tokens` back, what the cache lacks is evaluated again too."""
        n = self.n_tokens
        left = self._go_back(n)  # the base class removes what comes after n, and does not ask whether that was refused
        if left < n:
            tokens = [*self.input_ids[left:n].tolist(), *tokens]
            self.n_tokens = left
        super().eval(tokens)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As in the base class. Of a prefix that is in the context already, what the cache lacks is evaluated again."""
        tokens = list(tokens)
        given = inspect.signature(super().generate).bind(tokens, *args, **kwargs).arguments
        if given.get("reset", True):
            differ = [i for i, (a, b) in enumerate(zip(self._input_ids, tokens, strict=False)) if a != b]
            n = differ[0] if differ else min(self.n_tokens, len(tokens))
            if n == len(tokens) and (n < self.n_tokens or self._requires_eval):
                n -= 1  # the last token of a prompt is always evaluated
            self.rollback(max(0, n))
        yield from super().generate(tokens, *args, **kwargs)

    def _go_back(self, n_tokens: int) -> int:
        left = capi.llama_depthkv_seq_rollback(self.ctx, 0, n_tokens)
        if left < 0:
            raise DepthKVError(capi.last_error() or f"the context cannot go back to {n_tokens} tokens")
        return left

    def close(self) -> None:
        """Free the model. What is asked of it later is refused, where the base class reads memory that is gone."""
        super().close()
        gone = _Closed(getattr(self, "model_path", "the model"))
        for name in ("_model", "_ctx", "_batch", "tokenizer_"):
            if name in self.__dict__:
                self.__dict__[name] = gone

    def _check_sequence(self, seq_id: int) -> int:
        return check_number("sequence", seq_id, 0, _api.llama_n_seq_max(self.ctx) - 1)

    def __getstate__(self) -> dict[str, Any]:
        # the base class rebuilds from the context's parameters, where the engine's own choices no longer show as such
        return super().__getstate__() | {"flash_attn": self._flash_attn}


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    for name, least in (("n_batch", 1), ("n_ubatch", 1)):
        if name in kwargs:
            check_number(name, kwargs[name], least)
    for name in ("n_threads", "n_threads_batch"):
        if kwargs.get(name) not in (None, 0):  # which are for `_threads` to choose
            check_threads(name, kwargs[name])
    for name in ("type_k", "type_v"):
        if kwargs.get(name) is not None and check_number(name, kwargs[name]) not in _KV_TYPES:
            known = ", ".join(str(number) for number in sorted(_KV_TYPES))
            raise DepthKVError(f"{name} {kwargs[name]} is no type of a KV cache: give one of {known} (enum ggml_type)")


def _threads(kwargs: Mapping[str, Any]) -> dict[str, int]:
    """What was asked for, or what the base class would take, as far as the engine has room for it."""
    cores = os.cpu_count() or 1
    own = {"n_threads": max(cores // 2, 1), "n_threads_batch": cores}
    return {name: kwargs.get(name) or min(MAX_THREADS, number) for name, number in own.items()}


def _check_options(scorer: str | None, rule: str | None, n_sink: int | None, n_recent: int | None, n_ctx: int) -> None:
    if scorer is not None:
        check_scorer(scorer)
    if rule is not None:
        check_alloc_rule(rule)
    for name, value in (("n_sink", n_sink), ("n_recent", n_recent)):
        if value is not None:
            check_number(name, value)
    check_number("n_ctx", n_ctx)


def _fit_free_memory(
    path: Path, auto: Budget, kwargs: Mapping[str, Any], flash_attn: bool | None, scorer: str | None, rule: str | None
) -> tuple[Budget, int]:
    """Budget and ubatch for the context that was asked for."""
    from depthkv_edge.measure.facts import trained_ctx
    from depthkv_edge.sizing.fit import fit_memory, free_memory  # what most uses of the package do without

    n_batch = kwargs.get("n_batch", 512)
    options = Options(
        n_batch=n_batch,
        n_ubatch=min(n_batch, kwargs.get("n_ubatch", 512)),
        type_k=Options.type_k if kwargs.get("type_k") is None else kwargs["type_k"],
        type_v=Options.type_v if kwargs.get("type_v") is None else kwargs["type_v"],
        flash_attn=flash_attn_type(flash_attn),
        swa_full=kwargs.get("swa_full"),
        scorer=scorer,
        rule=rule,
        offload_kqv=kwargs.get("offload_kqv", True),
    )
    offload = Offload(
        n_gpu_layers=kwargs.get("n_gpu_layers", 0),
        split_mode=kwargs.get("split_mode"),
        main_gpu=kwargs.get("main_gpu"),
        tensor_split=tuple(kwargs.get("tensor_split") or ()),
    )
    n_ctx = kwargs.get("n_ctx", 512) or trained_ctx(path)
    fit = fit_memory(path, free_memory(), n_ctx, auto, options=options, offload=offload)
    return parse_budget(fit.kv_budget), fit.n_ubatch
