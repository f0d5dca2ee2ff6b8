"""Every configuration in a process of its own, taking turns step by step."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthkv_edge import __version__
from depthkv_edge.engine import library
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.facts import engine_facts, machine_facts, model_facts
from depthkv_edge.speed.bench_settings import BenchSettings
from depthkv_edge.speed.pairs import DECODE_COST, compare_builds, pair_cost
from depthkv_edge.speed.process import NO_BUDGET, STOCK, STOCK_FLASH, Configuration, ContextFacts, Worker
from depthkv_edge.speed.result import Baseline, BenchResult, BenchRow
from depthkv_edge.speed.samples import (
    TimedStep,
    decode_samples,
    first_token_seconds,
    prefill_full_samples,
    prefill_samples,
)
from depthkv_edge.speed.schedule import DEPTHS, Schedule, make_schedule
from depthkv_edge.speed.timing import Latency, Speed, Timing, fastest, speed, total

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def check_baseline(directory: Path) -> Path:
    """The directory, absolute.

    Raises:
        DepthKVError: it does not hold a libllama.
    """
    way_out = "run scripts/build-baseline.sh in the source tree and give the directory that it prints"
    if not directory.is_dir():
        raise DepthKVError(f"baseline {directory} is not a directory: {way_out}")
    if not library.holds_libllama(directory):
        raise DepthKVError(f"baseline {directory} holds no libllama: {way_out}")
    return directory.resolve()


def configurations(settings: BenchSettings, baseline: Path | None) -> list[Configuration]:
    """Stock without and with flash attention, the same library's path without a budget, and every budget x type."""
    configured = [
        Configuration(STOCK, flash_attn=False, library=baseline),
        Configuration(STOCK_FLASH, flash_attn=True, library=baseline),
    ]
    if baseline is not None:  # else it is the same as STOCK
        configured.append(Configuration(NO_BUDGET, flash_attn=False))
    for budget, kv_type in itertools.product(settings.budgets, settings.types):
        label = f"budget {budget:g}" + ("" if kv_type == "f16" else f", {kv_type}")
        configured.append(Configuration(label, budget, kv_type))
    return configured


def bench(
    model: Path,
    settings: BenchSettings,
    text: str,
    baseline: Path | None = None,
    *,
    command: str = "",
    progress: Progress = lambda total: contextlib.nullcontext(lambda n: None),
) -> BenchResult:
    """Measure every configuration.

    Args:
        text: of the prompt; never repeated.
        baseline: directory with the libraries of an unpatched build; None: this package's stand in for stock.
        command: that was given, for the record.
        progress: called once with the whole cost; the context gives what is called with the cost of each turn.

    Raises:
        DepthKVError: a setting that cannot be measured, a context that cannot be had, a text that is too short.
    """
    settings.check()
    started = time.perf_counter()
    about_model = model_facts(model)
    configured = configurations(settings, baseline)
    # In a process that is not measured, since a long text takes memory too; the one with a budget, because the engine
    # says best what is wrong with a model.
    with Worker(configured[-1], model, settings) as worker:
        settings = replace(settings, n_ctx=worker.facts().n_ctx)
        tokens = _tokens(worker, text, settings.n_ctx)
    schedule = make_schedule(settings.n_ctx, settings)
    cost = len(configured) * _cost(schedule) + (pair_cost(settings) if baseline is not None else 0)
    with progress(cost) as advance:
        steps, facts = _measure(configured, model, settings, schedule, tokens, advance)
        compared: Baseline | None = None
        if baseline is not None:
            stock, ours = (next(of for of in configured if of.label == label) for label in (STOCK, NO_BUDGET))
            compared = compare_builds(stock, ours, model, settings, tokens, advance)
    return BenchResult(
        command=command,
        version=__version__,
        machine=machine_facts(settings.n_threads),
        engine=engine_facts(),
        model=about_model,
        settings=_settings(settings, schedule, text),
        baseline=compared,
        seconds=time.perf_counter() - started,
        rows=tuple(rows(configured, schedule, steps, facts)),
    )


def _tokens(worker: Worker, text: str, n_ctx: int) -> list[int]:
    tokens = worker.tokenize(text, n_ctx)
    if len(tokens) < n_ctx:
        raise DepthKVError(
            f"the prompt text has {len(tokens)} tokens, too few for a context of {n_ctx}: "
            "give a longer one with --prompt, or a smaller -c"
        )
    return tokens


def _cost(schedule: Schedule) -> int:
    """Prefill tokens that one configuration takes the time of, roughly."""
    steps = [step for step in schedule.steps() if step is not None]
    return schedule.passes * sum(step.n_tokens * (DECODE_COST if step.is_decode else 1) for step in steps)


def _measure(
    configured: Sequence[Configuration],
    model: Path,
    settings: BenchSettings,
    schedule: Schedule,
    tokens: Sequence[int],
    advance: Callable[[int], None],
) -> tuple[dict[str, list[TimedStep]], dict[str, ContextFacts]]:
    """Run the schedule: each step by every worker in turn, in an order that alternates from step to step."""
    steps: dict[str, list[TimedStep]] = {of.label: [] for of in configured}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(of, model, settings)) for of in configured]
        for n_pass, step in itertools.product(range(schedule.passes), schedule.steps()):
            if step is None:
                for worker in workers:
                    worker.clear()
                continue
            for worker in workers:
                timing = worker.compute(tokens[step.start : step.end], one_by_one=step.is_decode)
                steps[worker.configuration.label].append(TimedStep(n_pass, step, timing))
                advance(step.n_tokens * (DECODE_COST if step.is_decode else 1))
            workers.reverse()
        return steps, {worker.configuration.label: worker.facts() for worker in workers}


def rows(
    configured: Sequence[Configuration],
    schedule: Schedule,
    steps: dict[str, list[TimedStep]],
    facts: dict[str, ContextFacts],
) -> Iterator[BenchRow]:
    """The steps of every configuration as numbers. Each quantity is compared with the faster of the stock settings;
    the path without a budget with the stock setting that it shares."""
    bytes_full = next(f.kv_bytes_full for f in facts.values() if f.kv_bytes_full is not None)
    prefill = _speeds({label: prefill_samples(of, schedule) for label, of in steps.items()})
    prefill_full = _speeds({label: prefill_full_samples(of, schedule) for label, of in steps.items()})
    decode = {
        depth: _speeds({label: decode_samples(of, schedule, depth) for label, of in steps.items()}) for depth in DEPTHS
    }
    for of in configured:
        everything = total([turn.timing for turn in steps[of.label]])
        kv_bytes = facts[of.label].kv_bytes
        yield BenchRow(
            configuration=of,
            facts=facts[of.label],
            # another build's context does not say: it allocates what ours does without a budget
            kv_bytes=bytes_full if kv_bytes is None else kv_bytes,
            kv_share=1.0 if kv_bytes is None else kv_bytes / bytes_full,
            evict_share=everything.evict_seconds / everything.seconds,
            prefill=prefill[of.label],
            prefill_full=prefill_full[of.label],
            decode={depth: speeds[of.label] for depth, speeds in decode.items()},
            latency={depth: Latency.of(decode_samples(steps[of.label], schedule, depth)) for depth in DEPTHS},
            first_token_seconds=first_token_seconds(steps[of.label], schedule),
        )


def _speeds(samples: dict[str, list[Timing]]) -> dict[str, Speed]:
    best = fastest({label: samples[label] for label in (STOCK, STOCK_FLASH)})
    against = {label: STOCK if label == NO_BUDGET else best for label in samples}
    return {label: speed(of, samples[against[label]], against[label]) for label, of in samples.items()}


def _settings(settings: BenchSettings, schedule: Schedule, text: str) -> dict[str, Any]:
    return {
        "n_ctx": settings.n_ctx,
        "budgets": list(settings.budgets),
        "types": list(settings.types),
        "repetitions": settings.repetitions,
        "threads": settings.n_threads,
        "n_batch": settings.sizes.segment,
        "prompt": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)},
        "prompt_tokens": schedule.n_prompt,
        "depths": schedule.depths,
        "passes": schedule.passes,
        "decode_tokens": schedule.run,
    }
