"""A conversation computes every token once, keeps its system prompt, and goes on when its context is full."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.chat.answer import token_bytes
from depthkv_edge.chat.conversation import Conversation
from depthkv_edge.chat.room import load_with_room
from depthkv_edge.chat.saved import read_saved, save
from depthkv_edge.chat.template import build_opening, build_turn
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.errors import Stopped

ROOT = Path(__file__).parents[2]
SYSTEM = "You are a terse assistant. Answer in one sentence."
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def models() -> Iterator[Callable[..., list[Llama]]]:
    """Models that no test has in use, by their options."""
    free: dict[Any, list[Llama]] = {}
    yield lambda **options: free.setdefault(tuple(options.items()), [])
    for llama in itertools.chain(*free.values()):
        llama.close()


@pytest.fixture
def begin(smollm2, models):
    """Begin a conversation with short answers, the same each time."""
    lent: list[tuple[list[Llama], Llama]] = []
    defaults = {"n_ctx": 512, "n_batch": 64, "n_ubatch": 64, "n_threads": 2, "n_threads_batch": 2}

    def make(system: str = SYSTEM, n_predict: int = 6, **options) -> Conversation:
        free = models(**options)
        lent.append((free, free.pop() if free else Llama(smollm2, **(defaults | options), verbose=False)))
        return Conversation(lent[-1][1], system, temperature=0.0, n_predict=n_predict)

    yield make
    for free, llama in lent:
        free.append(llama)


def context(conversation: Conversation) -> str:
    """What stands in the context, and the token that is to follow."""
    llama = conversation.llama
    tokens = [*llama.input_ids[: llama.n_tokens].tolist(), *conversation._pending]
    return llama.detokenize(tokens, special=True).decode("utf-8", "replace")


def rendered(messages: list[dict[str, str]], system: str = SYSTEM) -> str:
    """The same as SmolLM2's template has it, up to the end of the last answer."""
    parts = [{"role": "system", "content": system}, *messages]
    text = "".join(f"<|im_start|>{part['role']}\n{part['content']}<|im_end|>\n" for part in parts)
    return text.removesuffix("<|im_end|>\n")


def without_blanks(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same, with what the user has said beginning with a letter."""
    return [each | {"content": each["content"].lstrip()} if each["role"] == "user" else each for each in messages]


def engine_tokens(conversation: Conversation) -> int:
    """Tokens that the engine has computed since its counters were reset."""
    perf = llama_cpp.llama_perf_context(conversation.llama.ctx)
    return perf.n_p_eval + perf.n_eval


def questions(n: int, words: str = "in one sentence, please") -> list[str]:
    things = ("rivers", "clocks", "maps", "bread", "salt", "glass", "paper", "bridges", "ships", "wool", "coal", "tea")
    return [f"Question {i}: what are {things[i % len(things)]} good for, {words}?" for i in range(n)]


def fill(conversation: Conversation, build: Callable[..., Any], n_tokens: int) -> str:
    """A message for which that many tokens are used, or a few more, when it has been read."""
    llama, message = conversation.llama, "Tell me a long story. "
    used = llama.n_tokens + len(conversation._pending)
    while used + len(build(llama, message, SYSTEM).tokens) < n_tokens:
        message += "Tell me more. "
    return message


@pytest.mark.parametrize("budget", [None, 0.25])
def test_every_token_is_computed_once(begin, budget):
    """And turns are what the template makes of them."""
    conversation = begin(n_ctx=1024, kv_budget=budget)
    llama_cpp.llama_perf_context_reset(conversation.llama.ctx)
    total = 0
    for question in questions(8):
        turn = conversation.say(question)
        assert turn.tokens_evaluated == turn.tokens_new > 0
        total += turn.tokens_new + turn.tokens_generated
        # the last token of an answer is computed with the next message
        total -= len(conversation._pending)
        assert engine_tokens(conversation) == total == conversation.llama.n_tokens
        assert context(conversation) == rendered(conversation.messages)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 8
    if budget:
        assert turn.kv.n_evict > 0
    added = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    n_added = len(conversation.llama.tokenize(added.encode(), add_bos=False, special=True))
    assert turn.tokens_new - n_added in (0, 1), "the message, and the last token of the answer before it"


def test_rolling_keeps_the_system_prompt_and_whole_turns(begin):
    conversation = begin(n_ctx=256, kv_budget=0.6)
    llama = conversation.llama
    n_system = build_opening(llama, "question", SYSTEM).n_system
    rolls = 0
    # blanks before a message, which are one token with the template's newline, must not take that newline along
    for question, blanks in zip(questions(20), ["", "", "\n\n", "", "  "] * 4, strict=True):
        free = llama.n_tokens - n_system
        turn = conversation.say(blanks + question)
        assert turn.tokens_evaluated == turn.tokens_new < 80, "the history is not computed again"
        assert llama.n_tokens <= 256
        if turn.tokens_dropped:
            rolls += 1
            assert turn.tokens_dropped >= free / 2 - 6, "at least half of what may go"
        text = context(conversation)
        assert text.startswith(HEAD)
        kept = text.count("<|im_start|>user")
        assert text == rendered(without_blanks(conversation.messages[-2 * kept :]))
        for i in range(len(turn.kv.layers)):
            assert llama.kv_positions(i)[:n_system] == list(range(n_system)), "pinned in every layer"
    assert conversation.rolls == rolls >= 3
    assert len(conversation.messages) == 40, "what is dropped from the context is still known"


def test_an_answer_rolls_too(begin):
    conversation = begin(n_ctx=256, n_predict=20)
    conversation.say(questions(1)[0])
    turn = conversation.say(fill(conversation, build_turn, 246))
    assert turn.tokens_dropped > 0 and turn.tokens_evaluated == turn.tokens_new
    assert turn.tokens_generated > 10
    assert context(conversation) == rendered(conversation.messages[-2:]), "in the middle of the answer"


def test_an_answer_ends_with_the_context_and_is_read_again(begin):
    conversation = begin(n_ctx=256, n_predict=400)
    turn = conversation.say(fill(conversation, build_opening, 246))
    assert turn.finish == "context" and turn.tokens_generated < 12
    assert conversation.llama.n_tokens == 256
    messages = list(conversation.messages)
    assert conversation.say("Name a colour.").tokens_dropped > 0
    for before in ([], [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]):
        conversation.replay(SYSTEM, before + messages)
        assert conversation.messages == before + messages and not conversation.forgotten
        assert conversation.llama.n_tokens == 255, "as much of the answer as fits beside its message"
        assert rendered(messages).startswith(context(conversation))
    seen: list[int] = []
    conversation.replay(SYSTEM, messages, on_prefill=seen.append)
    assert sum(seen) == conversation.replay_length(SYSTEM, messages) == 255
    assert conversation.say("Name a colour.").tokens_dropped > 0


def test_what_is_held_by_age(begin):
    conversation = begin(n_ctx=256, kv_budget=0.6)
    holding = conversation.holding()
    assert holding.tokens == 0 and holding.ages[0][0] != holding.ages[0][0], "nothing yet: no shares"
    for question in questions(12):
        conversation.say(question)
    holding = conversation.holding()
    assert holding.tokens == conversation.tokens > holding.tokens_context
    assert holding.rolls > 0 and holding.pinned
    for layer, ages in zip(holding.kv.layers, holding.ages, strict=True):
        quarter = (holding.tokens - len(conversation._pending)) / 4
        assert sum(ages) * quarter == pytest.approx(layer.used, abs=2)
        assert ages[0] < 0.5 < ages[-1] <= 1, "the oldest has been dropped but for the system prompt"


def test_held_in_full_without_a_budget(begin):
    conversation = begin()
    conversation.say("Name a colour.")
    assert all(ages == [1.0] * 4 for ages in conversation.holding().ages)


def test_a_stop_before_the_answer_changes_nothing(begin):
    first, second = begin(n_ctx=1024), begin(n_ctx=1024)
    with pytest.raises(Stopped):
        first.say("Name a colour.", stop=lambda: True)
    assert first.messages == [] and first.llama.n_tokens == 0
    for conversation in (first, second):
        conversation.say("Name a colour.")
    before = context(first)
    calls = iter([False, True])
    with pytest.raises(Stopped):
        first.say("What is this? " * 40, stop=lambda: next(calls))
    assert context(first) == before
    assert first.messages == second.messages
    assert first.say("Name a city.").text == second.say("Name a city.").text


def test_a_stop_in_the_answer_keeps_what_was_said(begin):
    conversation = begin(n_predict=100)
    pieces: list[str] = []
    turn = conversation.say("Tell me about rivers.", on_text=pieces.append, stop=lambda: len(pieces) >= 5)
    assert turn.finish == "interrupt" and turn.tokens_generated == 5
    assert "".join(pieces) == turn.text == conversation.messages[-1]["content"]
    conversation.say("Name a colour.")
    assert context(conversation) == rendered(conversation.messages), "closed by the template's end of turn"


def test_an_answer_that_fails_is_kept_as_far_as_it_came(begin, monkeypatch):
    conversation = begin(n_ctx=1024, n_predict=40)
    conversation.say("Name a colour.")
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        conversation.say("Tell me about rivers.", on_text=on_text)
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert context(conversation) == rendered(conversation.messages)

    evaluate, calls = conversation.llama.eval, iter(range(100))

    def fail(tokens: list[int]) -> None:
        if next(calls) == 4:
            raise RuntimeError("llama_decode returned -3")
        evaluate(tokens)

    monkeypatch.setattr(conversation.llama, "eval", fail)
    with pytest.raises(DepthKVError):
        conversation.say("Tell me about bridges.")
    monkeypatch.undo()
    assert conversation.messages[-2]["content"] == "Tell me about bridges." and conversation.messages[-1]["content"]
    assert context(conversation) == rendered(conversation.messages)
    conversation.say("Name a city.")
    assert context(conversation) == rendered(conversation.messages)


def test_a_roll_that_fails_leaves_an_empty_context(begin, monkeypatch):
    conversation = begin(n_ctx=256)
    conversation._can_shift = False  # what stays is computed again, and that may fail
    asked = iter(questions(20))
    conversation.say(next(asked))

    def fail(n: int) -> bool:
        raise DepthKVError("not today")

    monkeypatch.setattr(conversation, "_pin", fail)
    with pytest.raises(DepthKVError, match="not today"):
        for question in asked:
            conversation.say(question)
    monkeypatch.undo()
    assert conversation.forgotten and conversation.llama.n_tokens == 0 and conversation.messages
    assert conversation.holding().tokens_system == 0
    known = len(conversation.messages)
    conversation.say("Name a colour.")
    assert context(conversation) == rendered(conversation.messages[known:]), "it goes on from the beginning"
    assert not conversation.forgotten


def test_a_message_longer_than_the_context(begin):
    conversation = begin()
    with pytest.raises(DepthKVError, match="512 tokens of context"):
        conversation.say("word " * 600)
    conversation.say("Name a colour.")
    before = context(conversation)
    for message, why in ("word " * 600, "512 tokens of context"), (" \n", "empty"):
        with pytest.raises(DepthKVError, match=why) as caught:
            conversation.say(message)
        assert "\n" not in str(caught.value)
        assert context(conversation) == before
    turn = conversation.say("word " * 470)
    assert turn.tokens_dropped > 0, "it leaves no room for any other"
    assert turn.tokens_evaluated == turn.tokens_new
    assert context(conversation) == rendered(conversation.messages[-2:])


def test_a_system_prompt_that_cannot_be_pinned(begin, text):
    conversation = begin(system=text[:1500], n_ctx=1024, kv_budget=0.25)
    with pytest.raises(DepthKVError, match="system prompt .* cannot be pinned.*raise --kv-budget.*as --system"):
        conversation.say("Who?")
    assert conversation.llama.n_tokens == 0
    conversation.system = SYSTEM
    assert conversation.say("Who?").tokens_new > 0


def test_a_layer_smaller_than_the_system_prompt(load, calibrated, text):
    """A calibrated budget may leave a layer fewer cells than the system prompt has tokens."""
    system = text[:600]

    def make(n_sink: int | None):
        return load(calibrated, n_ctx=1024, kv_budget=0.3, n_sink=n_sink)

    plain = make(None)
    n_system = build_opening(plain, "question", system).n_system
    assert min(layer.cells for layer in plain.kv_stats().layers) < n_system + 100
    with pytest.raises(DepthKVError, match="cannot be pinned"):
        Conversation(plain, system).say("Who?")

    llama = load_with_room(make, system)
    conversation = Conversation(llama, system, temperature=0.0, n_predict=2)
    conversation._n_ctx = 400  # as if the context were full sooner
    for question in questions(12):
        turn = conversation.say(question)
    assert conversation.rolls > 0
    assert turn.kv.bytes <= 0.3 * turn.kv.bytes_full * (1 + 1e-6)
    for i in range(len(turn.kv.layers)):
        assert llama.kv_positions(i)[:n_system] == list(range(n_system))


def test_no_room_for_the_system_prompt_at_all(load, text):
    with pytest.raises(DepthKVError, match="system prompt .* does not fit every layer") as caught:
        load_with_room(lambda n_sink: load(n_ctx=1024, kv_budget=0.2, n_sink=n_sink), text[:2000])
    assert "\n" not in str(caught.value)


def test_saved_and_read_again(begin, tmp_path):
    conversation = begin(n_ctx=1024)
    for question in questions(3):
        conversation.say(question)
    save(conversation, tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text())["model"].endswith(".gguf")

    again = begin(system="Another.", n_ctx=1024)
    again.say("Forgotten.")
    system, messages = read_saved(tmp_path / "chat.json")
    seen: list[int] = []
    again.replay(system, messages, on_prefill=seen.append)
    assert again.system == SYSTEM
    assert again.messages == conversation.messages
    assert context(again) == context(conversation)
    assert sum(seen) == again.replay_length(system, messages) == again.llama.n_tokens


def test_a_saved_conversation_longer_than_the_context(begin):
    messages = []
    for question in questions(12):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "Many things. " * 4}]
    conversation = begin(n_ctx=256)
    conversation.replay(SYSTEM, messages)
    assert conversation.rolls > 0 and conversation.messages == messages
    assert conversation.say("Name a colour.").tokens_new < 40


@pytest.mark.parametrize("how", ["too long", "stopped"])
def test_a_replay_that_fails_leaves_what_was_said(begin, how):
    conversation = begin()
    conversation.say("Name a colour.")
    kept, known = list(conversation.messages), context(conversation)
    assert not conversation.forgotten
    messages = [{"role": "user", "content": "word " * 600}, {"role": "assistant", "content": "No."}]
    if how == "too long":
        with pytest.raises(DepthKVError, match="longer than the context"):
            conversation.replay("Other.", kept + messages)
    else:
        calls = iter([False, True])
        with pytest.raises(Stopped):
            conversation.replay("Other.", kept + kept, stop=lambda: next(calls))
    assert conversation.messages == kept and conversation.system == SYSTEM
    assert conversation.forgotten and conversation.llama.n_tokens == 0
    conversation.replay(conversation.system, conversation.messages)
    assert conversation.messages == kept and context(conversation) == known and not conversation.forgotten


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", '"messages"'),
        ('{"messages": 1}', '"messages"'),
        ('{"messages": [], "system": 1}', '"system"'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "message 1"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 0"),
        ('{"messages": [], "system": "a\\ud800"}', r'"system" is not Unicode: .\\ud800. at character 1'),
        ('{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": "a"}]}', "message 0"),
    ],
)
def test_not_a_saved_conversation(tmp_path, written, part):
    (tmp_path / "chat.json").write_text(written)
    with pytest.raises(DepthKVError, match=part) as caught:
        read_saved(tmp_path / "chat.json")
    assert "chat.json" in str(caught.value) and "\n" not in str(caught.value)


def test_where_a_conversation_is_kept(begin, tmp_path, monkeypatch):
    conversation = begin()
    monkeypatch.setenv("HOME", str(tmp_path))
    save(conversation, Path("~/chat.json"))
    assert read_saved(Path("~/chat.json")) == (SYSTEM, [])
    assert (tmp_path / "chat.json").is_file()
    for name, part in ("~nosuchuser/x", "home directory"), ("a\0b", "null byte"), ("none/x", "No such file"):
        with pytest.raises(DepthKVError, match=f"cannot be written: .*{part}.*; give another path") as written:
            save(conversation, Path(name))
        with pytest.raises(DepthKVError, match=f"cannot be read: .*{part}.*; give another path") as read:
            read_saved(Path(name))
        assert str(written.value).isprintable() and str(read.value).isprintable()


def test_half_a_character_is_no_message(begin):
    conversation = begin()
    for system, message in ((SYSTEM, "caf\udce9"), ("\udcff", "Name a colour.")):
        conversation.system = system
        with pytest.raises(DepthKVError, match="not UTF-8 text"):
            conversation.say(message)
    conversation.system = SYSTEM
    conversation.say("Name a colour.")
    with pytest.raises(DepthKVError, match="not UTF-8 text"):
        conversation.say("caf\udce9")
    assert context(conversation) == rendered(conversation.messages)


def test_a_turn_does_not_depend_on_the_answer(begin):
    llama = begin().llama
    turn = build_turn(llama, "Name a city.", SYSTEM)
    full = "<|im_end|>\n<|im_start|>user\nName a city.<|im_end|>\n<|im_start|>assistant\n"
    assert llama.detokenize(turn.tokens, special=True).decode() == full
    assert build_turn(llama, "depthkv-answer", SYSTEM).n_system == turn.n_system


@pytest.mark.parametrize("blanks", ["", " ", "  ", "\n", "\n\n", "\t", " \n "])
def test_what_comes_before_a_message_does_not_depend_on_its_blanks(begin, blanks):
    llama = begin().llama
    for build in (build_opening, build_turn):
        plain, prompt = build(llama, "hello", SYSTEM), build(llama, f"{blanks}hello", SYSTEM)
        assert prompt.tokens[: prompt.n_system] == plain.tokens[: plain.n_system]
        written = b"".join(token_bytes(llama, token) for token in prompt.tokens[prompt.n_system :]).decode()
        assert written.lstrip().startswith("hello")


def test_a_model_without_a_template(begin, monkeypatch):
    conversation = begin("Some text.", n_predict=4)
    monkeypatch.delitem(conversation.llama.metadata, "tokenizer.chat_template")
    for question in ("One", "Two", "Three"):
        conversation.say(question)
    first, second, third = (message["content"] for message in conversation.messages[1::2])
    assert context(conversation) == f"Some text.\n\nOne{first}\n\nTwo{second}\n\nThree{third}"


def test_sliding_windows_roll_too(load, gemma3):
    """Gemma 3: five of six layers keep a window, whose positions are not shifted: what stays is computed again."""
    conversation = Conversation(load(gemma3, n_ctx=256, kv_budget=0.6), temperature=0.0, n_predict=4)
    for question in questions(14):
        turn = conversation.say(question)
        assert (turn.tokens_evaluated > turn.tokens_new) == (turn.tokens_dropped > 0)
        assert turn.tokens_evaluated < 200
    assert conversation.rolls > 0
    assert conversation.say("word " * 200).tokens_dropped > 0, "nothing else fits beside it"


def test_positions_that_cannot_be_shifted(begin):
    """What stays is computed again, and the conversation goes on with the same words."""
    shifted, computed = begin(n_ctx=256), begin(n_ctx=256)
    for question in questions(2):
        shifted.say(question)
    computed._can_shift = False
    again = []
    for question in questions(8):
        turn = computed.say(question)
        again.append(turn.tokens_evaluated - turn.tokens_new)
        text = context(computed)
        assert text == rendered(computed.messages[-2 * text.count("<|im_start|>user") :])
    assert computed.rolls > 0 and sum(n > 0 for n in again) == computed.rolls
    assert max(again) < 128 + 60, "the system prompt, and half of the rest at most"
    assert computed.messages[:4] == shifted.messages, "nothing is different before the first roll"


def test_the_scripted_chat():
    """`benchmarks/chat.py` on a small scale: it rolls several times, and every layer still holds the system prompt.

    Whether so small a model repeats it at the end depends on the last bits of the arithmetic, and so on the processor.
    """
    size = ("--turns", "10", "-c", "512", "--message", "64", "--predict", "12", "--threads", "2")
    outcome = run_python(str(ROOT / "benchmarks" / "chat.py"), "smollm2", "--kv-budget", "0.6", *size, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["rolls"] >= 2 and result["evicted"] > 0
    assert result["tokens_evaluated"] == result["tokens_new"]
    assert 0 <= result["tokens"] - result["engine_tokens"] <= 1, "every token is computed once"
    assert all(step["tokens_new"] < 200 for step in result["steps"])
    assert result["rss_spread"] < 0.02
    assert result["turns"] == 12 and result["tokens_system"] > 0 and result["system_held"]
    assert "4711" in result["first_answer"] and "4711" not in result["answer_without_system"]
