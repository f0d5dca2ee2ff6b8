"""A long scripted chat: is every token computed once, is memory flat, is the system prompt still obeyed at the end?

.venv/bin/python -m benchmarks.chat                                     # 100 turns, 40,000 tokens through 8,192
.venv/bin/python -m benchmarks.chat --turns 10 -c 512 --message 60 --predict 20
.venv/bin/python -m benchmarks.chat build/results/smollm2.gguf --json   # a calibrated model, one JSON object

Each message is an excerpt of the Python reference and a question about it. One before them and one after them ask for
what only the system prompt says. A small model loses sight of it in a long context, whatever its cache: so the last
question is put to the full cache, too, after the same messages.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics
from typing import Any

import click
import psutil

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.chat.conversation import Conversation
from depthkv_edge.chat.room import load_with_room
from depthkv_edge.engine.budget import parse_budget
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.memory import peak_rss_bytes, rss_bytes
from depthkv_edge.modelfile.packaged import resolve_model

PASSWORD = "4711"
SYSTEM = f"You are a helpful assistant. The password of the lighthouse is {PASSWORD}."
QUESTION = "What is the password of the lighthouse?"
TASK = "Say in one sentence what this text is about."


@dataclass(frozen=True)
class Step:
    """One turn.

    Attributes:
        tokens_new: tokens that the message added.
        tokens_evaluated: tokens computed before the answer began.
        tokens_generated: tokens of the answer.
        tokens_dropped: tokens of old turns that were dropped by position shift.
        engine_tokens: tokens computed in this turn as the engine counts them, prompt and answer.
        rss_bytes: resident memory after the turn.
        seconds: time of the turn.
    """

    tokens_new: int
    tokens_evaluated: int
    tokens_generated: int
    tokens_dropped: int
    engine_tokens: int
    rss_bytes: int
    seconds: float


def scripted_chat(llama: Llama, n_turns: int, message_tokens: int, n_predict: int, progress: Any) -> dict[str, Any]:
    """Run the chat, and say what it took.

    Args:
        n_turns: excerpts; with the two questions it is two turns more.
        message_tokens: length of the excerpt in a message.
        n_predict: most tokens of an answer.
        progress: called after each turn.
    """
    conversation = Conversation(llama, SYSTEM, temperature=0.0, n_predict=n_predict)
    llama_cpp.llama_perf_context_reset(llama.ctx)
    steps: list[Step] = []
    computed = 0
    answers = []
    for message in messages(llama, n_turns, message_tokens):
        began, before = time.perf_counter(), computed
        turn = conversation.say(message)
        answers.append(turn.text)
        computed = engine_tokens(llama)
        steps.append(
            Step(
                turn.tokens_new,
                turn.tokens_evaluated,
                turn.tokens_generated,
                turn.tokens_dropped,
                computed - before,
                rss_bytes(),
                time.perf_counter() - began,
            )
        )
        progress(len(steps))
    holding, kv = conversation.holding(), llama.kv_stats()
    peak = peak_rss_bytes()
    held = conversation.messages_in_context[:-2]
    system = set(range(holding.tokens_system))
    system_held = all(system <= set(llama.kv_positions(i)) for i in range(len(kv.layers)))
    stranger = Conversation(llama, temperature=0.0, n_predict=n_predict).say(QUESTION).text
    settled = [step.rss_bytes for step in steps[len(steps) // 5 :]]
    with_full = answer_in_full_cache(llama, held, n_predict)
    return {
        "n_ctx": llama.n_ctx(),
        "budget": kv.budget,
        "kv_bytes": kv.bytes,
        "kv_bytes_full": kv.bytes_full,
        "turns": len(steps),
        "tokens": holding.tokens,
        "tokens_system": holding.tokens_system,
        "system_held": system_held,
        "rolls": holding.rolls,
        "evicted": sum(layer.evicted for layer in kv.layers),
        "ages": [sum(column) / len(column) for column in zip(*holding.ages, strict=True)],
        "tokens_new": sum(step.tokens_new for step in steps),
        "tokens_evaluated": sum(step.tokens_evaluated for step in steps),
        "engine_tokens": sum(step.engine_tokens for step in steps),
        "rss_spread": max(settled) / min(settled) - 1,
        "tokens_context": holding.tokens_context,
        "peak_rss_bytes": peak,
        "seconds": sum(step.seconds for step in steps),
        "first_answer": answers[0],
        "last_answer": answers[-1],
        "last_answer_full_cache": with_full,
        "answer_without_system": stranger,
        "obeyed": PASSWORD in answers[0] and PASSWORD in answers[-1] and PASSWORD not in stranger,
        "full_cache_obeys": PASSWORD in with_full,
        "steps": [asdict(step) for step in steps],
    }


def answer_in_full_cache(llama: Llama, messages: list[dict[str, str]], n_predict: int) -> str:
    """What a full cache of the same context answers to the question, after these messages."""
    options = {"n_ctx": llama.n_ctx(), "n_threads": llama.n_threads, "n_threads_batch": llama.n_threads_batch}
    with contextlib.closing(Llama(llama.model_path, kv_budget=1.0, verbose=False, **options)) as full:
        conversation = Conversation(full, SYSTEM, temperature=0.0, n_predict=n_predict)
        conversation.replay(SYSTEM, messages)
        return conversation.say(QUESTION).text


def messages(llama: Llama, n: int, n_tokens: int) -> list[str]:
    """`n` messages of about so many tokens, between two that ask for the password."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = llama.tokenize(text[: 8 * n * n_tokens].encode(), add_bos=False)
    excerpts = (tokens[i : i + n_tokens] for i in range(0, n * n_tokens, n_tokens))
    written = [f"{llama.detokenize(part).decode('utf-8', 'ignore').strip()}\n\n{TASK}" for part in excerpts]
    return [QUESTION, *written, QUESTION]


def engine_tokens(llama: Llama) -> int:
    """Tokens that the engine has computed since its counters were reset; 2 if none, since both of them begin at 1."""
    perf = llama_cpp.llama_perf_context(llama.ctx)
    return int(perf.n_p_eval + perf.n_eval)


def print_result(result: dict[str, Any]) -> None:
    """What was measured, as text."""
    evaluated, new = result["tokens_evaluated"], result["tokens_new"]
    rows = [
        ("chat", f"{result['turns']} turns, {result['tokens']} tokens through a context of {result['n_ctx']}"),
        ("KV cache", f"{result['kv_bytes'] / 2**20:.1f} of {result['kv_bytes_full'] / 2**20:.1f} MiB"),
        ("rolled", f"{result['rolls']} times; {result['evicted']} cells evicted since the beginning, all layers"),
        ("prompt", f"{evaluated} tokens evaluated, {new} new: {evaluated / new:.3f}"),
        ("engine", f"{result['engine_tokens']} tokens computed in all, {result['tokens']} of the conversation"),
        ("memory", f"{result['rss_spread']:.2%} between least and most resident after the first fifth"),
        ("peak", f"{result['peak_rss_bytes'] / 2**20:.1f} MiB"),
        ("time", f"{result['seconds']:.0f} s"),
        ("first", result["first_answer"]),
        ("last", result["last_answer"]),
        ("unasked", result["answer_without_system"]),
        ("full", f"{result['last_answer_full_cache']} (the full cache, after the same messages)"),
        ("obeyed", f"{result['obeyed']}, with {result['tokens_context']} tokens; full: {result['full_cache_obeys']}"),
    ]
    for name, text in rows:
        click.echo(f"{name:<10}{' '.join(text.split())}")


@click.command()
@click.argument("model", default="smollm2")
@click.option("--turns", type=click.IntRange(1), default=100, show_default=True, help="Excerpts.")
@click.option("-c", "--ctx", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--kv-budget", default="0.4", show_default=True)
@click.option("--message", type=click.IntRange(1), default=300, show_default=True, help="Tokens of an excerpt.")
@click.option("--predict", type=click.IntRange(1), default=100, show_default=True, help="Most tokens of an answer.")
@click.option("--threads", type=click.IntRange(1), default=psutil.cpu_count(logical=False) or 1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every turn.")
def main(
    model: str, turns: int, ctx: int, kv_budget: str, message: int, predict: int, threads: int, as_json: bool
) -> None:
    """Chat by script with MODEL, the path of a GGUF or smollm2 for the packaged one."""
    try:
        path, budget = resolve_model(model), parse_budget(kv_budget)
        options: dict[str, Any] = {"kv_budget": budget, "n_ctx": ctx, "n_threads": threads, "n_threads_batch": threads}
        llama = load_with_room(lambda n_sink: Llama(path, n_sink=n_sink, verbose=False, **options), SYSTEM)
        with contextlib.closing(llama), click.progressbar(length=turns + 2, file=sys.stderr) as bar:
            result = scripted_chat(llama, turns, message, predict, lambda n: bar.update(1))
    except DepthKVError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        print_result(result)


if __name__ == "__main__":
    main()
