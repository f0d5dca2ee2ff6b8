"""A calibration from beginning to end: model, corpus, measurement, curves, check, model file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibrate import exact, fast
from calibrate.corpus import Corpus, build_corpus
from calibrate.curves import Curves, build_curves, curve_correlation, layer_correlation
from calibrate.evict import N_CELLS_MIN, N_RECENT, N_SINK
from calibrate.gguf_write import check_writable, write_calibrated
from calibrate.heldout import CHECK_BUDGET, DEFAULT_RULE, UNIFORM, HeldOut, allocate, check
from calibrate.load import Source, check_device, find_source, fingerprint_weights, load_model, load_tokenizer, quiet
from calibrate.match import check_match
from calibrate.parallel import Processes, join_processes
from calibrate.progress import progress
from calibrate.scorers import get_scorer
from calibrate.state import State, fingerprint
from calibrate.target import Target, inspect_model
from calibrate.window import Plan, prefill, run_tail
from depthkv_edge import __version__
from depthkv_edge.calibration import KEY_BUDGET, Calibration
from depthkv_edge.errors import DepthKVError
from depthkv_edge.gguf_file import open_gguf, scalar

EXACT, FAST, BOTH = "exact", "fast", "both"
METHODS = (EXACT, FAST, BOTH)
N_HELD_OUT = 2

# the share of a window over which divergence is measured: its end, where the layers have forgotten the most. A gradient
# takes in what a token does to later ones, so a shorter one is enough
_TAIL = {EXACT: 8, FAST: 12}

# for the time left, in runs of one layer: head and divergence; eviction, the change of the output and its gradient
_HEAD_COST, _FAST_COST = 6, 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What the user asks for; see the options of `depthkv-edge calibrate`."""

    model: str
    gguf: Path | None
    output: Path
    corpus: tuple[str, ...] = ()
    windows: int = 4
    window_tokens: int = 3072
    scorer: str = "attention"
    device: str = "cpu"
    dtype: str = "float32"
    method: str = EXACT
    seed: int = 0
    ratios: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.7)

    def tail_tokens(self, method: str) -> int:
        """Tokens of a window over which divergence is measured."""
        return self.window_tokens // _TAIL[method]

    def check(self) -> None:
        """Check every number.

        Raises:
            DepthKVError: one is out of range.
        """
        get_scorer(self.scorer)
        if self.windows < 1:
            raise DepthKVError(f"--windows {self.windows} is not above 0: give 1 or more")
        if not self.ratios or any(not 0 < ratio < 1 for ratio in self.ratios):
            raise DepthKVError(f"--ratios {_join(self.ratios)} are not all between 0 and 1: give some like 0.2,0.4")
        if list(self.ratios) != sorted(set(self.ratios)):
            raise DepthKVError(f"--ratios {_join(self.ratios)} do not ascend: give each once, the lowest first")
        smallest = min(*self.ratios, CHECK_BUDGET)
        if round(smallest * self.window_tokens) < N_CELLS_MIN:
            raise DepthKVError(
                f"--window-tokens {self.window_tokens} is too short: a keep ratio of {smallest:g} leaves "
                f"{round(smallest * self.window_tokens)} cells of {N_CELLS_MIN} that a layer needs; give at least "
                f"{math.ceil(N_CELLS_MIN / smallest)}"
            )

    def plans(self, n_layers: int) -> list[Plan]:
        """Every layer at the same keep ratio, for each ratio: only one layer of a plan is pruned at a time."""
        return [Plan((round(ratio * self.window_tokens),) * n_layers) for ratio in self.ratios]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out.

    Attributes:
        calibration: as written.
        held_out: the check on windows that were not measured.
        measured: [W, L, R] nats per token, of every window.
        agreement: Spearman correlation of `fast` with `exact` over (all points, layers), if both were measured.
    """

    calibration: Calibration
    held_out: HeldOut
    measured: np.ndarray
    output: Path
    agreement: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        c = self.calibration
        return {
            "output": str(self.output),
            "model": c.model,
            "corpus": c.corpus,
            "method": c.method,
            "scorer": c.scorer,
            "windows": c.windows,
            "window_tokens": c.window_tokens,
            "tokens": c.tokens,
            "layer_ids": list(c.layer_ids),
            "keep_ratios": list(c.keep_ratios),
            "sensitivity": c.sensitivity.tolist(),
            "sensitivity_se": c.sensitivity_se.tolist(),
            "stability": _number(c.stability),
            "rule": c.rule,
            "held_out": asdict(self.held_out) | {"budget": CHECK_BUDGET, "gain": _number(self.held_out.gain)},
            "fast_agreement": None if self.agreement is None else [_number(x) for x in self.agreement],
        }


def calibrate(settings: Settings, say: Say = lambda text: None) -> Outcome | None:
    """Measure a model and write the calibrated copy of its GGUF.

    Args:
        say: told a line about what a user may want to know.

    Returns:
        The outcome; None in the processes of `accelerate launch` other than the first.

    Raises:
        DepthKVError: anything that a user can get wrong, found before the long work wherever that is possible.
    """
    settings.check()
    source = find_source(settings.model)
    gguf = settings.gguf or source.gguf
    if gguf is None:
        raise DepthKVError(f"model {settings.model} is no GGUF: give the GGUF that was made from it with --gguf")
    processes = join_processes(settings.device)
    check_writable(gguf, settings.output)
    check_device(settings.device)

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

    state = State(settings.output, _fingerprint(settings, target, corpus), processes.rank)
    if processes.rank == 0 and state.stale and not len(state):
        say("an earlier calibration was interrupted, with other settings: starting over")
    measured = _measure(settings, target, corpus, processes, state, say)
    if processes.rank != 0:
        return None

    method = FAST if settings.method == FAST else EXACT
    texts = [window.text for window in corpus.windows]
    curves = build_curves(measured[method], texts)
    held_out = _check(settings, target, corpus, curves)
    calibration = _calibration(settings, target, corpus, curves, held_out, method)
    # a default budget that the user has put into the file is not ours to drop
    calibration = replace(calibration, budget=scalar(open_gguf(gguf), KEY_BUDGET))
    write_calibrated(gguf, settings.output, calibration)
    state.remove()
    return Outcome(calibration, held_out, measured[method], settings.output, _agreement(measured, texts))


def read_corpus(settings: Settings, source: Source) -> Corpus:
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
    )


def _fingerprint(settings: Settings, target: Target, corpus: Corpus) -> str:
    measured = {
        name: getattr(settings, name) for name in ("windows", "window_tokens", "scorer", "dtype", "seed", "ratios")
    }
    return fingerprint(__version__, measured, corpus.name, fingerprint_weights(target.model))


def _measure(
    settings: Settings, target: Target, corpus: Corpus, processes: Processes, state: State, say: Say
) -> dict[str, np.ndarray]:
    """[W, L, R] nats per token for each method that is asked for, or that is complete anyway."""
    methods = [method for method in (EXACT, FAST) if settings.method in (method, BOTH)]
    mine = range(processes.rank, settings.windows, processes.count)
    layer_ids, n_layers = target.layer_ids, len(target.layers)
    scorer, plans = get_scorer(settings.scorer), settings.plans(len(layer_ids))

    def missing(method: str, window: int) -> list[int]:
        return [layer for layer in layer_ids if state.get(method, window, layer) is None]

    def cost(method: str, layer: int) -> float:  # in runs of one layer over one token
        n_runs = len(plans) * (n_layers - layer + _HEAD_COST) if method == EXACT else _FAST_COST
        return settings.tail_tokens(method) * n_runs

    todo = [(method, window, missing(method, window)) for method in methods for window in mine]
    todo = [(method, window, layers) for method, window, layers in todo if layers]
    total = sum(
        (settings.window_tokens - settings.tail_tokens(method)) * n_layers
        + sum(cost(method, layer) for layer in layers)
        for method, _, layers in todo
    )
    if processes.rank == 0 and len(state):
        say(f"going on where an interrupted calibration was: {len(state)} measurements of a layer are there")
    with progress("measuring", total) if processes.rank == 0 else nullcontext(lambda n: None) as advance:
        for method, index, layers in todo:
            prefilled = prefill(
                target,
                corpus.windows[index].tokens,
                settings.tail_tokens(method),
                scorer,
                plans,
                lambda n: advance(n * n_layers),
            )
            if method == FAST:
                seed = settings.seed * 1_000_003 + index
                state.put(FAST, index, fast.measure_window(prefilled, seed, lambda: advance(cost(FAST, 0))))
                continue
            window = run_tail(prefilled)
            for layer in layers:
                state.put(EXACT, index, {layer: exact.measure_layer(window, layer)})
                advance(cost(EXACT, layer))

    own = [
        (method, window, [state.get(method, window, layer) for layer in target.layer_ids])
        for method in (EXACT, FAST)
        for window in mine
        if not missing(method, window)
    ]
    found = processes.gather(own)
    result = {}
    for method in (EXACT, FAST):
        windows = {window: curves for of, window, curves in found if of == method}
        if len(windows) == settings.windows:
            result[method] = np.array([windows[window] for window in range(settings.windows)])
    return result


def _check(settings: Settings, target: Target, corpus: Corpus, curves: Curves) -> HeldOut:
    n_tokens = settings.window_tokens
    uniform = allocate(UNIFORM, n_tokens, settings.ratios, curves.sensitivity)
    calibrated = allocate(DEFAULT_RULE, n_tokens, settings.ratios, curves.sensitivity)
    scorer = get_scorer(settings.scorer)
    total = len(corpus.held_out) * (n_tokens - settings.tail_tokens(EXACT))
    with progress("checking", total) as advance:
        return check(target, corpus.held_out, settings.tail_tokens(EXACT), scorer, uniform, calibrated, advance)


def _calibration(
    settings: Settings, target: Target, corpus: Corpus, curves: Curves, held_out: HeldOut, method: str
) -> Calibration:
    return Calibration(
        layer_ids=target.layer_ids,
        keep_ratios=settings.ratios,
        sensitivity=curves.sensitivity,
        sensitivity_se=curves.sensitivity_se,
        scorer=settings.scorer,
        sink_tokens=N_SINK,
        recent_tokens=N_RECENT,
        rule=held_out.rule,
        model=settings.model,
        corpus=corpus.name,
        tokens=settings.windows * settings.window_tokens,
        windows=settings.windows,
        window_tokens=settings.window_tokens,
        method=method,
        stability=curves.stability,
        gain=held_out.gain,
        tool=f"depthkv-edge {__version__}",
    )


def _agreement(measured: dict[str, np.ndarray], texts: Sequence[int]) -> tuple[float, float] | None:
    if len(measured) < 2:
        return None
    a, b = (build_curves(measured[method], texts).sensitivity for method in (EXACT, FAST))
    return curve_correlation(a, b), layer_correlation(a, b)


def _join(ratios: Sequence[float]) -> str:
    return ",".join(f"{ratio:g}" for ratio in ratios)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def dump_curves(outcome: Outcome, path: Path) -> None:
    """Write the outcome with the curves of every window as JSON.

    Raises:
        DepthKVError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(outcome.to_dict() | {"per_window": outcome.measured.tolist()}) + "\n")
    except OSError as error:
        raise DepthKVError(f"{path} cannot be written: {error.strerror}") from None
