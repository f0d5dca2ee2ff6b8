"""Questions with answers that a user brings: SQuAD's JSON, as XQuAD has it, or JSON lines of question and passage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthkv_edge.errors import DepthKVError

_SHAPE = "SQuAD's JSON, or JSON lines with question, answers and text"


@dataclass(frozen=True)
class Asked:
    """A question and every answer to it that is right; the first one is the answer whose probability is measured."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QAPassage:
    """A passage and what is asked about it; none may be: it still fills a document."""

    title: str
    text: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class QuestionSet:
    """One file of questions.

    Attributes:
        sha256: of the file.
    """

    name: str
    sha256: str
    sources: tuple[QAPassage, ...]

    @property
    def n_questions(self) -> int:
        return sum(len(source.asked) for source in self.sources)


def read_questions(path: str | Path) -> QuestionSet:
    """Read a file of questions. Passages that occur twice become one; questions without an answer are left out.

    Raises:
        DepthKVError: the file is missing, not UTF-8 or not JSON, a field is missing, or nothing is asked.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        content = data.decode("utf-8-sig")
    except OSError as error:
        raise DepthKVError(f"questions {path} cannot be read: {error.strerror}; give {_SHAPE}") from None
    except UnicodeDecodeError as error:
        raise DepthKVError(f"questions {path} are not UTF-8 (byte {error.start}): convert them first") from None
    found: dict[tuple[str, str], list[Asked]] = {}
    for title, text, asked in _rows(content, path):
        known = found.setdefault((title, text), [])
        known += [each for each in asked if each.answers and each not in known]
    sources = tuple(QAPassage(title, text, tuple(asked)) for (title, text), asked in found.items())
    questions = QuestionSet(path.name, hashlib.sha256(data).hexdigest(), sources)
    if not questions.n_questions:
        raise DepthKVError(f"questions {path} hold no question that has an answer: give {_SHAPE}")
    return questions


def _rows(content: str, path: Path) -> Iterator[tuple[str, str, list[Asked]]]:
    """(title, passage, what is asked)."""
    try:
        whole = json.loads(content)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "data" in whole:
        yield from _squad(whole["data"], path)
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            where = f"questions {path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError:
                raise DepthKVError(f"{where}: not JSON; give {_SHAPE}") from None
            answers = _get(row, where, "answers", "answer")
            question = Asked(_text(row, where, "question"), _answers(answers, where))
            title = row.get("title")
            yield title if isinstance(title, str) else "", _text(row, where, "text", "context", "passage"), [question]


def _squad(articles: Any, path: Path) -> Iterator[tuple[str, str, list[Asked]]]:
    for i, article in enumerate(_list(articles, f"questions {path}: data")):
        where = f"questions {path}: data[{i}]"
        title = article.get("title") if isinstance(article, dict) else None
        for j, paragraph in enumerate(_list(_get(article, where, "paragraphs"), f"{where}.paragraphs")):
            place = f"{where}.paragraphs[{j}]"
            asked = []
            for k, qa in enumerate(_list(_get(paragraph, place, "qas"), f"{place}.qas")):
                at = f"{place}.qas[{k}]"
                answers = [_text(answer, at, "text") for answer in _list(_get(qa, at, "answers"), f"{at}.answers")]
                asked.append(Asked(_text(qa, at, "question"), _answers(answers, at)))
            yield title if isinstance(title, str) else "", _text(paragraph, place, "context"), asked


def _get(row: Any, where: str, *names: str) -> Any:
    """The first of some fields that is there."""
    for name in names:
        if isinstance(row, dict) and name in row:
            return row[name]
    raise DepthKVError(f"{where} has no {' or '.join(names)}: give {_SHAPE}")


def _text(row: Any, where: str, *names: str) -> str:
    value = _get(row, where, *names)
    if not isinstance(value, str) or not value.strip():
        raise DepthKVError(f"{where}: {names[0]} is no text: give {_SHAPE}")
    return value.strip()


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DepthKVError(f"{where} is no list: give {_SHAPE}")
    return value


def _answers(value: Any, where: str) -> tuple[str, ...]:
    answers: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DepthKVError(f"{where}: answers are no texts: give {_SHAPE}")
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
