"""`depthkv-edge run`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from depthkv_edge.checks import check_threads, default_threads
from depthkv_edge.cli.options import (
    FILE,
    FLASH_ATTN,
    GPU_LAYERS,
    KV_TYPES,
    MEMORY_HELP,
    check_gpu_layers,
    check_positive,
    check_seed,
    check_temperature,
    fitted,
    list_rules,
    parse_memory,
)
from depthkv_edge.cli.streams import echo_json, read_input
from depthkv_edge.engine.budget import FORMS, parse_budget
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import resolve_model


@click.command()
@click.argument("model")
@click.option("--kv-budget", metavar="BUDGET", help=f"KV cache: {FORMS}. Default: the model's own, or all of it.")
@click.option("-c", "--ctx", type=int, metavar="TOKENS", help="Context. Default: what the model was trained for.")
@click.option("--memory", metavar="SIZE", help=MEMORY_HELP)
@click.option("-f", "--file", type=FILE, metavar="FILE", help="Document to read; - is standard input.")
@click.option("-p", "--prompt", default="", metavar="TEXT", help="Question, put after the document.")
@click.option("-n", "--predict", type=int, default=256, show_default=True, metavar="N", help="Most tokens to decode.")
@click.option("--system", default="", metavar="TEXT", help="System prompt. It is pinned: never evicted.")
@click.option("--scorer", metavar="NAME", callback=list_rules, help="Token-scoring rule; help lists them.")
@click.option("--rule", metavar="NAME", callback=list_rules, help="Allocation rule; help lists them.")
@click.option("--ubatch", type=int, default=512, show_default=True, metavar="N", help="Most tokens to compute at once.")
@click.option("--threads", type=int, metavar="N", help="CPU threads. Default: the physical cores.")
@GPU_LAYERS
@click.option("--type-k", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of K.")
@click.option("--type-v", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of V.")
@click.option("--flash-attn", type=click.Choice(list(FLASH_ATTN)), default="auto", help="Default: what is fastest.")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--seed", type=int, metavar="N", help="Seed, for a temperature above 0. Default: random.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text and table.")
def run(
    model: str,
    kv_budget: str | None,
    ctx: int | None,
    memory: str | None,
    file: str | None,
    prompt: str,
    predict: int,
    system: str,
    scorer: str | None,
    rule: str | None,
    ubatch: int,
    threads: int | None,
    gpu_layers: int | None,
    type_k: str,
    type_v: str,
    flash_attn: str,
    temp: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Answer a question about a document.

    MODEL is the path of a GGUF, or a name that `fetch` lists. The text goes to standard output as it is decoded,
    a table of what it took to standard error.
    """
    budget = None if kv_budget is None else parse_budget(kv_budget)
    n_memory = parse_memory(memory)
    check_positive(("-c", ctx), ("-n", predict), ("--ubatch", ubatch))
    check_temperature(temp)
    check_seed(seed)
    n_gpu_layers = check_gpu_layers(gpu_layers)
    path = resolve_model(model)
    document = _read_document(file) if file is not None else ""
    if not document.strip() and not prompt.strip():
        raise DepthKVError("nothing to answer: give a document with -f, a question with -p, or both")

    # imported here, so that what is wrong so far is said at once, and --help needs no library
    from depthkv_edge.chat.answer import answer, check_fit
    from depthkv_edge.chat.template import build_prompt, user_message
    from depthkv_edge.cli.run_table import prefill_progress, print_summary
    from depthkv_edge.llama import Llama

    n_threads = default_threads() if threads is None else check_threads("--threads", threads)
    context = fitted(
        path,
        n_memory,
        budget,
        ctx,
        ubatch,
        KV_TYPES[type_k],
        KV_TYPES[type_v],
        flash_attn=FLASH_ATTN[flash_attn],
        scorer=scorer,
        rule=rule,
        n_gpu_layers=n_gpu_layers,
    )
    llama = Llama(
        path,
        **context.arguments(),
        scorer=scorer,
        rule=rule,
        n_gpu_layers=n_gpu_layers,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        type_k=KV_TYPES[type_k],
        type_v=KV_TYPES[type_v],
        flash_attn=FLASH_ATTN[flash_attn],
        seed=seed,
        verbose=False,
    )
    with contextlib.closing(llama):
        rendered = build_prompt(llama, user_message(document, prompt), system)
        check_fit(llama, rendered)
        with prefill_progress(len(rendered.tokens)) as on_prefill:
            result = answer(
                llama,
                rendered,
                predict,
                temperature=temp,
                on_prefill=on_prefill,
                on_text=(lambda text: None) if as_json else (lambda text: click.echo(text, nl=False)),
            )
    if as_json:
        echo_json(result.to_dict())
    else:
        click.echo()
        print_summary(result)


def _read_document(name: str) -> str:
    try:
        data = read_input() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError:
        raise DepthKVError(f"document {name} does not exist: give the path of a text file, or - for stdin") from None
    except OSError as error:
        raise DepthKVError(f"document {name} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DepthKVError(f"document {name} is not UTF-8 text (byte {error.start}): convert it first") from None
