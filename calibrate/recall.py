"""Windows that ask: facts lie in a running text, and its end asks for each of them, which eviction could not foresee.

Running text seldom needs what it mentioned once, a person does. Keys as in RULER (arXiv 2404.06654), rows of tables,
definitions in code and statements in several languages; none is worded as in this package's own evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depthkv_edge.errors import DepthKVError

_NAMES = (
    "Amira Björn Carmen Dara Edgar Fiona Gustav Hana Igor Jamal Kira Lorenzo Maya Nikhil Olga Pavel Quentin Rosa Sven "
    "Tamar Ugo Vera Wanda Ximena Yusuf Zoe"
).split()
_CITIES = "Porto Lyon Gdansk Turin Malmo Bergen Quito Davos Kyoto Tampa Leeds Oran Graz Cork Nice Bari".split()
_GOODS = "copper salt timber wool barley amber linen coal honey silk pepper glass".split()
_THINGS = ("locker code", "invoice number", "flight number", "room", "account", "seat")


@dataclass(frozen=True)
class Fact:
    """What is hidden, and how the end of the window asks for it.

    Attributes:
        statement: stands in the text.
        question: without the answer.
        answer: what follows the question.
    """

    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class RecallTokens:
    """A window.

    Attributes:
        tokens: without the one that begins a sequence.
        asked: positions of the tokens of the answers, ascending.
        n_tail: tokens of all questions and answers, at the end.
    """

    tokens: tuple[int, ...]
    asked: tuple[int, ...]
    n_tail: int


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000, 1_000_000))


def _key(rng: random.Random, name: str) -> Fact:
    thing, number = rng.choice(_THINGS), _number(rng)
    return Fact(f"{name}'s {thing} is {number}.", f"Q: Which {thing} does {name} have?\nA: ", number)


def _row(rng: random.Random, name: str) -> Fact:
    city, goods, number = rng.choice(_CITIES), rng.choice(_GOODS), _number(rng)
    table = f"| clerk | city | goods | crates |\n|---|---|---|---|\n| {name} | {city} | {goods} | {number} |"
    column, answer = rng.choice((("city", city), ("goods", goods), ("crates", number)))
    return Fact(table, f"Q: In the table, what stands under {column} in the row of {name}?\nA: ", answer)


def _definition(rng: random.Random, name: str) -> Fact:
    constant = f"{name.upper()}_{rng.choice(('LIMIT', 'PORT', 'OFFSET', 'SEED'))}"
    number = _number(rng)
    return Fact(f"{constant} = {number}", f"assert {constant} == ", number)


def _home(rng: random.Random, name: str) -> Fact:
    city, goods = rng.choice(_CITIES), rng.choice(_GOODS)
    return Fact(
        f"{name}, who trades in {goods}, moved to {city} last spring.", f"Q: Where did {name} move?\nA: To ", city
    )


def _french(rng: random.Random, name: str) -> Fact:
    number = _number(rng)
    return Fact(f"Le numéro de dossier de {name} est le {number}.", f"Le numéro de dossier de {name} est le ", number)


def _german(rng: random.Random, name: str) -> Fact:
    city = rng.choice(_CITIES)
    return Fact(f"Der Schlüssel von {name} liegt in {city}.", f"Frage: Wo liegt der Schlüssel von {name}?\nIn ", city)


def _spanish(rng: random.Random, name: str) -> Fact:
    number = _number(rng)
    return Fact(f"La clave de {name} es {number}.", f"Pregunta: ¿cuál es la clave de {name}?\nRespuesta: ", number)


_KINDS = (_key, _row, _definition, _home, _french, _german, _spanish)


def draw_facts(rng: random.Random) -> list[Fact]:
    """One for each name, the kinds in turn, in an order that is drawn."""
    names = rng.sample(_NAMES, len(_NAMES))
    facts = [_KINDS[i % len(_KINDS)](rng, name) for i, name in enumerate(names)]
    rng.shuffle(facts)
    return facts


def build_window(
    tokenize: Callable[[str], list[int]], text: Sequence[int], n_tokens: int, n_tail: int, rng: random.Random
) -> RecallTokens:
    """Hide facts in a text, at even depths, and ask for all of them at its end, in another order.

    Args:
        tokenize: tokens of a text, without any that begin a sequence.
        text: at least n_tokens tokens.
        n_tail: the questions take up at most so many, but for the first one.

    Raises:
        DepthKVError: there is no room for a fact and its question.
    """
    tail: list[int] = []
    asked: list[int] = []  # from the beginning of the tail
    chosen: list[list[int]] = []
    for fact in draw_facts(rng):
        question, answer = _split(tokenize, fact)
        if tail and len(tail) + len(question) + len(answer) > n_tail:
            break
        tail += question
        asked += range(len(tail), len(tail) + len(answer))
        tail += answer
        chosen.append(tokenize(f"\n\n{fact.statement}\n\n"))
    room = n_tokens - len(tail) - sum(map(len, chosen))
    if room < len(tail):
        raise DepthKVError(
            f"--window-tokens {n_tokens} is too short to hide facts and to ask for them: give more, or --recall 0"
        )
    rng.shuffle(chosen)
    tokens: list[int] = []
    done = 0
    for i, piece in enumerate(chosen):
        depth = round(room * (i + 0.5) / len(chosen))
        tokens += [*text[done:depth], *piece]
        done = depth
    tokens += text[done:room]
    return RecallTokens((*tokens, *tail), tuple(len(tokens) + at for at in asked), len(tail))


def _split(tokenize: Callable[[str], list[int]], fact: Fact) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, as they are when tokenised together."""
    question = f"\n\n{fact.question}"
    alone, both = tokenize(question), tokenize(question + fact.answer)
    n = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
    return both[:n], both[n:]
