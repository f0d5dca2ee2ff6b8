"""The figures of docs/results.md: run what a section needs, keep its report, write the page from all reports.

.venv/bin/python -m benchmarks.results              # every section: some hours on two cores
.venv/bin/python -m benchmarks.results smollm2      # one section
.venv/bin/python -m benchmarks.results --render     # the page only, from the reports in docs/results/
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from benchmarks import rollback

Report = dict[str, Any]
Command = list[str]

ROOT = Path(__file__).parents[1]
MODELS = Path("build/results")  # from ROOT, as in the commands that are shown
REPORTS = Path("docs/results")
PAGE = Path("docs/results.md")
BASELINE = Path("build/baseline")

_DEPTHKV = ".venv/bin/depthkv-edge"
_PYTHON = ".venv/bin/python"
_ALTERNATIVES = "depth,depth+kv-q8_0,window,truncate,context-shift,shuffled,random"
_ONE_THREAD = ("--threads", "1")  # where nothing is timed, the machine may do something else
_TASKS = "retrieval,variables,words,instruction,greedy,summary"


@dataclass(frozen=True)
class Model:
    """A calibrated model that sections share.

    Attributes:
        prepare: commands that make it, from ROOT.
    """

    path: Path
    prepare: tuple[Command, ...]


PACKAGED = Model(Path("smollm2"), ())
SMOLLM2 = Model(
    MODELS / "smollm2.gguf",
    ([_DEPTHKV, *"calibrate smollm2 --method fast -o".split(), str(MODELS / "smollm2.gguf")],),
)
GEMMA3 = Model(MODELS / "gemma3.gguf", ([_DEPTHKV, "calibrate", "gemma3", "-o", str(MODELS / "gemma3.gguf")],))
QWEN_CODER = Model(
    MODELS / "qwen-coder.gguf",
    ([_DEPTHKV, *"calibrate qwen-coder --method fast --windows 2 -o".split(), str(MODELS / "qwen-coder.gguf")],),
)


@dataclass(frozen=True)
class Section:
    """A part of the page, and the one command that measures it.

    Attributes:
        command: prints the report as JSON on standard output.
        render: report to Markdown.
        plots: plots it draws, shown in this order.
        prepare: commands that it needs besides those of the model.
    """

    name: str
    title: str
    model: Model
    command: Command
    render: Callable[[Report], str]
    plots: tuple[str, ...] = ()
    prepare: tuple[Command, ...] = ()

    @property
    def report(self) -> Path:
        return REPORTS / f"{self.name}.json"

    @property
    def run(self) -> Command:
        """The command, with where its plots go."""
        return [*self.command, *(["--plot", str(REPORTS / self.name)] if self.plots else [])]


# --- tables -----------------------------------------------------------------------------------------------------------


def quality_table(report: Report, *, timed: bool) -> str:
    """Running text and retrieval. Times are left out where something else may have run on the machine."""
    rows = []
    for row in report["rows"]:
        kv, metrics = row["kv"], row["metrics"]
        held = kv.get("held")
        rows.append(
            {
                "": row["label"],
                "KV MiB": f"{kv['bytes'] / 2**20:.1f}",
                "of full": f"{kv['share']:.2f}",
                "tokens held, mean (min-max)": held and f"{held['mean']:.0f} ({held['min']}-{held['max']})",
                "KL, nats (95 %)": _kl(metrics.get("kl")),
                "perplexity ratio": _format(metrics.get("perplexity"), "ratio", ".4f"),
                "top-1": _percent(metrics.get("top1"), "share"),
                "keys: log p, exact": _answers(metrics.get("multikey")),
                "pass key: log p, exact": _answers(metrics.get("passkey")),
                "prefill ratio": _format(metrics.get("prefill") if timed else None, "ratio", ".2f"),
                "decode ratio": _format(metrics.get("decode") if timed else None, "ratio", ".2f"),
            }
        )
    return _table(rows)


def tasks_table(report: Report) -> str:
    """What is asked and generated."""
    rows = []
    for row in report["rows"]:
        metrics = row["metrics"]
        summary = metrics.get("summary")
        rows.append(
            {
                "": row["label"],
                "keys": _answers(metrics.get("multikey")),
                "pass key": _answers(metrics.get("passkey")),
                "variables": _answers(metrics.get("variables")),
                "common words": _answers(metrics.get("words")),
                "instruction, pinned": _answers(metrics.get("instruction_pinned")),
                "instruction, not pinned": _answers(metrics.get("instruction_unpinned")),
                "greedy text agrees": _percent(metrics.get("greedy"), "agreement"),
                "first difference": _format(metrics.get("greedy"), "first_difference", ".0f"),
                "summary ROUGE-1, -L": summary and f"{summary['rouge1']:.2f}, {summary['rougeL']:.2f}",
            }
        )
    return _table(rows)


def text_table(report: Report) -> str:
    """KL divergence of each text."""
    rows = [
        {"": row["label"]} | {name: _small(value) for name, value in row["metrics"]["kl"]["by_text"].items()}
        for row in report["rows"]
    ]
    return _table(rows)


def speed_table(report: Report) -> str:
    """Speed and memory."""
    rows = []
    for row in report["rows"]:
        rows.append(
            {
                "": row["label"],
                "KV MiB": f"{row['kv_bytes'] / 2**20:.1f}",
                "compute MiB": f"{row['compute_bytes'] / 2**20:.1f}",
                "peak MiB": f"{row['peak_rss_bytes'] / 2**20:.0f}",
                "first token, s": f"{row['first_token_seconds']:.1f}",
                "prefill": _speed(row["prefill"]),
                "prefill, end": _speed(row["prefill_full"]),
                **{f"decode, {depth}": _speed(speed) for depth, speed in row["decode"].items()},
                "a token at full: median, p99, max, ms": _latency(row.get("latency", {}).get("full")),
                "eviction": f"{row['evict_share']:.1%}",
            }
        )
    return _table(rows)


def peers_table(lines: Sequence[dict[str, Any]]) -> str:
    """kvpress and ours: one kind of item."""
    rows = []
    for line in lines:
        metrics, share = line["metrics"], line["kv"]["share"]
        rows.append(
            {
                "regime": line["regime"],
                "method": line["method"],
                "keep ratio": f"{line['ratio']:g}",
                "bytes at peak": f"{share['peak']:.2f}",
                "after the prompt": f"{share['prompt']:.2f}",
                "at the end": f"{share['end']:.2f}",
                "KL, nats (95 %)": _kl(metrics.get("kl")),
                "perplexity ratio": _format(metrics.get("perplexity"), "ratio", ".4f"),
                "top-1": _percent(metrics.get("top1"), "share"),
                "keys: log p, exact": _answers(metrics.get("multikey")),
            }
        )
    return _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, without the columns that are empty in every row."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    cells = [[row[name] or "" for name in names] for row in rows]
    return tabulate(cells, headers=names, tablefmt="github", disable_numparse=True)


def _small(value: float) -> str:
    return f"{value:.4f}" if value >= 0.00095 or value == 0 else f"{value:.1e}"


def _kl(metric: Report | None) -> str:
    return f"{_small(metric['mean'])} ({_small(metric['low'])}-{_small(metric['high'])})" if metric else ""


def _answers(metric: Report | None) -> str:
    return f"{metric['log_prob']:.2f}, {metric['exact']:.0%}" if metric else ""


def _percent(metric: Report | None, name: str) -> str:
    return f"{metric[name]:.1%}" if metric else ""


def _format(metric: Report | None, name: str, form: str) -> str:
    return format(metric[name], form) if metric else ""


def _latency(latency: Report | None) -> str:
    return ", ".join(f"{1e3 * latency[name]:.0f}" for name in ("p50", "p99", "max")) if latency else ""


def _speed(speed: Report) -> str:
    text = f"{speed['tokens_per_second']:.1f}"
    ratio = speed.get("ratio")
    return text if ratio is None else f"{text}, {ratio:.2f}x ({speed['low']:.2f}-{speed['high']:.2f})"


# --- sections ---------------------------------------------------------------------------------------------------------


def render_quality(report: Report) -> str:
    return _quality(report, timed=True)


def render_untimed(report: Report) -> str:
    return _quality(report, timed=False)


def _quality(report: Report, *, timed: bool) -> str:
    table = quality_table(report, timed=timed)
    return f"{_facts(report)}\n\n{table}\n\nKL divergence by text:\n\n{text_table(report)}"


def render_tasks(report: Report) -> str:
    return f"{_facts(report)}\n\n{tasks_table(report)}"


def render_speed(report: Report) -> str:
    baseline = report["baseline"]
    lines = [_machine(report)]
    if baseline["used"]:
        bits = "the same bits" if baseline["identical_logits"] else "other bits"
        lines.append(
            f"Without a budget this library gives {bits} as the unpatched build in every logit compared, at "
            f"{_ratio(baseline['prefill'])} of its prefill speed and {_ratio(baseline['decode'])} of its decode speed "
            "(95 % intervals over pairs of fresh processes)."
        )
    return "\n\n".join([*lines, speed_table(report)])


def render_rollback(report: Report) -> str:
    facts = (
        f"{report['documents']} documents of {report['n_ctx']} tokens are computed, the given share of each is taken "
        "back, what the cells lack is computed again, and the document goes on there for "
        f"{rollback.N_NEXT} tokens: divergence from the full cache, beside that of a context that has computed only "
        "what is left. In the chat every "
        f"{rollback.ASKED_AGAIN}th answer is asked for twice. {report['seconds'] / 60:.0f} minutes. "
    )
    return f"{facts}{_machine(report)}\n\n{rollback.markdown(report)}"


def render_peers(report: Report) -> str:
    settings, versions = report["settings"], report["versions"]
    parts = [
        f"F32 weights; {settings['prompt_tokens']} tokens of {', '.join(settings['texts'])} are read, the next "
        f"{settings['tail_tokens']} predicted; kvpress {versions['kvpress']} on transformers "
        f"{versions['transformers']}. **kvpress** and **once** compute the whole prompt at once, in torch, and shrink "
        "each layer's cache after it; the cache grows again with every token that follows. **bounded** is the engine, "
        "which never holds more: at the bytes that **once** ends with, and at the keep ratio itself.",
        _checks(report["checks"]),
    ]
    if report.get("windows"):
        parts.append(f"Running text:\n\n{peers_table(report['windows'])}")
    if report.get("retrievals"):
        parts.append(f"Keys hidden in a text, asked for after it:\n\n{peers_table(report['retrievals'])}")
    return "\n\n".join(parts)


def _checks(checks: dict[str, float]) -> str:
    """What had to agree before a number was kept."""
    return (
        f"How far apart what must agree is: {', '.join(f'{name} {_small(value)}' for name, value in checks.items())}."
    )


def _ratio(ratio: Report) -> str:
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ({low:.3f}-{high:.3f})"


def _facts(report: Report) -> str:
    model, settings = report["model"], report["settings"]
    weights = "F32, dequantised" if model["reference"] == "f32" else model["weights"]
    texts = ", ".join(f"{text['name']} ({text['sha256'][:8]})" for text in settings["texts"])
    return (
        f"Weights {weights}; context {settings['n_ctx']}; {settings['windows']} window of each text: {texts}; "
        f"seed {settings['seed']}; {report['seconds'] / 60:.0f} minutes. {_machine(report)}"
    )


def _machine(report: Report) -> str:
    machine, engine = report["machine"], report["engine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['system']}; llama.cpp "
        f"{engine['llama_cpp_commit']}, library {engine['library_sha256'][:8]}."
    )


def _rollback(model: Model, *options: str) -> Command:
    return [_PYTHON, "-m", "benchmarks.rollback", str(model.path), *options, *_ONE_THREAD, "--json"]


def _evaluate(model: Model, *options: str) -> Command:
    return [_DEPTHKV, "eval", str(model.path), *options, "--json"]


SECTIONS = (
    Section(
        "smollm2",
        "SmolLM2-135M as shipped (Q4_1)",
        SMOLLM2,
        _evaluate(SMOLLM2),
        render_quality,
        ("kl", "multikey", "decode", "occupancy"),
    ),
    Section(
        "speed",
        "Speed and memory",
        SMOLLM2,
        [
            *(_DEPTHKV, "bench", str(SMOLLM2.path), "-c", "8192", "--budgets", "0.2,0.4,0.6"),
            *("--baseline", str(BASELINE / "bin"), "--json"),
        ],
        render_speed,
        prepare=(["scripts/build-baseline.sh", str(BASELINE)],),
    ),
    Section(
        "smollm2-f32",
        "SmolLM2-135M, F32 weights",
        SMOLLM2,
        _evaluate(SMOLLM2, "--reference", "f32"),
        render_quality,
        ("kl", "multikey"),
    ),
    Section(
        "alternatives",
        "SmolLM2-135M, F32 weights: other methods at one budget",
        SMOLLM2,
        _evaluate(
            *(SMOLLM2, "--methods", _ALTERNATIVES, "--budgets", "0.4", "--tasks", "language", "--reference", "f32"),
            *_ONE_THREAD,
        ),
        render_untimed,
    ),
    Section(
        "gemma3",
        "Gemma-3 270M (Q4_K_M)",
        GEMMA3,
        _evaluate(GEMMA3, "--methods", "depth,uniform,streaming,kv-q8_0", "--budgets", "0.4", *_ONE_THREAD),
        render_untimed,
        ("kl", "multikey", "occupancy"),
    ),
    Section(
        "qwen-coder",
        "Qwen2.5-Coder 1.5B (Q4_K_M)",
        QWEN_CODER,
        _evaluate(
            QWEN_CODER,
            *"--text documentation --tasks language --methods depth,uniform,streaming,kv-q8_0".split(),
        ),
        render_quality,
        ("kl", "occupancy"),
    ),
    Section("rollback", "Going back: SmolLM2-135M", PACKAGED, _rollback(PACKAGED), render_rollback),
    Section(
        "qwen-coder-rollback",
        "Going back: Qwen2.5-Coder 1.5B",
        QWEN_CODER,
        _rollback(QWEN_CODER, "--budgets", "0.4", "--documents", "4", "--rollbacks", "5"),
        render_rollback,
    ),
    Section(
        "tasks",
        "SmolLM2-135M: what is asked and generated",
        SMOLLM2,
        _evaluate(
            *(SMOLLM2, "-c", "2048", "--methods", "depth,uniform,kv-q8_0,kv-q4_0", "--budgets", "0.4"),
            *("--tasks", _TASKS, "--items", "2", *_ONE_THREAD),
        ),
        render_tasks,
    ),
    Section(
        "peers",
        "kvpress",
        SMOLLM2,
        ["scripts/peers.sh", str(SMOLLM2.path), "--ratios", "0.2,0.4", "--contexts", "1", *_ONE_THREAD, "--json"],
        render_peers,
    ),
)


def run_section(section: Section) -> None:
    """Measure, and keep the report and the plots."""
    MODELS.mkdir(parents=True, exist_ok=True)
    if not (ROOT / section.model.path).exists():
        for command in section.model.prepare:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for command in section.prepare:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    plots = REPORTS / section.name
    done = subprocess.run(section.run, check=True, stdout=subprocess.PIPE, text=True)
    for path in plots.glob("*.png") if section.plots else ():
        if path.stem not in section.plots:
            path.unlink()
    report = json.loads(done.stdout.replace(f"{ROOT}/", ""))
    for row in report.get("rows", ()):
        for layer in row.get("kv", {}).get("layers", ()):
            layer.pop("occupancy", None)  # most of the bytes, and drawn
    REPORTS.mkdir(parents=True, exist_ok=True)
    section.report.write_text(json.dumps(report, indent=1) + "\n")


def render() -> str:
    """The page, from the reports that there are."""
    parts = [(ROOT / REPORTS / "intro.md").read_text().strip()]
    for section in SECTIONS:
        if (report := ROOT / section.report).exists():
            parts.append(_section(section, json.loads(report.read_text())))
    return "\n\n".join(parts) + "\n"


def _section(section: Section, report: Report) -> str:
    commands = [shlex.join(command) for command in (*section.model.prepare, *section.prepare, section.run)]
    pictures = [f"![{name}]({section.report.parent.name}/{section.name}/{name}.png)" for name in section.plots]
    return "\n\n".join(
        [
            f"## {section.title}",
            f"    .venv/bin/python -m benchmarks.results {section.name}",
            "which runs",
            "\n".join(f"    {command}" for command in commands),
            section.render(report),
            *pictures,
        ]
    )


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice([section.name for section in SECTIONS]))
@click.option("--render", "only_render", is_flag=True, help="Measure nothing.")
def main(sections: tuple[str, ...], only_render: bool) -> None:
    """Measure sections (all unless some are named), and write docs/results.md."""
    if Path.cwd().resolve() != ROOT:
        raise click.UsageError(f"run it in {ROOT}")
    for section in SECTIONS:
        if not only_render and (not sections or section.name in sections):
            click.echo(f"{section.name}: {shlex.join(section.run)}", err=True)
            run_section(section)
    PAGE.write_text(render())


if __name__ == "__main__":
    sys.exit(main())
