"""`depthkv-edge eval`."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from depthkv_edge.checks import check_number, check_threads, default_threads
from depthkv_edge.cli.options import FILE, check_seed
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import resolve_model

_PACKAGES = ("scipy", "jinja2", "matplotlib", "rapidfuzz")
_INSTALL = "pip install 'depthkv-edge[eval]'"
_MIN_CTX = 256


@click.command("eval")
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Text to read, or scripture, documentation or code. Repeat for more. Default: those three.",
)
@click.option(
    "--questions",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Questions for the task qa: SQuAD's JSON, or JSON lines with question, answers and text. Repeat for more.",
)
@click.option("-c", "--ctx", type=int, default=4096, show_default=True, metavar="TOKENS", help="Context, and window.")
@click.option("--budgets", metavar="LIST", help="Shares of the full cache. Default: 0.2,0.4,0.6.")
@click.option("--methods", metavar="LIST", help="What is compared; `--methods help` lists them.")
@click.option("--tasks", metavar="LIST", help="What is measured; `--tasks help` lists them.")
@click.option("--quick", is_flag=True, help="Few rows, one text, no questions: a first impression.")
@click.option("--full", is_flag=True, help="Every method and task: hours.")
@click.option("--windows", type=int, default=1, show_default=True, metavar="N", help="Windows of each text.")
@click.option("--items", type=int, metavar="N", help="Of each task. Default: 1 for retrieval, all of them with --full.")
@click.option(
    "--reference",
    type=click.Choice(["native", "f32"]),
    default="native",
    show_default=True,
    help="Weights as they are, or dequantised: the rule without the noise of quantised activations.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of what is drawn.")
@click.option("--threads", type=int, metavar="N", help="CPU threads. Default: the physical cores.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted evaluation left.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--plot", type=FILE, metavar="DIR", help="Draw the plots into a directory.")
@click.option("--html", type=FILE, metavar="FILE", help="Write one self-contained page.")
def evaluate(
    model: str,
    texts: tuple[str, ...],
    questions: tuple[str, ...],
    ctx: int,
    budgets: str | None,
    methods: str | None,
    tasks: str | None,
    quick: bool,
    full: bool,
    windows: int,
    items: int | None,
    reference: str,
    seed: int,
    threads: int | None,
    restart: bool,
    as_json: bool,
    plot: str | None,
    html: str | None,
) -> None:
    """Compare KV caches: quality, memory and retrieval, beside stock llama.cpp.

    MODEL is the path of a GGUF, or a name that `fetch` lists. Every row runs the same text in the same engine; an
    interrupted evaluation goes on where it was when the same command runs again.
    """
    for name, value, least in (
        ("-c", ctx, _MIN_CTX),
        ("--windows", windows, 1),
        ("--items", items, 1),
    ):
        if value is not None and value < least:
            raise DepthKVError(f"{name} {value} is too small: give {least} or more")
        if value is not None:
            check_number(name, value)
    check_seed(seed)
    if quick and full:
        raise DepthKVError("--quick and --full contradict each other: give one of them")
    n_threads = default_threads() if threads is None else check_threads("--threads", threads)
    path = resolve_model(model)
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise DepthKVError(f"evaluation needs {package}, which is not installed: run `{_INSTALL}`")

    # imported here, so that what is wrong so far is said at once, and --help needs no library
    from depthkv_edge.measure.progress import LongWork
    from depthkv_edge.quality.eval_settings import LANGUAGE, EvalSettings
    from depthkv_edge.quality.eval_table import print_report
    from depthkv_edge.quality.evaluate import evaluate as measure
    from depthkv_edge.quality.evaluate import forget
    from depthkv_edge.quality.page import write_page
    from depthkv_edge.quality.plots import draw_plots
    from depthkv_edge.quality.questions import read_questions
    from depthkv_edge.quality.rows import (
        DEFAULT_BUDGETS,
        DEFAULT_METHODS,
        FULL_METHODS,
        METHODS,
        QUICK_BUDGETS,
        QUICK_METHODS,
        check_budgets,
        check_methods,
    )
    from depthkv_edge.quality.tasks import TASKS
    from depthkv_edge.quality.texts import default_texts, read_texts

    known_tasks = {LANGUAGE: "running text: KL divergence, perplexity, top-1 agreement, decode speed"} | TASKS
    for given, known in ((methods, METHODS), (tasks, known_tasks)):
        if given == "help":
            for name, what in known.items():
                click.echo(f"{name:14} {what}")
            return
    preset = QUICK_METHODS if quick else FULL_METHODS if full else DEFAULT_METHODS
    chosen_methods = _split(methods) or preset
    check_methods(chosen_methods)
    chosen_budgets = _numbers(budgets) if budgets is not None else QUICK_BUDGETS if quick else DEFAULT_BUDGETS
    check_budgets(chosen_budgets)
    asked = ("qa",) if questions else ()
    every_task = tuple(name for name in known_tasks if questions or name != "qa")
    chosen_tasks = _split(tasks) or (
        every_task if full else (LANGUAGE, *asked) if quick else (LANGUAGE, "retrieval", *asked)
    )
    for name in chosen_tasks:
        if name not in known_tasks:
            raise DepthKVError(f"task {name!r} is not known: give some of {', '.join(known_tasks)}")
    if "qa" in chosen_tasks and not questions:
        raise DepthKVError("task qa has no questions: give --questions FILE")
    if questions and "qa" not in chosen_tasks:
        raise DepthKVError(f"--questions {questions[0]} are for the task qa: add it to --tasks")
    _check_targets(plot, html)

    settings = EvalSettings(
        model=path,
        texts=tuple(read_texts(texts) if texts else default_texts(1 if quick else None)),
        n_ctx=ctx,
        budgets=chosen_budgets,
        methods=chosen_methods,
        tasks=chosen_tasks,
        questions=tuple(map(read_questions, questions)),
        windows=windows,
        reference=reference,
        n_items=_items(chosen_tasks, items, full),
        seed=seed,
        n_threads=n_threads,
    )
    if restart:
        forget(settings)
    with LongWork("loading") as watcher:
        found = measure(settings, watcher, shlex.join(["depthkv-edge", *sys.argv[1:]]))
    report = found.to_dict()
    if plot is not None:
        draw_plots(report, Path(plot))
    if html is not None:
        write_page(report, Path(html))
    if as_json:
        echo_json(report)
    else:
        print_report(report)
    forget(settings, found.keys)


def _items(tasks: tuple[str, ...], items: int | None, full: bool) -> tuple[tuple[str, int], ...]:
    if items is not None:
        return tuple((name, items) for name in tasks)
    return () if full else (("retrieval", 1),)


def _check_targets(plot: str | None, html: str | None) -> None:
    """What cannot be written is said before an hour of work, not after."""
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise DepthKVError(f"cannot write {html}: its directory does not exist; create it or choose another path")
    if plot is not None:
        try:
            Path(plot).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DepthKVError(f"cannot create {plot}: {error.strerror}; choose another directory") from None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in _split(text))
    except ValueError:
        raise DepthKVError(f"--budgets {text!r} is no list of numbers: give fractions such as 0.2,0.4") from None
    if not numbers:
        raise DepthKVError("--budgets is empty: give fractions such as 0.2,0.4")
    return numbers
