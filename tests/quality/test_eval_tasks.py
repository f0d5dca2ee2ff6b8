"""Tasks on the real model: they find what is there, miss what was evicted, and every row gets the same."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.engine.model import Cache, Model, load_model
from depthkv_edge.quality.rows import FULL, Row
from depthkv_edge.quality.tasks import TASKS, build_tasks, greedy, instruction, retrieval, summary, variables, words
from depthkv_edge.quality.tasks.generate import generate
from depthkv_edge.quality.tasks.prompt import follow, frame
from depthkv_edge.quality.tasks.reading import Passage, ask
from depthkv_edge.quality.texts import Text, default_texts, excerpt, read_texts, windows

IN_TEXTS = sorted(TASKS.keys() - {"qa"})  # test_eval_qa.py has that one
N_CTX = 512
SMALL = 256  # tokens: enough for what is about the cache and not about the model
FULL_ROW = Row(FULL)
SMALLER = [Row("context-shift", when_full="shift", n_cells=100), Row("truncate", when_full="reread", n_cells=100)]


def streaming(budget: float) -> Row:
    return Row("streaming", budget, Cache(budget, rule="uniform", scorer="streaming"))


@pytest.fixture(scope="module")
def model(smollm2):
    with load_model(smollm2, 2) as model:
        yield model


@pytest.fixture(scope="module")
def filler(text) -> list[Text]:
    return [Text("reference", text)]


@pytest.fixture(scope="module")
def keys(model, filler):
    """Retrieval with few keys."""
    return retrieval.build(model, filler, N_CTX, 0, n_items=1, n_keys=3)


def by_depth(task, record):
    """Log-probabilities of the answers of item 0, in the order in which the needles come."""
    values = {metric: iter(answers["log_prob"]) for metric, answers in record.items()}
    return [next(values[question.metric]) for question in task.passages[0].questions]


def place(tokens, part):
    """Where a part of some tokens begins."""
    return next(i for i in range(len(tokens)) if tokens[i : i + len(part)] == part)


# what is asked


@pytest.mark.parametrize("name", IN_TEXTS)
def test_smallest_context_is_the_one_that_the_error_names(model, filler, name):
    with pytest.raises(DepthKVError) as caught:
        build_tasks([name], model, filler, 64, 0, n_items={name: 1})
    smallest = int(re.search(r"-c (\d+) or more", str(caught.value))[1])
    with pytest.raises(DepthKVError, match=f"{name}.*-c {smallest} or more"):
        build_tasks([name], model, filler, smallest - 1, 0, n_items={name: 1})
    assert build_tasks([name], model, filler, smallest, 0, n_items={name: 1})[0].n_items == 1


@pytest.mark.parametrize("name", sorted(set(IN_TEXTS) - {"words"}))
def test_text_that_is_too_short(model, name):
    with pytest.raises(DepthKVError, match="short.txt has 5 tokens, .*--text"):
        build_tasks([name], model, [Text("short.txt", "A few words only.")], 1024, 0)


def test_unknown_task(model, filler):
    with pytest.raises(DepthKVError, match="'needles' is not known: give some of retrieval, "):
        build_tasks(["retrieval", "needles"], model, filler, N_CTX, 0)


@pytest.mark.parametrize("name", IN_TEXTS)
def test_an_item_fills_the_context(model, filler, name):
    """With its longest question, or with what is generated. A list of words ends with a whole one."""
    task = build_tasks([name], model, filler, 700, 0)[0]
    if name in ("greedy", "summary"):
        sizes = [len(prompt) + task.n_predict for prompt in task.prompts]
    else:
        sizes = [len(each.context) + max(asked.n_tokens for asked in each.questions) for each in task.passages]
    assert sizes and 700 - 8 * (name == "words") <= min(sizes) <= max(sizes) <= 700


@pytest.mark.parametrize("name", IN_TEXTS)
def test_items_depend_on_the_seed_and_not_on_their_number(model, filler, name):
    def items(seed, n):
        task = build_tasks([name], model, filler, 768, seed, n_items={name: n})[0]
        assert task.n_items == n
        return getattr(task, "passages", None) or task.prompts

    assert items(0, 3)[:2] == items(0, 2) != items(1, 2)


def test_texts_in_turn(model, text):
    two = [Text("front", text[:20_000]), Text("back", text[20_000:40_000])]
    for i, prompt in enumerate(greedy.build(model, two, N_CTX, 0).prompts):
        assert model.detokenize(prompt[8:-8]) in two[i].content


def test_needles_lie_at_even_depths_in_the_order_of_the_questions(model, filler):
    passage = retrieval.build(model, filler, 2048, 3, n_items=1).passages[0]
    assert Counter(question.metric for question in passage.questions) == {"multikey": 12, "passkey": 1}
    places = [place(passage.context, question.answer) / len(passage.context) for question in passage.questions]
    assert np.allclose(places, (np.arange(13) + 0.5) / 13, atol=0.02)


def test_chains_are_asked_at_their_end(model, filler):
    passage = variables.build(model, filler, 1024, 0, n_items=1, n_chains=3, n_hops=3).passages[0]
    assigned = dict(re.findall(r"VAR (X\d+) = (?:VAR )?(\w+)\.", model.detokenize(passage.context)))
    assert len(assigned) == 12
    for question in passage.questions:
        value = re.search(r"(X\d+) is:$", model.detokenize(question.prompt))[1]
        for _ in range(4):
            value = assigned[value]
        assert f" {value}" == model.detokenize(question.answer)


def test_common_words_are_half_of_the_list_and_each_is_asked_for(model):
    passage = words.build(model, [], 1024, 0, n_items=1).passages[0]
    counts = Counter(re.findall(r" (\w+)(?=,)", model.detokenize(passage.context)))
    common = {word for word, _ in counts.most_common(5)}
    assert sum(counts[word] for word in common) == pytest.approx(counts.total() / 2, abs=1)
    assert counts.most_common(6)[-1][1] < min(counts[word] for word in common) / 8
    for question in passage.questions:
        others = re.search(r"are: (.*),$", model.detokenize(question.prompt))[1].split(", ")
        assert common - set(others) == {model.detokenize(question.answer).strip()}


# what is answered


def test_the_full_cache_finds_keys_and_a_small_one_loses_those_in_the_middle(model, keys):
    full, lost = (by_depth(keys, keys.run(model, row, 0)) for row in (FULL_ROW, streaming(0.25)))
    assert max(full) < 0 and min(full) > -7
    assert all(small < large - 4 for small, large in zip(lost[1:3], full[1:3], strict=True))
    assert lost[-1] == pytest.approx(full[-1], abs=2), "the last key is still held"


@pytest.mark.parametrize("row", [streaming(0.5), *SMALLER], ids=lambda row: row.method)
def test_each_question_is_asked_from_the_same_state(model, keys, row):
    context = keys.passages[0].context[:150]
    asked = [question for question in keys.passages[0].questions if question.metric == "multikey"]
    questions = [replace(question, prompt=question.prompt[-20:]) for question in asked[:2]]
    with row.open(model, SMALL) as stream:
        forwards = ask(stream, Passage(context, tuple(questions)))["multikey"]
    with row.open(model, SMALL) as stream:
        backwards = ask(stream, Passage(context, tuple(questions[::-1])))["multikey"]
    assert len(forwards["exact"]) == 2
    assert forwards["log_prob"] == backwards["log_prob"][::-1]
    assert forwards["log_prob"][0] != forwards["log_prob"][1]


def test_chains_and_words_are_read(model, filler):
    for module, n_ctx, chance in ((variables, N_CTX, 5 * np.log(10)), (words, SMALL, np.log(2000))):
        task = module.build(model, filler, n_ctx, 0, n_items=1)
        (numbers,) = task.columns({0: task.run(model, FULL_ROW, 0)}, {}).values()
        assert -chance + 2 < numbers["log_prob"] < 0


def test_a_pinned_instruction_outlives_eviction(model, filler):
    task = instruction.build(model, filler, SMALL, 0, n_items=1)
    small = task.columns({0: task.run(model, streaming(0.5), 0)}, {})
    full = task.columns({0: task.run(model, FULL_ROW, 0)}, {})
    assert small["instruction_pinned"]["log_prob"] > small["instruction_unpinned"]["log_prob"] + 2
    assert full["instruction_pinned"] == full["instruction_unpinned"]
    assert full["instruction_pinned"]["log_prob"] > small["instruction_unpinned"]["log_prob"] + 2


def test_a_cache_that_is_too_small_to_pin_has_no_pinned_number(model, filler):
    """The smallest layers hold sinks, recent tokens and a ubatch, and no long system prompt beside them."""
    task = replace(instruction.build(model, filler, SMALL, 0, n_items=1), n_system=(60,))
    record = task.run(model, streaming(0.4), 0)
    assert "pinned" in record["refused"]
    assert list(task.columns({0: record}, {0: record})) == ["instruction_unpinned"]


def test_generated_text_against_the_full_cache(model, filler):
    task = summary.build(model, filler, SMALL, 0, n_items=3, n_predict=24)  # one of them may happen to be the same
    reference, record = ({i: task.run(model, row, i) for i in range(3)} for row in (FULL_ROW, streaming(0.4)))
    assert reference[0]["text"] == model.detokenize(reference[0]["tokens"])
    full, small = (task.columns(found, reference)["summary"] for found in (reference, record))
    assert full["rougeL"] == 1 > small["rougeL"] and full["n"] == 3


def test_greedy_text_differs_first_where_it_differs(model, filler):
    task = greedy.build(model, filler, N_CTX, 0, n_items=2, n_predict=4)
    reference = {0: {"tokens": [5, 6, 7, 8]}, 1: {"tokens": [5, 6, 7, 8]}}
    records = {0: {"tokens": [5, 6, 9, 8]}, 1: {"tokens": [5, 6, 7, 8]}}
    assert task.columns(records, reference) == {"greedy": {"agreement": 0.875, "first_difference": 3.0, "n": 2}}


@pytest.mark.parametrize("row", SMALLER, ids=lambda row: row.method)
def test_text_is_generated_in_a_smaller_window(model, filler, row):
    task = greedy.build(model, filler, SMALL, 0, n_items=1, n_predict=12)
    assert len(task.run(model, row, 0)["tokens"]) == 12


def test_generation_stops_after_the_end_of_the_turn():
    said = iter([4, 5, 0, 6])
    stream = SimpleNamespace(model=SimpleNamespace(is_end=lambda token: token == 0), next_token=lambda fed: next(said))
    assert generate(stream, [1, 2], 10) == [4, 5, 0]
    said = iter([4, 5, 0, 6])
    assert generate(stream, [1, 2], 2) == [4, 5]


# prompts


def test_document_between_head_and_tail(model):
    around = frame(model, "What?", "Be brief.")
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert around.head == model.tokenize(start, special=True)
    assert around.tail == "\n\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_base_model_in_plain_text(model, monkeypatch):
    monkeypatch.setattr(Model, "chat_template", lambda self: None)
    around = frame(model, "What?", "Be brief.")
    assert (model.detokenize(around.head), around.tail) == ("Be brief.\n\n", "\n\nWhat?\n\nAnswer:\n")
    assert frame(model, "What?").head == model.bos


def test_template_without_a_system_prompt(model, monkeypatch):
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    refusing = "{% for m in messages %}" + refuse + "[{{ m.content }}]{% endfor %}"
    monkeypatch.setattr(Model, "chat_template", lambda self: refusing)
    around = frame(model, "What?", "Be brief.")
    assert (model.detokenize(around.head), around.tail) == ("[Be brief.\n\n", "\n\nWhat?]")


@pytest.mark.parametrize(
    "template, why",
    [("{{ raise_exception('no\nway') }}", "fails: no$"), ("{% if", "fails"), ("fixed", "does not render")],
)
def test_broken_template(model, monkeypatch, template, why):
    monkeypatch.setattr(Model, "chat_template", lambda self: template)
    with pytest.raises(DepthKVError, match=why):
        frame(model, "What?", "Be brief.")


@pytest.mark.parametrize("prompt", ["The key is:", "\n\nSay", "assistant\n"])
@pytest.mark.parametrize("answer", [" 12345", " word", "Dear reader,"])
def test_answer_follows_the_prompt(model, prompt, answer):
    before, after = follow(model, prompt, answer)
    assert before + after == model.tokenize(prompt + answer)
    assert after and model.detokenize(before) + model.detokenize(after) == prompt + answer


# texts


def test_default_texts():
    texts = default_texts()
    assert [text.name for text in texts] == ["scripture", "documentation", "code"]
    assert min(len(text.content) for text in texts) > 300_000
    scripture = texts[0].content
    assert scripture.startswith("Now there was a certain man of Ramathaim-zophim, of mount Ephraim, and his name was")
    assert scripture.endswith("be with you all. Amen.") and not re.search(r"[\d\[\]<>]", scripture)


def test_a_text_by_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    assert read_texts(["documentation", "code"]) == default_texts()[1:]
    (tmp_path / "documentation").write_bytes("\ufeffé".encode())
    assert read_texts([tmp_path / "documentation"]) == read_texts(["documentation"]) == [Text("documentation", "é")]


@pytest.mark.parametrize(
    "content, why",
    [(None, "does not exist"), (b" \n", "is empty"), (b"ab\xff", r"is not UTF-8 \(byte 2\)"), ("", "cannot be read")],
)
def test_bad_text(tmp_path, content, why):
    path = tmp_path / "bad.txt"
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DepthKVError, match=f"bad.txt {why}") as caught:
        read_texts([str(path)])
    assert "\n" not in str(caught.value)


class Words:
    """A tokenizer whose tokens are words, each a number."""

    def __init__(self, bos):
        self.bos = bos

    def tokenize(self, text):
        return [int(word) for word in text.split()]


def numbered(n_words, rng):
    """Words 1 to n_words, of very different lengths, in lines."""
    return "".join(f"{i:0{rng.choice((1, 3, 40))}d}{rng.choice(' ' * 9 + chr(10))}" for i in range(1, n_words + 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(-3, 400), st.sampled_from([[], [0]]), st.randoms())
def test_windows_do_not_overlap(n, n_windows, n_over, bos, rng):
    n_words = max(1, n * n_windows + n_over)
    text = Text("numbers", numbered(n_words, rng))
    n_ctx = n + len(bos)
    if n_words < n * n_windows:
        with pytest.raises(DepthKVError, match=f"numbers has {n_words} tokens, {n_windows} x {n} are needed"):
            windows(Words(bos), text, n_ctx, n_windows)
        return
    found = windows(Words(bos), text, n_ctx, n_windows)
    assert len(found) == n_windows
    for window in found:
        assert window[: len(bos)] == bos
        assert window[len(bos) :] == list(range(window[len(bos)], window[len(bos)] + n)), "a run of the text"
    assert all(a[-1] < b[len(bos)] for a, b in pairwise(found))


def test_windows_are_spread_over_the_text(model, text):
    found = windows(model, Text("reference", text), 64, 4)
    places = [text.index(model.detokenize(window)) / len(text) for window in found]
    assert np.allclose(places, [0, 0.25, 0.5, 0.75], atol=0.02)


def test_a_huge_text_is_not_tokenised_whole():
    class Counting(Words):
        n_characters = 0

        def tokenize(self, text):
            self.n_characters += len(text)
            return super().tokenize(text)

    content = numbered(200_000, random.Random(0))
    for take in (lambda m, t: windows(m, t, 64, 3), lambda m, t: excerpt(m, t, 64, random.Random(0))):
        counting = Counting([])
        take(counting, Text("numbers", content))
        assert counting.n_characters < len(content) / 50


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(0, 30), st.randoms())
def test_excerpt_is_a_run_of_the_text(n, n_over, rng):
    tokens = excerpt(Words([]), Text("numbers", numbered(n + n_over, rng)), n, rng)
    assert tokens == list(range(tokens[0], tokens[0] + n))
