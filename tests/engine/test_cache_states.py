"""Random orders of calls on the memory of a context: what each layer holds, what may be taken back, and what comes out.

Beside the cache with a budget runs a stock one with the same calls. DEPTHKV_SEQUENCES says how many orders are tried.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.cache_model import Sequence
from support.tiny import N_VOCAB, write_llama

from benchmarks.zoo.shapes import Shape
from benchmarks.zoo.write import write_model
from depthkv_edge.engine import capi, log
from depthkv_edge.engine.capi import llama_cpp

api = llama_cpp.llama_cpp

N_CTX, N_UBATCH, N_SINK, N_RECENT, N_SWA = 256, 8, 2, 5, 48
N_SEQUENCES = int(os.environ.get("DEPTHKV_SEQUENCES", "100"))
END = -1


@dataclass(frozen=True)
class Setup:
    """A loaded model, and how its contexts are made."""

    model: Any
    n_seqs: int
    cells: tuple[int, ...]
    scorer: str
    has_windows: bool = False

    def open(self, *, stock: bool = False) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = N_CTX * self.n_seqs, 128, N_UBATCH
        params.n_seq_max, params.n_threads, params.n_threads_batch = self.n_seqs, 1, 1
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = False
        if stock:
            return api.llama_init_from_model(self.model, params)
        depth = capi.llama_depthkv_default_params()
        cells = (ctypes.c_uint32 * len(self.cells))(*self.cells)
        depth.scorer, depth.n_sink, depth.n_recent = self.scorer.encode(), N_SINK, N_RECENT
        depth.n_layers, depth.cells = len(cells), ctypes.cast(cells, ctypes.POINTER(ctypes.c_uint32))
        context = capi.llama_depthkv_init_from_model(self.model, params, depth)
        assert context, capi.last_error()
        return context


def load(path: Path) -> Any:
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), params)
    assert model
    return model


def decode(context: Any, parts: list[tuple[int, int, list[int]]]) -> int:
    """Decode parts of sequences, (sequence, position, tokens) each; logits for the last token of each."""
    batch = api.llama_batch_init(sum(len(tokens) for _, _, tokens in parts), 0, 1)
    i = 0
    for seq, begin, tokens in parts:
        for j, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, begin + j, 1
            batch.seq_id[i][0], batch.logits[i] = seq, j == len(tokens) - 1
            i += 1
    batch.n_tokens = i
    status = api.llama_decode(context, batch)
    api.llama_batch_free(batch)
    return status


def logits(context: Any, i: int) -> np.ndarray:
    return np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), shape=(vocab(context),)).copy()


def vocab(context: Any) -> int:
    return api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))


def positions(context: Any, layer: int, seq: int) -> list[int]:
    found = (api.llama_pos * N_CTX)()
    return list(found[: capi.llama_depthkv_get_positions(context, layer, seq, found, N_CTX)])


def get_state(context: Any, seq: int) -> bytes:
    size = api.llama_state_seq_get_size(context, seq)
    data = (ctypes.c_uint8 * size)()
    assert api.llama_state_seq_get_data(context, data, size, seq) == size
    return bytes(data)


class Calls(RuleBasedStateMachine):
    """Every call that moves cells, in any order."""

    setup: Setup

    @initialize()
    def begin(self) -> None:
        self.context, self.stock = self.setup.open(), self.setup.open(stock=True)
        self.memories = [api.llama_get_memory(each) for each in (self.context, self.stock)]
        self.memory = self.memories[0]
        self.sequences = [Sequence(len(self.setup.cells)) for _ in range(self.setup.n_seqs)]
        self.saved: list[tuple[bytes, bytes, Sequence]] = []
        self.name = 0

    def teardown(self) -> None:
        for each in ("context", "stock"):
            with suppress(AttributeError):
                api.llama_free(getattr(self, each))

    seqs = st.integers(0, 3)

    def pick(self, seq: int) -> int:
        return seq % self.setup.n_seqs

    # --- tokens come ------------------------------------------------------------------------------------------------

    def expect_decode(self, parts: list[tuple[int, list[int]]], *, aborted: bool = False) -> None:
        """Check what a decode has done to the layers, and note what they evicted."""
        for seq, tokens in parts:
            mine = self.sequences[seq]
            end, n_new = mine.end, len(tokens)
            before = [mine.held(layer) for layer in range(len(self.setup.cells))]
            evicted = [bool(layer) for layer in mine.evictions]
            names = range(self.name, self.name + n_new)
            self.name += n_new
            if n_new > N_UBATCH:
                mine.is_plain = False  # which ubatch has evicted is not seen from here
            protected = {*range(N_SINK), *mine.pins}
            if not aborted:
                mine.append(names)
            for layer, n_cells in enumerate(self.setup.cells):
                held = positions(self.context, layer, seq)
                gone = mine.record(layer, end, held)
                assert held == mine.held(layer)
                if mine.is_divided:
                    continue
                # a prompt of several ubatches may evict what it has brought itself, but never the last tokens
                recent = range(mine.end - N_RECENT if n_new > N_UBATCH else end - N_RECENT, mine.end)
                assert not (protected | set(recent)) & set(gone)
                if n_new <= N_UBATCH:
                    # one at a time, a layer that has evicted before does so in its turn, when it is not full yet
                    most = max(min(64, n_cells // 32), 1)
                    lacking = len(before[layer]) + n_new - n_cells
                    turn = evicted[layer] and lacking + most > 0
                    assert len(gone) <= (max(lacking, most * n_new) if lacking > 0 or turn else 0)

    def decode_parts(self, parts: list[tuple[int, list[int]]]) -> None:
        if any(len(self.sequences[seq].tokens) + len(tokens) > N_CTX for seq, tokens in parts):
            return  # after a division: the stock cache counts tokens, this one positions
        placed = [(seq, self.sequences[seq].end, tokens) for seq, tokens in parts]
        fits = all(begin - self.first(seq) + len(tokens) <= N_CTX for seq, begin, tokens in placed)
        status = decode(self.context, placed)
        assert status == (0 if fits else 1)
        if not fits:
            return
        self.expect_decode(parts)
        whole = [self.stock_is_whole(seq, begin) for seq, begin, _ in placed]
        assert decode(self.stock, placed) == 0
        at = -1
        for (seq, _, tokens), is_whole in zip(placed, whole, strict=True):
            at += len(tokens)
            mine = self.sequences[seq]
            if is_whole and not any(mine.lost(layer) for layer in range(len(self.setup.cells))):
                ours, theirs = (logits(each, at).astype(np.float64) for each in (self.context, self.stock))
                # keys are rotated in half precision, over and over
                assert np.sum((ours - theirs) ** 2) <= 5e-3 * np.sum(theirs**2), "not what stock llama.cpp says"

    def stock_is_whole(self, seq: int, end: int) -> bool:
        """The stock cache goes back to where its windows are not whole any more, or empty."""
        begin = api.llama_memory_seq_pos_min(self.memories[1], seq)
        return end == self.first(seq) or 0 <= begin <= max(self.first(seq), end - N_SWA)

    def first(self, seq: int) -> int:
        return min((p for p, _ in self.sequences[seq].tokens), default=self.sequences[seq].end)

    tokens = st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=N_UBATCH)

    @rule(seq=seqs, tokens=tokens)
    def ubatch(self, seq: int, tokens: list[int]) -> None:
        self.decode_parts([(self.pick(seq), tokens)])

    @rule(seq=seqs, n=st.integers(9, 100), token=st.integers(0, N_VOCAB - 1))
    def prompt(self, seq: int, n: int, token: int) -> None:
        self.decode_parts([(self.pick(seq), [(token + 7 * i * i) % N_VOCAB for i in range(n)])])

    @precondition(lambda self: self.setup.n_seqs > 1)
    @rule(parts=st.lists(tokens, min_size=2, max_size=4))
    def several(self, parts: list[list[int]]) -> None:
        """Sequences that share a batch."""
        self.decode_parts(list(enumerate(parts[: self.setup.n_seqs])))

    @rule(seq=seqs, tokens=tokens, n=st.integers(0, 60))
    def aborted(self, seq: int, tokens: list[int], n: int) -> None:
        """A decode that is stopped at the n-th time that the engine asks; then it is done again."""
        seq, calls = self.pick(seq), iter(range(10_000))
        begin = self.sequences[seq].end
        if max(begin - self.first(seq), len(self.sequences[seq].tokens)) + len(tokens) > N_CTX:
            return
        asked = api.ggml_abort_callback(lambda data: next(calls) == n)
        api.llama_set_abort_callback(self.context, asked, None)
        status = decode(self.context, [(seq, begin, tokens)])
        api.llama_set_abort_callback(self.context, api.ggml_abort_callback(0), None)
        assert status in (0, 2)
        if status == 2:
            self.expect_decode([(seq, tokens)], aborted=True)
            self.decode_parts([(seq, tokens)])
        else:
            self.expect_decode([(seq, tokens)])
            assert decode(self.stock, [(seq, begin, tokens)]) == 0

    @rule(seq=seqs, tokens=tokens)
    def refused(self, seq: int, tokens: list[int]) -> None:
        """Tokens that the vocabulary lacks, and positions that do not follow."""
        seq = self.pick(seq)
        end = self.sequences[seq].end
        assert decode(self.context, [(seq, end, [*tokens, 10**6])]) == -1
        if end > 0:
            assert decode(self.context, [(seq, end + 3, tokens)]) == -1

    # --- tokens go --------------------------------------------------------------------------------------------------

    def stock_rm(self, seq: int, p0: int, p1: int) -> None:
        assert api.llama_memory_seq_rm(self.memories[1], seq, p0, p1)

    @rule(seq=seqs, back=st.integers(0, 40))
    def remove_end(self, seq: int, back: int) -> None:
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p = max(0, mine.end - back)
        could = mine.could_be_fresh(p)
        told = capi.llama_depthkv_seq_pos_rollback(self.context, seq, p)
        done = api.llama_memory_seq_rm(self.memory, seq, p, END)
        assert done == (told == p)
        assert could or not done or mine.is_divided
        if mine.is_plain and not self.setup.has_windows:
            assert done == could
        if done:
            mine.rm(p, float("inf"))
            self.stock_rm(seq, p, END)

    @rule(seq=seqs, share=st.floats(0, 1))
    def go_back(self, seq: int, share: float) -> None:
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p = round(share * mine.end)
        left = capi.llama_depthkv_seq_rollback(self.context, seq, p)
        assert 0 <= left <= max(p, self.first(seq))
        assert mine.could_be_fresh(left) or mine.is_divided
        pins = {q for q in mine.pins if q < p or q >= mine.end}
        mine.rm(left, float("inf"))
        mine.pins = pins
        self.stock_rm(seq, left, END)

    @rule(seq=seqs, share=st.floats(0, 1), n=st.integers(1, 40))
    def remove_span(self, seq: int, share: float, n: int) -> None:
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p0 = round(share * mine.end)
        p1 = min(p0 + n, mine.end - 1)
        if p0 < p1:
            assert api.llama_memory_seq_rm(self.memory, seq, p0, p1)
            mine.rm(p0, p1)
            self.stock_rm(seq, p0, p1)

    @rule(seq=seqs)
    def keep(self, seq: int) -> None:
        seq = self.pick(seq)
        api.llama_memory_seq_keep(self.memory, seq)
        for other, mine in enumerate(self.sequences):
            if other != seq:
                mine.rm(0, float("inf"))
                self.stock_rm(other, -1, END)  # the stock cache has one stream in mind

    @rule(data=st.booleans())
    def clear(self, data: bool) -> None:
        for memory in self.memories:
            api.llama_memory_clear(memory, data)
        for mine in self.sequences:
            mine.clear()

    # --- tokens move ------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.setup.has_windows)
    @rule(seq=seqs, share=st.floats(0, 1), n=st.integers(1, 60))
    def shift(self, seq: int, share: float, n: int) -> None:
        """The context shift of every front end."""
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p0 = round(share * mine.end)
        p1 = min(p0 + n, mine.end - 1)
        if p0 >= p1:
            return
        for memory in self.memories:
            assert api.llama_memory_seq_rm(memory, seq, p0, p1)
            api.llama_memory_seq_add(memory, seq, p1, END, p0 - p1)
        mine.rm(p0, p1)
        mine.add(p1, float("inf"), p0 - p1)

    @precondition(lambda self: not self.setup.has_windows)
    @rule(seq=seqs, share=st.floats(0, 1), n=st.integers(1, 20))
    def make_a_gap(self, seq: int, share: float, n: int) -> None:
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p0 = round(share * mine.end)
        for memory in self.memories:
            api.llama_memory_seq_add(memory, seq, p0, END, n)
        mine.add(p0, float("inf"), n)

    @precondition(lambda self: not self.setup.has_windows)
    @rule(seq=seqs, by=st.integers(2, 4))
    def divide(self, seq: int, by: int) -> None:
        seq = self.pick(seq)
        for memory in self.memories:
            api.llama_memory_seq_div(memory, seq, 0, END, by)
        self.sequences[seq].div(0, float("inf"), by)

    @precondition(lambda self: self.setup.n_seqs > 1)
    @rule(source=seqs, to=seqs, share=st.floats(0, 1), whole=st.booleans())
    def copy(self, source: int, to: int, share: float, whole: bool) -> None:
        source, target = self.pick(source), self.pick(to)
        if source == target:
            return
        mine = self.sequences[source].copy()
        p = mine.end if whole else round(share * mine.end)
        api.llama_memory_seq_cp(self.memory, source, target, 0, END if whole else p)
        end = api.llama_memory_seq_pos_max(self.memory, target) + 1
        assert end <= p
        assert mine.could_be_fresh(end) or mine.is_divided
        if p < mine.end:
            mine.pins = {q for q in mine.pins if q < end}
        mine.rm(end, float("inf"))
        self.sequences[target] = mine
        self.set_state(self.stock, target, get_state(self.stock, source))  # a copy between streams waits for a decode
        self.stock_rm(target, end, END)

    # --- what stays -------------------------------------------------------------------------------------------------

    @rule(seq=seqs, share=st.floats(0, 1.2), n=st.integers(1, 8))
    def pin(self, seq: int, share: float, n: int) -> None:
        seq = self.pick(seq)
        mine = self.sequences[seq]
        p0 = round(share * mine.end)
        wanted = mine.pins | set(range(p0, p0 + n))
        safe = N_SINK + len(wanted - set(range(N_SINK))) + N_RECENT + N_UBATCH
        done = capi.llama_depthkv_pin(self.context, seq, p0, p0 + n)
        assert done == (safe <= min(self.setup.cells))
        if done:
            mine.pins = wanted

    @rule(seq=seqs)
    def unpin(self, seq: int) -> None:
        seq = self.pick(seq)
        capi.llama_depthkv_unpin(self.context, seq)
        self.sequences[seq].pins = set()

    @rule(seq=seqs)
    def save(self, seq: int) -> None:
        seq = self.pick(seq)
        states = (get_state(context, seq) for context in (self.context, self.stock))
        self.saved.append((*states, self.sequences[seq].copy()))

    @precondition(lambda self: getattr(self, "saved", None))
    @rule(seq=seqs, which=st.integers(0, 100))
    def restore(self, seq: int, which: int) -> None:
        seq = self.pick(seq)
        ours, theirs, mine = self.saved[which % len(self.saved)]
        self.set_state(self.context, seq, ours)
        self.set_state(self.stock, seq, theirs)
        self.sequences[seq] = mine.copy()

    def set_state(self, context: Any, seq: int, data: bytes) -> None:
        if context == self.stock:
            self.stock_rm(seq, -1, END)  # an empty state empties nothing there
        raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        assert api.llama_state_seq_set_data(context, raw, len(data), seq) == len(data)

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def layers_hold_what_they_should(self) -> None:
        for seq, mine in enumerate(getattr(self, "sequences", [])):
            assert api.llama_memory_seq_pos_max(self.memory, seq) == mine.end - 1
            if not self.setup.has_windows:
                assert api.llama_memory_seq_pos_min(self.memory, seq) == (self.first(seq) if mine.tokens else -1)
            for layer, n_cells in enumerate(self.setup.cells):
                held = positions(self.context, layer, seq)
                assert held == mine.held(layer)
                assert len(held) <= n_cells


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_llama(tmp_path_factory.mktemp("states") / "plain.gguf"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shape = Shape("windows", "gemma3", 4, 64, 2, 1, 32, N_CTX, n_swa=N_SWA, swa_period=2)
    return load(write_model(tmp_path_factory.mktemp("states") / "windows.gguf", shape, n_layers=4))


@pytest.mark.parametrize("scorer", ["attention", "streaming"])
@pytest.mark.parametrize("n_seqs", [1, 4])
def test_a_plain_model(plain: Any, n_seqs: int, scorer: str) -> None:
    run(Setup(plain, n_seqs, (32, 64), scorer))


def test_sliding_windows(windows: Any) -> None:
    run(Setup(windows, 2, (64, 32), "attention", has_windows=True))


def run(setup: Setup) -> None:
    case = type("TheseCalls", (Calls,), {"setup": setup})
    options = settings(
        max_examples=N_SEQUENCES,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    with log.capture_errors(False):  # some thousand contexts have much to say
        run_state_machine_as_test(case, settings=options)
