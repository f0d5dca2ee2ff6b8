"""A conversation that goes on when its context is full: the system prompt stays, what is old fades. No terminal here.

Tokens are computed once. A turn is what the chat template adds to the conversation (`chat.build_turn`). When no
position is left, whole old turns are removed and the rest moves up (`llama_memory_seq_rm` and `llama_memory_seq_add` of
llama.h, as in llama.cpp's own context shift): the history is neither tokenised nor computed again.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthkv_edge.chat.answer import token_bytes
from depthkv_edge.chat.template import build_opening, build_turn
from depthkv_edge.chat.turn import N_AGES, Holding, Turn
from depthkv_edge.engine import log
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.errors import DepthKVError, Stopped
from depthkv_edge.llama import Llama

_api = llama_cpp.llama_cpp


@dataclass
class _Span:
    # first position of the user's own words: what is kept when everything before this turn goes
    content: int


class Conversation:
    """The turns of one conversation, in sequence 0 of a context that nothing else uses.

    Args:
        llama: its KV cache is emptied.
        system: system prompt; it is pinned.
        temperature: 0 is greedy; above it, top-k, top-p and min-p are what llama.cpp has by default.
        n_predict: most tokens of an answer.

    Attributes:
        system: the system prompt.
        messages: all of them, with what the context has dropped.
    """

    def __init__(self, llama: Llama, system: str = "", *, temperature: float = 0.8, n_predict: int = 512):
        self.llama = llama
        self.system = system
        self.n_predict = n_predict
        self._sample = llama.make_sampler(temperature)
        self._n_ctx = llama.n_ctx()
        kv = llama.kv_stats()
        self._n_ubatch = max(1, min(llama.n_batch, kv.n_ubatch))
        self._can_shift = bool(_api.llama_memory_can_shift(self._memory))
        self.clear()

    def clear(self) -> None:
        """Forget every message. The system prompt stays, and is computed again with the next one."""
        self.messages: list[dict[str, str]] = []
        self._dropped = 0
        self._rolls = 0
        self._evaluated = 0
        self._restart()

    def _restart(self) -> None:
        self._spans: list[_Span] = []
        self._pending: list[int] = []  # the end of the last answer, sampled and not computed yet
        self._n_system = 0
        self._pinned = False
        self.llama.reset()
        _api.llama_memory_clear(self._memory, False)

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far, with those that were dropped."""
        return self._dropped + self.llama.n_tokens + len(self._pending)

    @property
    def rolls(self) -> int:
        """How often old turns were dropped by position shift."""
        return self._rolls

    @property
    def messages_in_context(self) -> list[dict[str, str]]:
        """Those that have not been dropped by position shift."""
        return self.messages[len(self.messages) - 2 * len(self._spans) :]

    @property
    def forgotten(self) -> bool:
        """Whether the context is empty though messages have been exchanged: something has failed. `replay` helps."""
        return bool(self.messages) and not self._spans

    def say(
        self,
        user: str,
        *,
        on_prefill: Callable[[int], None] = lambda n: None,
        on_text: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Answer a message.

        Args:
            on_prefill: called with the number of tokens computed since the last call, until the answer begins.
            on_text: called with each piece of the answer.
            stop: asked after each ubatch and token. What has been said until then is the answer.

        Raises:
            DepthKVError: the message does not fit the context, the system prompt cannot be pinned, the model cannot
                shift positions, or the engine fails. What has been said of the answer until then is in `messages`.
            Stopped: `stop` said so before the answer began. The conversation is as it was before the message, but for
                turns that made room for it.
        """
        if not user.strip():
            raise DepthKVError("the message is empty: say something")
        dropped, evaluated = self._dropped, self._evaluated + self._n_reeval()
        pieces: list[str] = []
        with self._engine_errors():
            n_new = self._prefill(user, [], on_prefill, stop)
            try:
                finish, n_generated = self._answer(pieces, on_text, stop)
            finally:  # an answer that fails is in the context as far as it came, with its message
                text = "".join(pieces)
                self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
        return Turn(
            text=text,
            finish=finish,
            tokens_new=n_new,
            tokens_evaluated=self._evaluated + self._n_reeval() - evaluated,
            tokens_generated=n_generated,
            tokens_dropped=self._dropped - dropped,
            kv=self.llama.kv_stats(),
        )

    def replay(
        self,
        system: str,
        messages: Sequence[dict[str, str]],
        *,
        on_prefill: Callable[[int], None] = lambda n: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Begin anew, with messages that have been exchanged before. This is the one time that they are computed again.

        An answer that would fill the context is computed only as far as it fits beside its message.

        Args:
            messages: as `check_messages` returns them.
            on_prefill: as in `say`; `replay_length` says how many tokens there are.

        Raises:
            DepthKVError: as in `say`. The context is empty then; system prompt and `messages` are as before.
            Stopped: `stop` said so. The same.
        """
        previous = self.system, self.messages
        self.system = system
        self.clear()
        try:
            for question, answer in zip(messages[::2], messages[1::2], strict=True):
                with self._engine_errors():
                    self._prefill(question["content"], self._tokens(answer["content"]), on_prefill, stop)
                self.messages += [question, answer]
        except BaseException:
            self.clear()
            self.system, self.messages = previous
            raise

    def replay_length(self, system: str, messages: Sequence[dict[str, str]]) -> int:
        """Tokens that `replay` computes, if it has to drop nothing.

        Raises:
            DepthKVError: a message does not fit the context, or the template refuses one.
        """
        n = n_system = 0
        for i, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
            prompt = (build_turn if i else build_opening)(self.llama, question["content"], system)
            if i == 0:
                n_system = prompt.n_system
            n_alone = n_system + len(prompt.tokens) - prompt.n_system
            n += len(prompt.tokens) + len(self._fitting(self._tokens(answer["content"]), n_alone))
        return n

    def holding(self) -> Holding:
        """What the KV cache holds, by layer and by age."""
        kv, n = self.llama.kv_stats(), self.llama.n_tokens
        edges = np.linspace(0, self._dropped + n, N_AGES + 1)
        sizes = np.histogram(np.arange(self._dropped + n), edges)[0] if n else np.zeros(N_AGES)
        ages = []
        for i in range(len(kv.layers)):
            positions = np.asarray(self.llama.kv_positions(i))
            # counted from the beginning of the conversation, not of the context
            positions = np.where(positions < self._n_system, positions, positions + self._dropped)
            held = np.histogram(positions, edges)[0] if n else np.zeros(N_AGES)
            ages.append([float(h / s) if s else float("nan") for h, s in zip(held, sizes, strict=True)])
        return Holding(self.tokens, n, self._n_system, self._rolls, self._pinned, ages, kv)

    def _prefill(
        self, user: str, answer: list[int], on_prefill: Callable[[int], None], stop: Callable[[], bool]
    ) -> int:
        """Compute a message, and an answer that is known already; returns how many tokens they are."""
        begin = self._continue if self._spans else self._open
        return begin(user, answer, on_prefill, stop)

    def _open(self, user: str, answer: list[int], on_prefill: Callable[[int], None], stop: Callable[[], bool]) -> int:
        prompt = build_opening(self.llama, user, self.system)
        tokens = prompt.tokens + self._fitting(answer, len(prompt.tokens))
        try:
            self._lay_out(tokens, prompt.n_system, on_prefill, stop)
        except BaseException:
            self._restart()
            raise
        self._spans.append(_Span(prompt.n_system))
        return len(tokens)

    def _lay_out(
        self, tokens: list[int], n_system: int, on_prefill: Callable[[int], None], stop: Callable[[], bool]
    ) -> None:
        """Compute tokens in an empty context: the first of them alone, and pinned before anything can push them out."""
        self.llama.reset()
        _api.llama_memory_clear(self._memory, False)
        self._eval(tokens[:n_system], on_prefill, stop)
        self._n_system = n_system
        self._pinned = self._pin(n_system)
        self._eval(tokens[n_system:], on_prefill, stop)

    def _continue(
        self, user: str, answer: list[int], on_prefill: Callable[[int], None], stop: Callable[[], bool]
    ) -> int:
        prompt = build_turn(self.llama, user, self.system)
        n_lead = prompt.n_system
        tokens = prompt.tokens + self._fitting(answer, self._n_system + len(prompt.tokens) - n_lead)
        if not self._make_room(len(self._pending) + len(tokens)):
            # nothing of the conversation can stay beside this message: it follows the system prompt directly
            self._drop_all()
            tokens, n_lead = tokens[n_lead:], 0
        begin, pending = self.llama.n_tokens, self._pending
        self._spans.append(_Span(begin + len(pending) + n_lead))
        try:
            self._eval(pending + tokens, on_prefill, stop)
        except BaseException:
            self._take_back(begin)
            self._spans.pop()
            raise
        self._pending = []
        return len(pending) + len(tokens)

    def _answer(self, pieces: list[str], on_text: Callable[[str], None], stop: Callable[[], bool]) -> tuple[str, int]:
        """Sample an answer, appending its text to `pieces`; returns why it ended, and its number of tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in the middle of a character

        def put(piece: bytes, final: bool = False) -> None:
            if part := decoder.decode(piece, final):
                pieces.append(part)
                on_text(part)

        n = 0
        while True:
            token = self._sample()
            if self.llama.is_end(token):
                finish = "stop"
                break
            n += 1
            self._pending = [token]
            put(token_bytes(self.llama, token))
            if n >= self.n_predict:
                finish = "length"
                break
            if stop():
                finish = "interrupt"
                break
            if not self._make_room(1):
                finish = "context"
                break
            self.llama.eval(self._pending)
            self._pending = []
        put(b"", final=True)
        return finish, n

    def _eval(self, tokens: list[int], on_prefill: Callable[[int], None], stop: Callable[[], bool]) -> None:
        # a ubatch at a time: the engine splits a batch like that anyway, and a stop has to wait no longer than for one
        for i in range(0, len(tokens), self._n_ubatch):
            if stop():
                raise Stopped
            chunk = tokens[i : i + self._n_ubatch]
            self.llama.eval(chunk)
            self._evaluated += len(chunk)
            on_prefill(len(chunk))

    def _pin(self, n: int) -> bool:
        if n == 0:
            return False
        try:
            self.llama.pin(0, n)
        except DepthKVError as error:
            if not self.system:  # what the template says of its own accord may go
                return False
            raise DepthKVError(
                f"the system prompt ({n} tokens) cannot be pinned: {error}; or give it as --system when the model is "
                "loaded, which makes room for it in every layer"
            ) from None
        return True

    def _make_room(self, n_new: int) -> bool:
        """Drop old turns if there is no room for so many tokens: the oldest ones that are half of what may go."""
        n = self.llama.n_tokens
        if n + n_new <= self._n_ctx:
            return True
        cuts = [span.content for span in self._spans[1:]]
        enough = [cut for cut in cuts if n - (cut - self._n_system) + n_new <= self._n_ctx]
        half = self._n_system + (n - self._n_system + 1) // 2
        for cut in [cut for cut in enough if cut >= half] or enough[-1:]:
            self._drop(cut)
            return True
        return False

    def _drop(self, cut: int) -> None:
        """Remove the positions from the system prompt to `cut`, and move the rest up."""
        llama, begin = self.llama, self._n_system
        n, n_removed = llama.n_tokens, cut - begin
        tokens = llama.history.tolist()
        # sliding windows and M-RoPE: what stays is computed once more
        if not (self._can_shift and llama.forget(begin, cut)):
            try:
                self._lay_out([*tokens[:begin], *tokens[cut:]], begin, lambda n: None, lambda: False)
            except BaseException:
                self._dropped += n - begin + len(self._pending)
                self._restart()
                raise
        self._spans = [_Span(span.content - n_removed) for span in self._spans if span.content >= cut]
        self._dropped += n_removed
        self._rolls += 1

    def _drop_all(self) -> None:
        """Remove everything behind the system prompt."""
        self._dropped += self.llama.n_tokens - self._n_system + len(self._pending)
        self._rolls += 1
        self._take_back(self._n_system)
        self._spans, self._pending = [], []

    def _n_reeval(self) -> int:
        return self.llama.kv_stats().n_reeval

    def _take_back(self, begin: int) -> None:
        """Remove the positions from `begin` on. What the cache lacks then is computed again with what comes next."""
        self.llama.n_tokens = begin

    def _tokens(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=False)

    def _fitting(self, answer: list[int], n_message: int) -> list[int]:
        """What fits of a known answer: one that ended with the context is a token longer than the context.

        Args:
            n_message: tokens of its message, with template and system prompt.

        Raises:
            DepthKVError: there is no room for the message itself.
        """
        room = self._n_ctx - 1 - n_message  # the next token to be computed needs a position too
        if room < 0:
            raise DepthKVError(
                f"the message is longer than the context: {n_message} tokens with template and system prompt, "
                f"{self._n_ctx} tokens of context; give a larger context or a shorter message"
            )
        return answer[:room]

    @property
    def _memory(self) -> Any:
        return _api.llama_get_memory(self.llama.ctx)

    @contextlib.contextmanager
    def _engine_errors(self) -> Iterator[None]:
        with log.capture_errors(self.llama.verbose) as lines:
            try:
                yield
            except RuntimeError as error:  # what the bindings make of a failed llama_decode
                raise DepthKVError(log.reason(lines) or str(error)) from error
