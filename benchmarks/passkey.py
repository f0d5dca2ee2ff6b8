"""Passkey retrieval: a number hidden in a long text, asked for after it (arXiv 2305.16300).

The answer's log-probability is reported beside the exact match: small models miss by a digit.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.kl import Setting, decode, open_context, tokenize
from depthkv_edge import _log
from depthkv_edge._native import llama_cpp

_api = llama_cpp.llama_cpp

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass
class Retrieval:
    """Answers of one context.

    Attributes:
        log_prob: [n] summed log-probability of the answer's tokens, in nats.
        exact: [n] whether each token of the answer is the most likely one.
    """

    log_prob: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        return {
            "log_prob": float(np.mean(self.log_prob)),
            "log_prob_se": float(np.std(self.log_prob, ddof=1) / len(self.log_prob) ** 0.5),
            "exact": float(np.mean(self.exact)),
            "n": len(self.exact),
        }


def passkey(
    model: int,
    haystack: str,
    settings: dict[str, Setting],
    *,
    n_ctx: int,
    n_positions: int,
    n_threads: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Retrieval]:
    """Ask every context for a key at positions spread evenly over the haystack, the question after all of it.

    What comes before the key is computed once: the state before it is saved, and restored for the next position.

    Args:
        haystack: longer than the context.
        on_step: called after each position of each context.
    """
    rng = random.Random(seed)
    keys = [str(rng.randrange(10000, 100000)) for _ in range(n_positions)]
    question = tokenize(model, QUESTION)
    room = n_ctx - len(question) - len(tokenize(model, NEEDLE.format(key=keys[0]))) - 16
    filler = tokenize(model, haystack[: 12 * n_ctx])[:room]
    if len(filler) < room:
        raise ValueError(f"the haystack has {len(filler)} tokens, {room} are needed: give a longer one")
    depths = [round(room * (i + 0.5) / n_positions) for i in range(n_positions)]
    result = {name: Retrieval() for name in settings}
    for name, setting in settings.items():
        with contextlib.ExitStack() as stack, _log.capture_errors(False):
            context = open_context(stack, model, n_ctx, setting, n_threads)
            done = 0
            for key, depth in zip(keys, depths, strict=True):
                at = _feed(context, filler[done:depth], done)
                done = depth
                state = _save(context)
                at = _feed(context, tokenize(model, NEEDLE.format(key=key)), at)
                at = _feed(context, filler[depth:], at)
                answer = tokenize(model, f" {key}")
                logits = decode(context, question + answer, at, True)
                assert logits is not None
                logits = logits[len(question) - 1 : -1]
                result[name].log_prob.append(float(logits[np.arange(len(answer)), answer].sum()))
                result[name].exact.append(bool((logits.argmax(axis=1) == answer).all()))
                _restore(context, state)
                on_step()
    return result


def _feed(context: int, tokens: list[int], at: int, chunk: int = 256) -> int:
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        decode(context, part, at, False)
        at += len(part)
    return at


def _save(context: int) -> np.ndarray:
    size = _api.llama_state_seq_get_size(context, 0)
    state = np.empty(size, np.uint8)
    pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if _api.llama_state_seq_get_data(context, pointer, size, 0) == 0:
        raise RuntimeError("the state of the context cannot be saved")
    return state


def _restore(context: int, state: np.ndarray) -> None:
    pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if _api.llama_state_seq_set_data(context, pointer, len(state), 0) == 0:
        raise RuntimeError("the state of the context cannot be restored")
