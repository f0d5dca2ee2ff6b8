"""Going back in a context that has evicted: what comes next against a fresh evaluation, and what is computed again.

.venv/bin/python -m benchmarks.rollback                          # 3 budgets, 20 documents, 10 rollbacks of each
.venv/bin/python -m benchmarks.rollback model.gguf -c 2048 --documents 4 --json

A document is computed, a share of it is taken back at random, what the cells lack is computed again, and the document
goes on there. The divergence of these predictions from the full cache's is compared with that of a context that has
computed only the front of the document. A chat follows in which every tenth answer is asked for twice.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from depthkv_edge.engine import capi
from depthkv_edge.engine.model import Cache, Model, api, decode, load_model, log_softmax, open_context
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.facts import engine_facts, machine_facts
from depthkv_edge.measure.progress import progress
from depthkv_edge.modelfile.packaged import resolve_model
from depthkv_edge.quality.metrics.interval import interval
from depthkv_edge.quality.texts import default_texts, read_texts, windows

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9)  # edges of the table's rows
STEP = 128  # a scoring pass spans as many tokens: whether a batch ends at a multiple of it makes no difference
N_NEXT = 32  # tokens that are predicted after going back
MESSAGE, ANSWER, ASKED_AGAIN = 140, 60, 10  # tokens of a message and an answer; each so manyth is asked for again


@dataclass(frozen=True)
class Rollback:
    """One time of going back.

    Attributes:
        budget: share of the full cache.
        share: of the tokens that was taken back.
        tokens: left.
        again: tokens computed again.
        kl, kl_fresh: mean divergence from the full cache over the tokens that follow, in nats; after going back, and in
            a context that was never elsewhere.
    """

    budget: float
    share: float
    tokens: int
    again: int
    kl: float
    kl_fresh: float


def feed(context: Any, model: Model, tokens: Sequence[int], begin: int, end: int) -> None:
    """Compute tokens [begin, end), in batches that start at multiples of the largest."""
    while begin < end:
        stop = min(end, (begin // model.n_batch + 1) * model.n_batch)
        decode(context, tokens[begin:stop], begin)
        begin = stop


def answer(context: Any, tokens: Sequence[int], at: int) -> None:
    for i in range(at, at + ANSWER):
        decode(context, tokens[i : i + 1], i)


def follow(context: Any, tokens: Sequence[int], at: int) -> np.ndarray:
    """Log-probabilities after each of the tokens that come next, one at a time as in a chat."""
    steps = (decode(context, tokens[i : i + 1], i, n_outputs=1) for i in range(at, at + N_NEXT))
    return np.concatenate([log_softmax(logits) for logits in steps])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    return float((np.exp(expected) * (expected - found)).sum(axis=1).mean())


def get_state(context: Any) -> Any:
    size = api.llama_state_seq_get_size(context, 0)
    state = (ctypes.c_uint8 * size)()
    assert api.llama_state_seq_get_data(context, state, size, 0) == size
    return state


def set_state(context: Any, state: Any) -> None:
    assert api.llama_state_seq_set_data(context, state, len(state), 0) == len(state)


def evaluated_to(context: Any, model: Model, tokens: Sequence[int], ends: Sequence[int]) -> Iterator[int]:
    """Leave in the context the first tokens of a document and nothing else, up to each of the ends; yields these."""
    state, done = None, 0
    for end in sorted(ends):
        api.llama_memory_clear(api.llama_get_memory(context), False)
        if state:
            set_state(context, state)
        whole = end // STEP * STEP
        if whole > done:
            feed(context, model, tokens, done, whole)
            state, done = get_state(context), whole
        feed(context, model, tokens, done, end)
        yield end


def go_back(context: Any, model: Model, tokens: Sequence[int], at: int) -> int:
    """Take back what comes after the first `at` tokens; returns how many of those had to be computed again."""
    left = capi.llama_depthkv_seq_rollback(context, 0, at)
    assert left >= 0, capi.last_error()
    feed(context, model, tokens, left, at)
    return at - left


def measure(model: Model, tokens: Sequence[int], budgets: Sequence[float], shares: Sequence[float]) -> list[Rollback]:
    """Go back from the end of a document by each of the shares."""
    n = len(tokens) - N_NEXT
    n_ctx = len(tokens)
    ends = [max(1, min(n - 1, round(n * (1 - share)))) for share in shares]
    with open_context(model, n_ctx, Cache()) as full:
        expected = {at: follow(full, tokens, at) for at in evaluated_to(full, model, tokens, ends)}
    found = []
    for budget in budgets:
        with open_context(model, n_ctx, Cache(budget)) as context:
            kl_fresh = {
                at: divergence(expected[at], follow(context, tokens, at))
                for at in evaluated_to(context, model, tokens, ends)
            }
        with open_context(model, n_ctx, Cache(budget)) as context:
            feed(context, model, tokens, 0, n)
            state = get_state(context)
            for share, at in zip(shares, ends, strict=True):
                set_state(context, state)
                again = go_back(context, model, tokens, at)
                kl = divergence(expected[at], follow(context, tokens, at))
                found.append(Rollback(budget, share, at, again, kl, kl_fresh[at]))
    return found


def chat(model: Model, tokens: Sequence[int], n_ctx: int, budget: float) -> dict[str, int]:
    """Messages and answers until the context is full; each tenth answer is asked for a second time."""
    turns = asked_again = again = n = 0
    with open_context(model, n_ctx, Cache(budget)) as context:
        while n + MESSAGE + ANSWER <= min(n_ctx, len(tokens)):
            turns += 1
            feed(context, model, tokens, n, n + MESSAGE)
            n += MESSAGE
            answer(context, tokens, n)
            if turns % ASKED_AGAIN == 0:
                asked_again += 1
                again += go_back(context, model, tokens, n)
                answer(context, tokens, n)
            n += ANSWER
    return {
        "n_ctx": n_ctx, "budget": budget, "turns": turns, "asked_again": asked_again, "tokens": n, "again": again,
    }  # fmt: skip


def summary(found: Sequence[Rollback]) -> list[dict[str, Any]]:
    """A row for each budget and range of shares, and one for all of a budget."""
    rows = []
    for budget in sorted({each.budget for each in found}):
        mine = [each for each in found if each.budget == budget]
        for low, high in [*zip(SHARES, SHARES[1:], strict=False), (SHARES[0], SHARES[-1])]:
            part = [each for each in mine if low <= each.share <= high]
            if not part:
                continue
            worse = [each.kl - each.kl_fresh for each in part]
            rows.append(
                {
                    "budget": budget,
                    "share": [low, high],
                    "n": len(part),
                    "kl": float(np.mean([each.kl for each in part])),
                    "kl_fresh": float(np.mean([each.kl_fresh for each in part])),
                    "difference": float(np.mean(worse)),
                    "interval": interval(worse),
                    "tokens": float(np.mean([each.tokens for each in part])),
                    "again": float(np.mean([each.again for each in part])),
                }
            )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table, and a line on the chat."""
    lines = [
        "| budget | share taken back | rollbacks | KL | fresh | difference (95 %) | tokens left | computed again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        (begin, end), (low, high) = row["share"], row["interval"]
        cells = [
            f"{row['budget']:g}",
            f"{begin:.0%} to {end:.0%}",
            f"{row['n']}",
            f"{row['kl']:.4f}",
            f"{row['kl_fresh']:.4f}",
            f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})",
            f"{row['tokens']:.0f}",
            f"{row['again']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    told = result["chat"]
    lines.append(
        f"\nA chat at {told['budget']:g} of {told['n_ctx']}: {told['turns']} turns, {told['tokens']} tokens, "
        f"{told['asked_again']} answers asked for again, {told['again']} tokens computed again."
    )
    return "\n".join(lines)


@click.command()
@click.argument("model", default="smollm2")
@click.option("-c", "--ctx", type=click.IntRange(256), default=512, show_default=True, help="Tokens of a document.")
@click.option("--chat-ctx", type=click.IntRange(512), default=4096, show_default=True, help="Context of the chat.")
@click.option("--budgets", default="0.2,0.4,0.6", show_default=True)
@click.option("--documents", type=click.IntRange(1), default=20, show_default=True)
@click.option("--rollbacks", type=click.IntRange(1), default=10, show_default=True, help="From each document.")
@click.option("--text", "texts", multiple=True, help="Text file; may be repeated. Default: four packaged texts.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    model: str,
    ctx: int,
    chat_ctx: int,
    budgets: str,
    documents: int,
    rollbacks: int,
    texts: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """Go back in documents with MODEL, the path of a GGUF or smollm2 for the packaged one."""
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    try:
        path = resolve_model(model)
        read = read_texts(texts) if texts else default_texts()
        shares_of = [float(share) for share in budgets.split(",")]
        found: list[Rollback] = []
        with load_model(path, threads) as loaded:
            parts = -(-documents // len(read))
            cut = [part for text in read for part in windows(loaded, text, ctx, parts)][:documents]
            with progress("rollbacks", len(cut)) as advance:
                for tokens in cut:
                    shares = rng.uniform(SHARES[0], SHARES[-1], rollbacks)
                    found += measure(loaded, tokens, shares_of, shares)
                    advance(1)
            (long,) = windows(loaded, read[-1], chat_ctx, 1)
            told = chat(loaded, long, chat_ctx, 0.4)
    except (DepthKVError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    result = {
        "model": path.name,
        "n_ctx": ctx,
        "documents": len(cut),
        "seed": seed,
        "rows": summary(found),
        "chat": told,
        "seconds": time.monotonic() - started,
        "machine": machine_facts(threads),
        "engine": engine_facts(),
    }
    click.echo(json.dumps(result) if as_json else markdown(result))


if __name__ == "__main__":
    main()
