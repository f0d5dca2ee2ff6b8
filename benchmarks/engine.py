"""What the engine must hold, measured beside an unpatched build of the same llama.cpp, in one run.

    ./scripts/build-baseline.sh && .venv/bin/python -m benchmarks.engine

Every figure that compares two builds comes from interleaved runs; ratios are medians over repetitions.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import depthkv_edge._library as library
from benchmarks.f32 import write_f32
from benchmarks.kl import Setting, compare, first_tokens, load_model
from benchmarks.worker import Worker
from depthkv_edge import _native
from depthkv_edge.models import resolve_model

N_CTX = 8192
DEPTH = 7000
PROMPT = 8000
BUDGETS = (0.6, 0.3)
SEGMENT = 500

Row = dict[str, Any]


def default_texts() -> dict[str, str]:
    """Long texts that every Python has: its documentation, and code."""
    import argparse
    import typing
    from pydoc_data.topics import topics

    return {
        "documentation": "\n\n".join(topics.values()),
        "code": inspect.getsource(typing) + inspect.getsource(argparse),
    }


def engine_options(model: Path, n_threads: int, **more: Any) -> dict[str, Any]:
    common = {"model_path": str(model), "n_ctx": N_CTX, "n_batch": 512, "n_ubatch": 512}
    return common | {"n_threads": n_threads, "n_threads_batch": n_threads} | more


def budget_options(budget: float) -> dict[str, Any]:
    return {"kv_overrides": {"depthkv.budget": budget}, "swa_full": False}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- stock behaviour ----------------------------------------------------------------------------------------------


def budget_free_path(model: Path, baseline: Path, text: str, n_threads: int, repetitions: int) -> Iterator[Row]:
    """No budget against the unpatched build: logits of a 2,000-token prompt and of 64 decoded tokens, and speed."""
    libraries = {"stock": baseline, "ours": library.library_dir()}
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    same = True
    for repetition in range(repetitions):
        # Fresh processes each time, started in turns: where a process's pages lie is worth a percent all its life.
        names = list(libraries) if repetition % 2 == 0 else list(reversed(libraries))
        workers = {name: Worker(libraries[name], **engine_options(model, n_threads)) for name in names}
        tokens = workers["stock"].tokenize(text)[:2064]
        steps = [(at, at + 250) for at in range(0, 2000, 250)] + [(at, at + 1) for at in range(2000, 2064)]
        for start, end in steps if repetition == 0 else [(0, 500), (500, 1000), (1000, 1500), (1500, 2000)]:
            hashes = set()
            for worker in workers.values():
                worker.eval(tokens[start:end], at=start)
                hashes.add(worker.logits_sha256())
            same &= len(hashes) == 1
        for name, start, end in (("prefill", 1500, 2000), ("decode", 2000, 2064)):
            seconds = dict.fromkeys(workers, 0.0)
            for turn in range(4):
                for which in names if turn % 2 == 0 else reversed(names):
                    one_by_one = name == "decode"
                    seconds[which] += workers[which].eval(tokens[start:end], at=start, one_by_one=one_by_one)
            ratios[name].append(seconds["stock"] / seconds["ours"])
        for worker in workers.values():
            worker.close()
    yield {"figure": "no budget: logits bit-identical to the unpatched build", "value": same}
    for name, values in ratios.items():
        yield {"figure": f"no budget: {name} speed against the unpatched build", **_ratio(values)}


# --- speed and memory ---------------------------------------------------------------------------------------------


def speed(
    model: Path, baseline: Path, text: str, n_threads: int, repetitions: int, prompt_repetitions: int
) -> Iterator[Row]:
    """A whole prompt from empty, and prefill and decode at depth, against the fastest stock setting."""
    ours = library.library_dir()
    workers = {
        "stock": Worker(baseline, **engine_options(model, n_threads, flash_attn=False)),
        "stock, flash attention": Worker(baseline, **engine_options(model, n_threads, flash_attn=True)),
    }
    for budget in BUDGETS:
        options = engine_options(model, n_threads, **budget_options(budget))
        workers[f"budget {budget}"] = Worker(ours, **options)
        workers[f"budget {budget}, flash attention"] = Worker(ours, **options, flash_attn=True)
    tokens = workers["stock"].tokenize(text)[:PROMPT]

    # seconds a token by configuration and kind, one entry for each repetition
    taken: dict[str, dict[str, list[float]]] = {n: {"prompt": [], "prefill": [], "decode": []} for n in workers}
    for repetition in range(prompt_repetitions):
        prompt = dict.fromkeys(workers, 0.0)
        for at in range(0, PROMPT, SEGMENT):
            if at == DEPTH and repetition == prompt_repetitions - 1:
                for worker in workers.values():
                    worker.save()
            for name, worker in workers.items():
                prompt[name] += worker.eval(tokens[at : at + SEGMENT], at=at)
            # saving the state below takes memory of its own
            if repetition == 0 and at + SEGMENT == (PROMPT if prompt_repetitions > 1 else DEPTH):
                peaks = {name: worker.peak_rss_bytes() for name, worker in workers.items()}
        for name, seconds in prompt.items():
            taken[name]["prompt"].append(seconds / PROMPT)
        say(f"speed: prompt {repetition + 1} of {prompt_repetitions}")

    # From the state at that depth each time: what follows a removed suffix would find cells that are still free.
    for repetition in range(repetitions):
        for worker in workers.values():
            worker.load()
        for name, worker in workers.items():
            taken[name]["prefill"].append(worker.eval(tokens[DEPTH : DEPTH + SEGMENT], at=DEPTH) / SEGMENT)
        for worker in workers.values():
            worker.load()
        for name, worker in workers.items():
            n = 128  # two evictions
            taken[name]["decode"].append(worker.eval(tokens[DEPTH : DEPTH + n], at=DEPTH, one_by_one=True) / n)
        say(f"speed: depth {repetition + 1} of {repetitions}")

    titles = {
        "prompt": f"prefill of {PROMPT} tokens from empty",
        "prefill": f"prefill at depth {DEPTH}",
        "decode": f"decode at depth {DEPTH}",
    }
    for kind, title in titles.items():
        fastest = min(("stock", "stock, flash attention"), key=lambda name: statistics.median(taken[name][kind]))
        for name in workers:
            row = {"figure": f"{title}: {name}", "tokens_per_second": 1 / statistics.median(taken[name][kind])}
            if name.startswith("budget"):
                row |= _ratio([a / b for a, b in zip(taken[fastest][kind], taken[name][kind], strict=False)])
                row["against"] = fastest
            yield row

    # of the same processes, at the end of the first full prompt
    full = _kv_bytes(model, 1.0)
    for name in ("stock", "stock, flash attention"):
        yield {"figure": f"peak memory: {name}", "mib": peaks[name] / 2**20}
    for name in workers:
        if not name.startswith("budget"):
            continue
        stock = "stock, flash attention" if "flash" in name else "stock"
        saved = full - _kv_bytes(model, float(name.split()[1].rstrip(",")))
        yield {
            "figure": f"peak memory: {name}",
            "mib": peaks[name] / 2**20,
            "kv_mib_saved": saved / 2**20,
            "fall_of_peak_over_kv_saved": (peaks[stock] - peaks[name]) / saved,
            "against": stock,
        }
    for worker in workers.values():
        worker.close()


def _kv_bytes(model: Path, budget: float) -> int:
    from depthkv_edge import Llama

    llama = Llama(model, n_ctx=N_CTX, kv_budget=budget, verbose=False)
    n_bytes = llama.kv_stats().bytes
    llama.close()
    return n_bytes


def kv_bytes(model: Path) -> Iterator[Row]:
    """Bytes allocated against the full cache, at every budget and context."""
    from depthkv_edge import Llama

    for n_ctx in (2048, 8192):
        for budget in (0.9, 0.6, 0.3, 0.15):
            llama = Llama(model, n_ctx=n_ctx, kv_budget=budget, verbose=False)
            stats = llama.kv_stats()
            llama.close()
            yield {
                "figure": f"KV bytes: budget {budget}, context {n_ctx}",
                "bytes_over_full": stats.bytes / stats.bytes_full,
                "mean_cells_over_target": sum(x.cells for x in stats.layers) / len(stats.layers) / (budget * n_ctx),
            }


# --- quality ------------------------------------------------------------------------------------------------------


def quality(model: Path, texts: dict[str, str], n_threads: int) -> Iterator[Row]:
    """Mean KL divergence from the full cache on F32 weights, context 4096, second half scored."""
    settings = {f"attention {budget}": Setting(budget) for budget in (0.6, 0.4, 0.2)}
    for scorer in ("streaming", "window", "random"):
        settings |= {f"{scorer} {budget}": Setting(budget, scorer) for budget in (0.4, 0.2)}
    with load_model(model) as loaded:
        settings["nothing evicted"] = Setting(cells=(4096,) * _native.llama_depthkv_layer_count(loaded))
        for title, text in texts.items():
            say(f"quality: {title}")
            tokens = first_tokens(loaded, text, 4096)
            for name, agreement in compare(loaded, tokens, settings, n_threads=n_threads, n_scored=2048).items():
                yield {"figure": f"quality on {title}: {name}", **agreement.to_dict()}


def greedy_text(model: Path, text: str, n_threads: int) -> Iterator[Row]:
    """Greedy text under a budget with room for everything, against the full cache."""
    from depthkv_edge import Llama

    texts = []
    for budget in (None, 0.99):
        llama = Llama(model, n_ctx=1024, n_threads=n_threads, kv_budget=budget, flash_attn=False, verbose=False)
        texts.append(llama(text[:1500], max_tokens=200, temperature=0.0)["choices"][0]["text"])  # type: ignore[index]
        llama.close()
    yield {"figure": f"nothing evicted: greedy text identical, {model.name}", "value": texts[0] == texts[1]}


def _ratio(ratios: list[float]) -> Row:
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "n": len(ratios)}


def _format(row: Row) -> str:
    values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "figure")
    return f"{row['figure']:70} {values}"


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Path of a GGUF, or smollm2.")
@click.option("--baseline", default="build/baseline/bin", show_default=True, help="Libraries of the unpatched build.")
@click.option("--text", "text_files", multiple=True, type=click.Path(exists=True), help="Long texts for quality.")
@click.option("--only", multiple=True, type=click.Choice(["stock", "speed", "bytes", "quality"]), help="Some sections.")
@click.option("--repetitions", default=5, show_default=True)
@click.option("--prompt-repetitions", default=5, show_default=True, help="Of the whole prompt: minutes each.")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Also write the figures to a file.")
def main(
    model: str,
    baseline: str,
    text_files: tuple[str, ...],
    only: tuple[str, ...],
    repetitions: int,
    prompt_repetitions: int,
    threads: int,
    json_file: str | None,
) -> None:
    """Print every figure that the engine promises."""
    path = resolve_model(model)
    stock = Path(baseline).resolve()
    texts = {Path(name).stem: Path(name).read_text() for name in text_files} or default_texts()
    long_text = max(texts.values(), key=len)
    f32 = Path("build") / f"{path.stem}-f32.gguf"

    def f32_model() -> Path:
        f32.parent.mkdir(exist_ok=True)
        write_f32(path, f32)
        return f32

    sections: dict[str, list[Callable[[], Iterator[Row]]]] = {
        "stock": [
            lambda: budget_free_path(path, stock, long_text, threads, repetitions),
            lambda: greedy_text(path, long_text, threads),
            lambda: greedy_text(f32_model(), long_text, threads),
        ],
        "bytes": [lambda: kv_bytes(path)],
        "speed": [lambda: speed(path, stock, long_text, threads, repetitions, prompt_repetitions)],
        "quality": [lambda: quality(f32_model(), texts, threads)],
    }
    rows: list[Row] = []
    for name, parts in sections.items():
        if only and name not in only:
            continue
        say(name)
        for part in parts:
            for row in part():
                print(_format(row), flush=True)
                rows.append(row)
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
