"""What both environments run, as JSON of token ids: neither of them tokenises."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthkv_edge.quality.store import Store, digest

FULL = "full"

# How a cache shrinks.
KVPRESS = "kvpress"  # the prompt in one pass, then once
ONCE = "once"  # ours, in the same way
BOUNDED = "bounded"  # ours, in the engine: never more cells than at the end

KVPRESS_STORE, OURS_STORE = "kvpress.jsonl", "ours.jsonl"  # files of records: each environment writes its own
FACTS = "facts"  # key of the record about kvpress's environment


@dataclass(frozen=True)
class Window:
    """Running text: a prompt, and the tokens after it that are predicted.

    Attributes:
        text: its name.
        tokens: [n_prompt + n_tail]
        n_prompt: tokens that are read before the cache shrinks.
    """

    text: str
    tokens: list[int]
    n_prompt: int

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.n_prompt]

    @property
    def tail(self) -> list[int]:
        """Its last token is predicted, and predicts nothing."""
        return self.tokens[self.n_prompt :]

    @property
    def n_tail(self) -> int:
        """Tokens by which the cache grows after the prompt."""
        return len(self.tail)

    @property
    def n_after(self) -> int:
        """Tokens that one line of the table computes after the prompt."""
        return self.n_tail

    @property
    def key(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True)
class Question:
    """Tokens of a question that follows a context, and of its right answer.

    Attributes:
        metric: where the answer counts.
    """

    metric: str
    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.question + self.answer


@dataclass(frozen=True)
class Retrieval:
    """A context, and questions that are asked after it, each of the same cache.

    Attributes:
        text: name of what the facts are hidden in.
        prompt: tokens of the context.
    """

    text: str
    prompt: list[int]
    questions: list[Question]

    @property
    def n_prompt(self) -> int:
        return len(self.prompt)

    @property
    def n_tail(self) -> int:
        """Tokens of the longest question with its answer."""
        return max(len(question.tokens) for question in self.questions)

    @property
    def n_after(self) -> int:
        """Tokens that one line of the table computes after the prompt."""
        return sum(len(question.tokens) for question in self.questions)

    @property
    def key(self) -> str:
        return digest(asdict(self))


Item = Window | Retrieval


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        model: Hugging Face directory of the F32 model.
        reference: file with logits of the full cache, see `benchmarks.peers.export`.
        records: directory of what was measured so far.
        presses: classes of kvpress, without `Press`.
        ratios: shares of the prompt's tokens that are kept.
        cell_bytes: F16 key and value of one token in one layer.
        n_layers: layers of the model.
        n_threads: CPU threads.
    """

    model: str
    reference: str
    records: str
    presses: list[str]
    ratios: list[float]
    windows: list[Window]
    retrievals: list[Retrieval]
    cell_bytes: int
    n_layers: int
    n_threads: int

    @property
    def items(self) -> list[Item]:
        return [*self.windows, *self.retrievals]

    @property
    def probe(self) -> list[int]:
        """Tokens that both environments must give the same logits for."""
        first = self.items[0]
        return first.tokens if isinstance(first, Window) else first.prompt

    def missing(self, store: Store, regime: str, methods: Sequence[str]) -> list[tuple[Item, list[tuple[str, float]]]]:
        """Items of which some method is not in the store at some ratio yet, with those methods and ratios."""
        lines = [(method, ratio) for method in methods for ratio in self.ratios]
        found = [
            (item, [line for line in lines if record_key(item, regime, *line) not in store]) for item in self.items
        ]
        return [(item, missing) for item, missing in found if missing]

    def write(self, path: Path) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path) -> Plan:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["windows"] = [Window(**window) for window in facts["windows"]]
        facts["retrievals"] = [_retrieval(retrieval) for retrieval in facts["retrievals"]]
        return cls(**facts)


def _retrieval(facts: Mapping[str, Any]) -> Retrieval:
    return Retrieval(**{**facts, "questions": [Question(**question) for question in facts["questions"]]})


def record_key(item: Item, regime: str, method: str, share: float) -> str:
    """Where the record of one line of the table is kept.

    Args:
        share: keep ratio of the prompt, or budget of the engine.
    """
    return f"{item.key}/{regime}/{method}/{share:.6g}"


def one_pass_cells(kept: list[int], n_prompt: int, n_tail: int) -> dict[str, Any]:
    """KV cells of a cache that takes a prompt in one pass, layer by layer, and then grows.

    A layer is whole until it has computed its attention, when those below it have shrunk already.

    Args:
        kept: tokens that each layer keeps of the prompt.
        n_tail: tokens that follow.

    Returns:
        held: of each layer after the prompt; peak, prompt, end: cells of all layers at most, after the prompt, at the
        end. What the pass itself needs for all tokens of the prompt at once comes on top.
    """
    end = sum(kept) + len(kept) * n_tail
    peak = max(sum(kept[:i]) + n_prompt for i in range(len(kept)))
    return {"held": kept, "peak": max(peak, end), "prompt": sum(kept), "end": end}
