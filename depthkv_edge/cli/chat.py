"""`depthkv-edge chat`."""

from __future__ import annotations

import contextlib
import sys

import click

from depthkv_edge.checks import check_threads, default_threads
from depthkv_edge.cli.options import (
    GPU_LAYERS,
    KV_TYPES,
    MEMORY_HELP,
    check_gpu_layers,
    check_positive,
    check_seed,
    check_temperature,
    fitted,
    parse_memory,
)
from depthkv_edge.engine.budget import FORMS, parse_budget
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.units import mib

_UBATCH = 512


@click.command()
@click.argument("model")
@click.option("--kv-budget", metavar="BUDGET", help=f"KV cache: {FORMS}. Default: the model's own, or all of it.")
@click.option("-c", "--ctx", type=int, metavar="TOKENS", help="Context. Default: what the model was trained for.")
@click.option("--memory", metavar="SIZE", help=MEMORY_HELP)
@click.option(
    "-n", "--predict", type=int, default=512, show_default=True, metavar="N", help="Most tokens of an answer."
)
@click.option("--system", default="", metavar="TEXT", help="System prompt. It is pinned: never evicted, never dropped.")
@click.option("--temp", type=float, default=0.8, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--seed", type=int, metavar="N", help="Seed, for a temperature above 0. Default: random.")
@click.option("--threads", type=int, metavar="N", help="CPU threads. Default: the physical cores.")
@GPU_LAYERS
@click.option("--type-k", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of K.")
@click.option("--type-v", type=click.Choice(list(KV_TYPES)), default="f16", show_default=True, help="Type of V.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per answer; messages are lines of stdin.")
def chat(
    model: str,
    kv_budget: str | None,
    ctx: int | None,
    memory: str | None,
    predict: int,
    system: str,
    temp: float,
    seed: int | None,
    threads: int | None,
    gpu_layers: int | None,
    type_k: str,
    type_v: str,
    as_json: bool,
) -> None:
    """Chat with a model, for longer than its context.

    MODEL is the path of a GGUF, or a name that `fetch` lists. A line is a message; one that ends in a backslash goes
    on, and three quotes begin and end a message of several lines. /help lists the commands; Ctrl-C stops an answer.
    Messages can also come through a pipe, one per line.
    """
    budget = None if kv_budget is None else parse_budget(kv_budget)
    n_memory = parse_memory(memory)
    check_positive(("-c", ctx), ("-n", predict))
    check_temperature(temp)
    check_seed(seed)
    n_gpu_layers = check_gpu_layers(gpu_layers)
    _check_text("--system", system)
    path = resolve_model(model)

    # imported here, so that what is wrong so far is said at once, and --help needs no library
    from depthkv_edge.chat.conversation import Conversation
    from depthkv_edge.chat.room import load_with_room
    from depthkv_edge.cli.chat_terminal import chat as run_chat
    from depthkv_edge.cli.chat_terminal import tell
    from depthkv_edge.llama import Llama

    n_threads = default_threads() if threads is None else check_threads("--threads", threads)
    types = KV_TYPES[type_k], KV_TYPES[type_v]
    context = fitted(path, n_memory, budget, ctx, _UBATCH, *types, n_gpu_layers=n_gpu_layers)

    def load(n_sink: int | None) -> Llama:
        return Llama(
            path,
            **context.arguments(),
            n_sink=n_sink,
            n_gpu_layers=n_gpu_layers,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            type_k=types[0],
            type_v=types[1],
            seed=seed,
            verbose=False,
        )

    with contextlib.closing(load_with_room(load, system)) as llama:
        conversation = Conversation(llama, system, temperature=temp, n_predict=predict)
        if sys.stdin.isatty():
            kv = llama.kv_stats()
            share = f"{mib(kv.bytes)} MiB of KV cache, {kv.bytes / max(1, kv.bytes_full):.0%} of the full one"
            tell(f"{path.name}: context of {llama.n_ctx()} tokens, {share}; /help lists the commands")
        run_chat(conversation, as_json=as_json)


def _check_text(name: str, text: str) -> None:
    # bytes of the command line that are no text are half characters here, which no tokenizer takes
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DepthKVError(f"{name} {text!a} is not UTF-8 text: convert it first") from None
