"""Prefill a prompt, decode an answer, and account for both."""

from __future__ import annotations

import codecs
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from depthkv_edge.chat.template import Prompt
from depthkv_edge.engine import log
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.stats import KVStats
from depthkv_edge.errors import DepthKVError
from depthkv_edge.llama import Llama
from depthkv_edge.memory import peak_rss_bytes

_api = llama_cpp.llama_cpp


@dataclass(frozen=True)
class Timings:
    """Tokens per second; None where there were too few tokens to tell."""

    prefill_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class RunResult:
    """One prompt answered."""

    text: str
    tokens_prompt: int
    tokens_generated: int
    kv: KVStats
    peak_rss_bytes: int
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "text": self.text,
            "kv": self.kv.summary(),
            "tokens_prompt": self.tokens_prompt,
            "tokens_generated": self.tokens_generated,
            "peak_rss_bytes": self.peak_rss_bytes,
            "timings": asdict(self.timings),
        }


def answer(
    llama: Llama,
    prompt: Prompt,
    n_predict: int,
    *,
    temperature: float = 0.0,
    on_prefill: Callable[[int], None] = lambda n: None,
    on_text: Callable[[str], None] = lambda text: None,
) -> RunResult:
    """Prefill a prompt into an empty context and decode until the model ends its turn, or a limit is reached.

    Args:
        prompt: fits the context with at least one token to spare.
        n_predict: most tokens to decode; the end of the context also ends the answer.
        temperature: 0 is greedy.
        on_prefill: called with the number of prompt tokens computed since the last call.
        on_text: called with each piece of text as it is decoded.

    Raises:
        DepthKVError: the prompt does not fit, the system prompt cannot be pinned, or the engine fails.
    """
    check_fit(llama, prompt)
    with log.capture_errors(llama.verbose) as lines:
        try:
            return _answer(llama, prompt, n_predict, temperature, on_prefill, on_text)
        except RuntimeError as error:  # what the bindings make of a failed llama_decode
            raise DepthKVError(log.reason(lines) or str(error)) from error


def check_fit(llama: Llama, prompt: Prompt) -> None:
    """Check that a prompt leaves room in the context for an answer.

    Raises:
        DepthKVError: it does not; the message names both lengths, in tokens.
    """
    n_ctx, n_prompt = llama.n_ctx(), len(prompt.tokens)
    if n_prompt == 0:
        raise DepthKVError("the prompt is empty: give a document or a question")
    if n_prompt >= n_ctx:
        raise DepthKVError(
            f"the document is longer than the context: {n_prompt} tokens with its question and template, "
            f"{n_ctx} tokens of context; give a larger context or a shorter document"
        )


def _answer(
    llama: Llama,
    prompt: Prompt,
    n_predict: int,
    temperature: float,
    on_prefill: Callable[[int], None],
    on_text: Callable[[str], None],
) -> RunResult:
    started = time.perf_counter()
    _prefill(llama, prompt, on_prefill)
    # the last prompt token is left to the decoding loop, which needs its logits
    room = min(n_predict, llama.n_ctx() - len(prompt.tokens))
    first = last = None
    text: list[str] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in the middle of a character
    n_generated = 0

    def put(piece: bytes, final: bool = False) -> None:
        if part := decoder.decode(piece, final):
            text.append(part)
            on_text(part)

    for token in _decode(llama, prompt.tokens[-1], temperature):
        last = time.perf_counter()
        if first is None:
            first = last
            on_prefill(1)
        if llama.is_end(token):
            break
        n_generated += 1
        put(token_bytes(llama, token))
        if n_generated >= room:
            break
    put(b"", final=True)
    assert first is not None and last is not None
    return RunResult(
        text="".join(text),
        tokens_prompt=len(prompt.tokens),
        tokens_generated=n_generated,
        kv=llama.kv_stats(),
        peak_rss_bytes=peak_rss_bytes(),
        timings=Timings(
            prefill_tps=len(prompt.tokens) / (first - started),
            # n tokens, the first of which came out of the prefill
            decode_tps=(n_generated - 1) / (last - first) if n_generated > 1 else None,
        ),
    )


def _prefill(llama: Llama, prompt: Prompt, on_prefill: Callable[[int], None]) -> None:
    llama.reset()
    tokens, done = prompt.tokens[:-1], 0
    if 0 < prompt.n_system <= len(tokens):
        # Evaluating from an empty context removes all of the sequence first, pins included: so the system prompt goes
        # in alone, and is pinned before anything can push it out.
        llama.eval(tokens[: prompt.n_system])
        llama.pin(0, prompt.n_system)
        done = prompt.n_system
        on_prefill(done)
    while done < len(tokens):
        chunk = tokens[done : done + llama.n_batch]
        llama.eval(chunk)
        done += len(chunk)
        on_prefill(len(chunk))


def _decode(llama: Llama, token: int, temperature: float) -> Iterator[int]:
    # reset=False: continue from what is in the context, with no search for a common prefix
    return llama.generate([token], temp=temperature, reset=False)


def token_bytes(llama: Llama, token: int) -> bytes:
    """UTF-8 bytes of one token; control tokens have none."""
    # the bindings' own detokenize() cuts a token of more than 32 bytes
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = _api.llama_token_to_piece(llama.vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
