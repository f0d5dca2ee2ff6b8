"""`depthkv-edge serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from depthkv_edge.cli.options import FILE, MEMORY_HELP, parse_memory
from depthkv_edge.engine.budget import FORMS, parse_budget
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.units import kv_share

if TYPE_CHECKING:
    from depthkv_edge.server.launch import Launch


@click.command()
@click.argument("model")
@click.argument("extra", nargs=-1, metavar="[-- LLAMA-SERVER ARGUMENTS]", type=click.UNPROCESSED)
@click.option(
    "--kv-budget",
    envvar="LLAMA_ARG_KV_BUDGET",
    metavar="BUDGET",
    help=f"KV cache: {FORMS}. Also read from LLAMA_ARG_KV_BUDGET. Default: the model's own, or all of it.",
)
@click.option("-c", "--ctx", type=int, metavar="TOKENS", help="Context. Default: what the model was trained for.")
@click.option("--memory", metavar="SIZE", help=MEMORY_HELP)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. Others need an API key.")
@click.option("--port", type=int, default=8080, show_default=True, help="Port to listen on.")
@click.option(
    "--api-key", envvar="LLAMA_API_KEY", metavar="KEY", help="Clients must send it. Also read from LLAMA_API_KEY."
)
@click.option("--api-key-file", type=FILE, metavar="FILE", help="Keys that clients may send, one on a line.")
@click.option(
    "--parallel",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Conversations at the same time. They share the cells of the KV cache: each gets one part in N, and may still "
    "be as long as the context. Without a budget each gets one part in N of the context, too.",
)
@click.option("--no-pin", is_flag=True, help="Let system prompts be evicted, too.")
def serve(
    model: str,
    extra: tuple[str, ...],
    kv_budget: str | None,
    ctx: int | None,
    memory: str | None,
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: str | None,
    parallel: int,
    no_pin: bool,
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page with a chat and a view of its KV cache.

    MODEL is the path of a GGUF, or a name that `fetch` lists. The server is llama.cpp's llama-server; what stands
    after -- goes to it as it is.
    """
    budget = None if kv_budget is None else parse_budget(kv_budget)
    n_memory = parse_memory(memory)
    path = resolve_model(model)

    # imported here, so that --help is quick
    from depthkv_edge.server.launch import ServeSettings, prepare, start

    launch = prepare(
        ServeSettings(
            model=path,
            budget=budget,
            n_ctx=ctx,
            memory=n_memory,
            host=host,
            port=port,
            api_key=api_key,
            api_key_file=None if api_key_file is None else Path(api_key_file),
            parallel=parallel,
            pin=not no_pin,
            extra=extra,
        )
    )
    for name, text in summary_rows(launch):
        click.echo(f"{name:10}{text}", err=True)
    start(launch)


def summary_rows(launch: Launch) -> list[tuple[str, str]]:
    """What is said before the server starts: a name, and what is to be said about it."""
    cache = launch.cache
    rows = [
        *cache.rows,
        ("address", launch.address),
        ("KV cache", kv_share(cache.bytes, cache.bytes_full)),
    ]
    each = f" for each of {cache.n_seq} conversations" if cache.n_seq > 1 else ""
    if not cache.rows or cache.n_ctx_seq < cache.n_ctx:
        shared = f", shared by {cache.n_seq} conversations"
        rows.append(("context", f"{cache.n_ctx_seq} tokens{shared if cache.unified and not cache.active else each}"))
    if cache.active:
        rows.append(("held", f"{cache.cells} tokens in a layer on average{each}"))
    return rows
