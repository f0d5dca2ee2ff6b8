"""A calibration from beginning to end: model, corpus, measurement, curves, check, model file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from depthkv_edge import __version__
from depthkv_edge.calibrate.calibrate_settings import (
    AVERAGE_SECONDS,
    EXACT,
    FAST,
    N_HELD_OUT,
    RECALL,
    CalibrateSettings,
    not_finite,
)
from depthkv_edge.calibrate.check import check
from depthkv_edge.calibrate.corpus import Corpus, build_corpus
from depthkv_edge.calibrate.curves import Curves, build_curves, curve_correlation, layer_correlation
from depthkv_edge.calibrate.heldout import DEFAULT_RULE, UNIFORM, HeldOut
from depthkv_edge.calibrate.layer_cells import allocate
from depthkv_edge.calibrate.load import (
    Source,
    check_config,
    check_device,
    find_source,
    fingerprint_weights,
    load_model,
    load_tokenizer,
    quiet,
)
from depthkv_edge.calibrate.match import check_match
from depthkv_edge.calibrate.measurement import forget, measure
from depthkv_edge.calibrate.outcome import Outcome, Say, make_calibration
from depthkv_edge.calibrate.parallel import join_processes
from depthkv_edge.calibrate.state import SavedState, fingerprint
from depthkv_edge.calibrate.target import Target, inspect_model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.progress import progress
from depthkv_edge.modelfile.keys import read_budget
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.modelfile.writer import check_writable, write_calibrated

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate|not enough memory", re.IGNORECASE)



def calibrate(
    settings: CalibrateSettings,
    say: Say = lambda text: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome | None:
    """Measure a model and write the calibrated copy of its GGUF.

    Args:
        say: told a line about what a user may want to know.
        on_outcome: called when the file is written, and before what was measured is forgotten: if it fails, the same
            command need not measure again.

    Returns:
        The outcome; None in the processes of `accelerate launch` other than the first.

    Raises:
        DepthKVError: anything that a user can get wrong, found before the long work wherever that is possible.
    """
    settings.check()
    source = find_source(settings.model)
    gguf = resolve_model(str(settings.gguf)) if settings.gguf else source.gguf
    if gguf is None:
        raise DepthKVError(f"model {settings.model} is no GGUF: give the GGUF that was made from it with --gguf")
    processes = join_processes(settings.device)
    check_writable(gguf, settings.output)
    budget = read_budget(gguf)  # a default budget that the user has put into the file is not ours to drop
    check_device(settings.device)
    check_config(source)

    corpus = read_corpus(settings, source)
    model = load_model(source, processes.device or settings.device, settings.dtype)
    with quiet():
        target = inspect_model(model)
    config = model.config.get_text_config()
    if settings.window_tokens > (getattr(config, "max_position_embeddings", None) or math.inf):
        raise DepthKVError(
            f"--window-tokens {settings.window_tokens} is longer than the context of the model: "
            f"give at most {config.max_position_embeddings}"
        )
    if source.gguf is None or not gguf.samefile(source.gguf):
        check_match(gguf, config.num_hidden_layers, model.state_dict(), model=settings.model)
    allocate(UNIFORM, settings.window_tokens, (), np.empty((len(target.layer_ids), 0)))  # the engine's library is there

    state = SavedState(settings.output, _fingerprint(settings, target, corpus), processes.rank)
    if processes.rank == 0 and state.stale and not len(state):
        say("an earlier calibration was interrupted, with other settings: starting over")
    with _memory(settings):
        measured, seconds = measure(settings, target, corpus, processes, state, say)
    if processes.rank != 0:
        return None

    method = FAST if settings.method == FAST else EXACT
    texts = [window.text for window in corpus.windows]
    curves = build_curves(measured[method], texts, measured.get(RECALL) if settings.recall else None)
    with _memory(settings):
        held_out = _check(settings, target, corpus, curves)
    calibration = make_calibration(settings, target.layer_ids, corpus, curves, held_out, method, budget)
    write_calibrated(gguf, settings.output, calibration)
    outcome = Outcome(
        calibration,
        held_out,
        measured[method],
        settings.output,
        _agreement(measured, texts),
        seconds,
        measured.get(RECALL),
    )
    on_outcome(outcome)
    forget(settings, state)
    return outcome


def read_corpus(settings: CalibrateSettings, source: Source) -> Corpus:
    """The windows that a calibration with these settings measures and holds out.

    Raises:
        DepthKVError: a text cannot be read, or there is too little of it.
    """
    tokenizer = load_tokenizer(source)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    begins = tokenizer("a")["input_ids"][:1]
    return build_corpus(
        settings.corpus,
        tokenize,
        begins[0] if begins == [tokenizer.bos_token_id] else None,
        n_windows=settings.windows,
        n_held_out=N_HELD_OUT,
        window_tokens=settings.window_tokens,
        seed=settings.seed,
        n_recall=settings.recall,
    )


def _fingerprint(settings: CalibrateSettings, target: Target, corpus: Corpus) -> str:
    measured = {
        name: getattr(settings, name)
        for name in ("windows", "recall", "window_tokens", "scorer", "dtype", "seed", "ratios")
    }
    windows = [window.tokens for window in (*corpus.windows, *corpus.recall)]
    cells = [plan.cells for plan in settings.plans(1)]
    return fingerprint(__version__, measured, corpus.name, windows, cells, fingerprint_weights(target.model))


def _check(settings: CalibrateSettings, target: Target, corpus: Corpus, curves: Curves) -> HeldOut:
    n_tokens = settings.window_tokens
    uniform = allocate(UNIFORM, n_tokens, settings.ratios, curves.sensitivity)
    calibrated = allocate(DEFAULT_RULE, n_tokens, settings.ratios, curves.sensitivity)
    scorer = settings.scorer
    n_tail, windows, recall = settings.tail_tokens(EXACT), corpus.held_out, corpus.held_out_recall
    total = sum(n_tokens - (window.n_tail or n_tail) for window in (*windows, *recall))
    with progress("checking", total, AVERAGE_SECONDS) as advance:
        found = check(target, windows, recall, n_tail, scorer, uniform, calibrated, advance)
    if not all(map(math.isfinite, found.values)):
        raise not_finite("the loss in the held-out windows", found.values, settings)
    return found


@contextmanager
def _memory(settings: CalibrateSettings) -> Iterator[None]:
    """Turn a lack of memory into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise DepthKVError(
            f"--window-tokens {settings.window_tokens} on --device {settings.device} takes more memory than there is: "
            "give fewer tokens, or another device; with enough memory the same command goes on where this one was"
        ) from None


def _agreement(measured: dict[str, np.ndarray], texts: Sequence[int]) -> tuple[float, float] | None:
    if not {EXACT, FAST} <= measured.keys():
        return None
    a, b = (build_curves(measured[method], texts).sensitivity for method in (EXACT, FAST))
    return curve_correlation(a, b), layer_correlation(a, b)
