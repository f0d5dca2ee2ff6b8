"""Questions with answers: what is read, how documents are made of it, how answers are scored, on the real model."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.engine.model import Cache, load_model
from depthkv_edge.quality.metrics.answers import answers, exact, f1
from depthkv_edge.quality.questions import Asked, QAPassage, QuestionSet, read_questions
from depthkv_edge.quality.rows import FULL, Row
from depthkv_edge.quality.tasks import build_tasks, qa

PLACES = ("harbour", "library", "mill", "orchard", "quarry", "station", "theatre", "windmill")
NAMES = ("Ada", "Boris", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hugo")


def town(n=8):
    """A set of n passages, two questions each."""
    sources = []
    for place, name, year in zip(PLACES[:n], NAMES, range(1811, 1899, 11), strict=False):
        text = f"The {place} of the town was built in {year}. Its first keeper was {name}, who stayed there for long."
        asked = (
            Asked(f"When was the {place} built?", (str(year),)),
            Asked(f"Who was the first keeper of the {place}?", (name, f"keeper {name}")),
        )
        sources.append(QAPassage(place.title(), text, asked))
    return QuestionSet("town.json", "0" * 64, tuple(sources))


@pytest.fixture(scope="module")
def model(smollm2):
    with load_model(smollm2, 2) as model:
        yield model


def squad(questions):
    """The set as SQuAD writes it."""
    paragraphs = [
        {
            "context": source.text,
            "qas": [
                {"question": asked.question, "answers": [{"text": each, "answer_start": 0} for each in asked.answers]}
                for asked in source.asked
            ],
        }
        for source in questions.sources
    ]
    titles = [source.title for source in questions.sources]
    return {
        "version": "1.1",
        "data": [{"title": t, "paragraphs": [p]} for t, p in zip(titles, paragraphs, strict=True)],
    }


# reading


def test_both_forms_hold_the_same(tmp_path):
    town_set = town()
    (tmp_path / "a.json").write_text(json.dumps(squad(town_set)))
    rows = [
        {"question": asked.question, "answers": list(asked.answers), "title": source.title, "text": source.text}
        for source in town_set.sources
        for asked in source.asked
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    a, b = read_questions(tmp_path / "a.json"), read_questions(tmp_path / "a.jsonl")
    assert a.sources == b.sources == town_set.sources
    assert a.n_questions == 16 and a.sha256 != b.sha256


def test_fields_by_other_names_and_questions_without_an_answer(tmp_path):
    rows = [
        {"question": "Who?", "answer": "Ada", "context": "Ada did."},
        {"question": "Why?", "answers": [], "passage": "Ada did."},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_questions(tmp_path / "q.jsonl").sources == (QAPassage("", "Ada did.", (Asked("Who?", ("Ada",)),)),)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "hold no question"),
        ("plain text", "line 1: not JSON"),
        ('{"question": "Who?", "text": "t"}', "line 1 has no answers or answer"),
        ('{"question": "Who?", "answers": ["a"]}', "line 1 has no text or context or passage"),
        ('{"question": 7, "answers": ["a"], "text": "t"}', "question is no text"),
        ('{"question": "Who?", "answers": {"a": 1}, "text": "t"}', "answers are no texts"),
        ('{"question": "Who?", "answers": [], "text": "t"}', "hold no question"),
        ('{"data": 3}', "data is no list"),
        ('{"data": [{"title": "t"}]}', r"data\[0\] has no paragraphs"),
        ('{"data": [{"paragraphs": [{"context": "c"}]}]}', r"paragraphs\[0\] has no qas"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}', r"qas\[0\] has no answers"),
        ("[1, 2]", "line 1 has no answers"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, error):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(DepthKVError, match=error) as caught:
        read_questions(path)
    assert str(path) in str(caught.value) and "SQuAD's JSON" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DepthKVError, match="No such file"):
        read_questions(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"question": "caf\xe9"}')
    with pytest.raises(DepthKVError, match="not UTF-8"):
        read_questions(tmp_path / "latin.json")


# scoring


@pytest.mark.parametrize(
    ("given_text", "right", "is_exact", "score"),
    [
        ("The Ada.", ["Ada"], True, 1),
        ("ada", ["Boris", "Ada"], True, 1),
        ("in 1811", ["1811"], False, 2 / 3),
        ("the red mill", ["a red barn"], False, 1 / 2),
        ("", ["Ada"], False, 0),
        ("Boris", ["Ada"], False, 0),
        ("to be to", ["to be"], False, 4 / 5),
    ],
)
def test_answers_are_scored_as_squad_does(given_text, right, is_exact, score):
    assert exact(given_text, right) is is_exact
    assert f1(given_text, right) == pytest.approx(score)


@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_an_exact_answer_has_all_of_f1_and_every_score_is_a_share(text, right):
    assert 0 <= f1(text, right) <= 1
    assert not exact(text, right) or f1(text, right) == 1
    assert f1(text, [*right, text]) == 1


def test_means_are_over_questions_and_intervals_over_documents():
    full = [
        {"exact": [True, True], "f1": [1.0, 1.0], "log_prob": [-1.0, -1.0]},
        {"exact": [True], "f1": [0.5], "log_prob": [-2.0]},
    ]
    lost = [
        {"exact": [False, True], "f1": [0.0, 1.0], "log_prob": [-5.0, -1.0]},
        {"exact": [True], "f1": [0.5], "log_prob": [-2.0]},
    ]
    found = answers(lost, full)
    assert found["f1"] == pytest.approx(0.5) and found["f1_share"] == pytest.approx(0.5 / (2.5 / 3))
    assert found["exact"] == pytest.approx(2 / 3) and found["exact_change"] == pytest.approx(-1 / 3)
    assert found["log_prob_change"] == pytest.approx(-4 / 3)
    assert (found["n"], found["documents"]) == (3, 2)
    three = answers([*lost, full[1]], [*full, full[1]])
    assert three["log_prob_change_low"] < -2 / 3 < three["log_prob_change_high"] <= 0
    assert answers(full, full)["f1_change"] == 0 and answers(full, full)["f1_share"] == 1


# documents


def test_documents_hold_what_answers_them_and_fit(model):
    n_ctx = 320
    task = qa.build(model, [town()], n_ctx, 0, n_items=4, n_questions=3)
    seen = []
    for document in task.documents:
        text = model.detokenize(document.context)
        for quiz in document.questions:
            assert quiz.answers[0] in text
            assert model.detokenize(quiz.answer).strip() == quiz.answers[0]
            seen.append(model.detokenize(quiz.prompt))
            assert len(document.context) + quiz.n_tokens <= n_ctx
        # whole passages, each once
        assert (
            len(re.findall("was built in", text))
            == len(re.findall("stayed there for long", text))
            == len(set(re.findall(r"The (\w+) of the town", text)))
        )
    assert len(seen) == len(set(seen)) == 12


def test_documents_depend_on_the_seed_and_not_on_their_number(model):
    def build(seed, n):
        return qa.build(model, [town()], 400, seed, n_items=n, n_questions=3).documents

    assert build(0, 3)[:2] == build(0, 2) != build(1, 2)


def test_sets_in_turn(model):
    rest = QuestionSet("rest.json", "1" * 64, town().sources[4:])
    first = QuestionSet("first.json", "2" * 64, town().sources[:4])
    documents = qa.build(model, [first, rest], 512, 0, n_items=4, n_questions=2).documents
    for i, document in enumerate(documents):
        found = set(re.findall(r"The (\w+) of the town", model.detokenize(document.context)))
        assert found <= set(PLACES[4:] if i % 2 else PLACES[:4])


def test_what_cannot_be_built_says_why(model):
    with pytest.raises(DepthKVError, match="no questions: give --questions FILE"):
        build_tasks(["qa"], model, [], 512, 0)
    with pytest.raises(DepthKVError, match="town.json have 16 questions, which is too few: give fewer documents"):
        qa.build(model, [town()], 1024, 0, n_items=3, n_questions=8)
    with pytest.raises(DepthKVError, match="task qa does not fit a context of 64 tokens"):
        qa.build(model, [town()], 64, 0)
    long = QuestionSet("long.json", "3" * 64, (QAPassage("", "word " * 900, (Asked("What?", ("word",)),)),))
    with pytest.raises(DepthKVError, match=r"a passage of long.json has \d+ tokens.*give -c (\d+) or more") as caught:
        qa.build(model, [long], 512, 0, n_items=1)
    n_ctx = int(re.search(r"-c (\d+) or more", str(caught.value))[1])
    assert qa.build(model, [long], n_ctx, 0, n_items=1).n_items == 1


# answers


def test_a_small_cache_forgets_what_the_full_one_answers(model):
    task = qa.build(model, [town()], 512, 0, n_items=1, n_questions=6)
    rows = Row(FULL), Row("streaming", 0.35, Cache(0.35, rule="uniform", scorer="streaming"))
    full, lost = (task.run(model, row, 0) for row in rows)
    for record in (full, lost):
        assert {len(record[name]) for name in ("exact", "f1", "log_prob", "text")} == {6}
        for i, quiz in enumerate(task.documents[0].questions):
            assert record["f1"][i] == f1(record["text"][i], quiz.answers)
    found = task.columns({0: lost}, {0: full})["qa"]
    assert found["log_prob_change"] < -0.5
    assert task.columns({0: full}, {0: full})["qa"]["f1_share"] == 1
