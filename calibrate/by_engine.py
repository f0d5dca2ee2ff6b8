"""A calibration on the device: the engine measures the GGUF, where there is no full-precision model and no torch."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from depthkv_edge import __version__
from depthkv_edge.assets import MODELS
from depthkv_edge.calibrate.calibrate_settings import (
    AVERAGE_SECONDS,
    ENGINE,
    EXACT,
    N_HELD_OUT,
    RECALL,
    CalibrateSettings,
    not_finite,
)
from depthkv_edge.calibrate.corpus import Corpus, WindowTokens, build_corpus
from depthkv_edge.calibrate.curves import Curves, build_curves
from depthkv_edge.calibrate.engine_measurement import forget, measure
from depthkv_edge.calibrate.engine_window import open_engine_window
from depthkv_edge.calibrate.heldout import DEFAULT_RULE, UNIFORM, HeldOut
from depthkv_edge.calibrate.layer_cells import allocate
from depthkv_edge.calibrate.outcome import Outcome, Say, make_calibration
from depthkv_edge.calibrate.state import SavedState, fingerprint
from depthkv_edge.checks import default_threads
from depthkv_edge.engine import capi
from depthkv_edge.engine.context import trained_ctx
from depthkv_edge.engine.model import Model, load_model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.interrupt import interruptible
from depthkv_edge.measure.progress import progress
from depthkv_edge.modelfile.f32 import write_f32
from depthkv_edge.modelfile.keys import read_budget
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.modelfile.reader import block_count, open_gguf
from depthkv_edge.modelfile.writer import check_writable, write_calibrated

# most bytes of F32 weights that a small model is measured with: no rounding hides what its layers lose, and it is as
# fast. A larger one takes four times as long so, and more memory than a device has
_F32_BYTES = 2 * 1024**3


def calibrate_with_engine(
    settings: CalibrateSettings,
    say: Say = lambda text: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Measure a GGUF with the engine, and write the calibrated copy of it or of another GGUF of the same model.

    Args:
        say: told a line about what a user may want to know.
        on_outcome: called when the file is written, and before what was measured is forgotten: if it fails, the same
            command need not measure again.

    Raises:
        DepthKVError: anything that a user can get wrong, found before the long work wherever that is possible.
    """
    settings.check()
    _check_options(settings)
    measured = _measured_file(settings)
    gguf = resolve_model(str(settings.gguf)) if settings.gguf else measured
    check_writable(gguf, settings.output)
    budget = read_budget(gguf)  # a default budget that the user has put into the file is not ours to drop
    if not gguf.samefile(measured):
        _check_same_model(measured, gguf)
    with _weights(measured, say) as path, load_model(path, default_threads()) as model, interruptible(model.stopping):
        outcome, state = _calibrate(settings, model, measured, gguf, budget, say)
    on_outcome(outcome)
    forget(state)
    return outcome


def _calibrate(
    settings: CalibrateSettings, model: Model, measured: Path, gguf: Path, budget: float | None, say: Say
) -> tuple[Outcome, SavedState]:
    n_layers = model.n_layers
    if n_layers < 0:
        raise DepthKVError(capi.last_error())
    if n_layers == 0:
        raise DepthKVError(f"{measured}: all layers have a sliding window, their cache is bounded already")
    n_ctx = trained_ctx(model.handle)
    if settings.window_tokens > n_ctx:
        raise DepthKVError(
            f"--window-tokens {settings.window_tokens} is longer than the context of the model: give at most {n_ctx}"
        )
    layer_ids = tuple(capi.llama_depthkv_layer_id(model.handle, i) for i in range(n_layers))
    allocate(UNIFORM, settings.window_tokens, (), np.empty((n_layers, 0)))  # the budget of the check is above the floor
    corpus = build_corpus(
        settings.corpus,
        model.tokenize,
        model.bos[0] if model.bos else None,
        n_windows=settings.windows,
        n_held_out=N_HELD_OUT,
        window_tokens=settings.window_tokens,
        seed=settings.seed,
        n_recall=settings.recall,
    )
    state = SavedState(settings.output, _fingerprint(settings, measured, model, corpus))
    if len(state):
        say(f"going on where an interrupted calibration was: {len(state)} measurements are there")
    elif state.stale:
        say("an earlier calibration was interrupted, with other settings: starting over")
    started = time.perf_counter()
    found = measure(settings, model, corpus, state)
    seconds = {ENGINE: time.perf_counter() - started}
    curves = build_curves(found[ENGINE], [window.text for window in corpus.windows], found.get(RECALL))
    held_out = _check(settings, model, corpus, curves)
    calibration = make_calibration(settings, layer_ids, corpus, curves, held_out, ENGINE, budget)
    write_calibrated(gguf, settings.output, calibration)
    outcome = Outcome(
        calibration, held_out, found[ENGINE], settings.output, seconds=seconds, recall=found.get(RECALL)
    )
    return outcome, state


def _check_options(settings: CalibrateSettings) -> None:
    if settings.device != "cpu":
        raise DepthKVError(
            f"--device {settings.device}: the engine measures on the CPU; leave it out, or install torch"
        )
    if settings.dtype != "float32":
        raise DepthKVError(
            f"--dtype {settings.dtype}: the engine measures the weights as the GGUF has them; leave it out, or give a "
            f"GGUF of that type as HF_MODEL and the one to calibrate with --gguf"
        )


def _measured_file(settings: CalibrateSettings) -> Path:
    path = Path(settings.model)
    if settings.model not in MODELS and not path.is_file() and path.suffix != ".gguf":
        raise DepthKVError(f"model {settings.model} is no GGUF, which the engine measures: give one, or install torch")
    return resolve_model(settings.model)


def _check_same_model(measured: Path, gguf: Path) -> None:
    """As far as their keys tell."""
    a, b = open_gguf(measured), open_gguf(gguf)
    names = [{tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors} for reader in (a, b)]
    if block_count(a) != block_count(b) or names[0] != names[1]:
        raise DepthKVError(f"{gguf} is not the model of {measured}: their tensors differ in name or shape")


@contextlib.contextmanager
def _weights(measured: Path, say: Say) -> Iterator[Path]:
    """The file to load: a copy with F32 weights, for as long as it is used, or the file as it is."""
    n_bytes = sum(4 * int(tensor.n_elements) for tensor in open_gguf(measured).tensors)
    if n_bytes > _F32_BYTES:
        yield measured
        return
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="depthkv-"))
            path = Path(directory) / "f32.gguf"
            write_f32(measured, path)
        except (OSError, NotImplementedError) as error:  # no room, or a type that gguf-py cannot read
            why = getattr(error, "strerror", None) or str(error)
            say(f"measuring the weights as they are: no F32 copy in {tempfile.gettempdir()}: {why}")
            path = measured
        yield path


def _fingerprint(settings: CalibrateSettings, measured: Path, model: Model, corpus: Corpus) -> str:
    stat = measured.stat()
    facts = {
        "file": [str(measured.resolve()), stat.st_size, stat.st_mtime_ns],
        "f32": model.path != measured,
        "settings": [
            getattr(settings, name) for name in ("windows", "recall", "window_tokens", "scorer", "seed", "ratios")
        ],
        "windows": [window.tokens for window in (*corpus.windows, *corpus.recall)],
        "cells": [plan.cells for plan in settings.plans(1)],
    }
    return fingerprint(__version__, ENGINE, facts)


def _check(settings: CalibrateSettings, model: Model, corpus: Corpus, curves: Curves) -> HeldOut:
    """Budgets from the curves against equal ones, in the engine."""
    n_tokens = settings.window_tokens
    plans = [allocate(rule, n_tokens, settings.ratios, curves.sensitivity) for rule in (UNIFORM, DEFAULT_RULE)]
    n_windows = len(corpus.held_out) + len(corpus.held_out_recall)
    with progress("checking", n_windows * n_tokens * (1 + len(plans)), AVERAGE_SECONDS) as advance:

        def losses(window: WindowTokens) -> list[float]:
            with open_engine_window(model, window, settings.tail_tokens(EXACT), settings.scorer, advance) as opened:
                return [opened.lose_all(plan) for plan in plans]

        found = HeldOut.of(list(map(losses, corpus.held_out)), list(map(losses, corpus.held_out_recall)))
    if not np.isfinite(found.values).all():
        raise not_finite("the loss in the held-out windows", found.values, settings)
    return found
