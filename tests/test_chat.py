"""The prompt, and the pin on its system part."""

from __future__ import annotations

import pytest

from depthkv_edge import DepthKVError
from depthkv_edge.chat import build_prompt, user_message
from depthkv_edge.run import answer, token_bytes

SYSTEM = "You are a terse assistant. Answer in one word, and always in English."


def test_document_first():
    assert user_message("A text.\n", "A question?") == "A text.\n\nA question?"
    assert user_message("", "A question?") == "A question?"
    assert user_message("A text.", "") == "A text."


def test_through_the_template(load):
    llama = load()
    prompt = build_prompt(llama, "Who?", SYSTEM)
    rendered = llama.detokenize(prompt.tokens, special=True).decode()
    assert rendered == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    system = llama.detokenize(prompt.tokens[: prompt.n_system], special=True).decode()
    assert system == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"


def test_nothing_to_pin_without_a_system_prompt(load):
    assert build_prompt(load(), "Who?").n_system == 0


@pytest.mark.parametrize("user", ["a", "b", "aa", "", "Who?"])
def test_system_part_does_not_depend_on_the_message(load, user):
    llama = load()
    assert build_prompt(llama, user, SYSTEM).n_system == build_prompt(llama, "Other", SYSTEM).n_system


def test_system_prompt_is_never_evicted(load, text):
    llama = load(n_ctx=1024, kv_budget=0.25)
    prompt = build_prompt(llama, text[:3000], SYSTEM)
    result = answer(llama, prompt, 40)
    assert result.kv.n_evict > 0
    for i in range(len(result.kv.layers)):
        assert llama.kv_positions(i)[: prompt.n_system] == list(range(prompt.n_system))


def test_system_prompt_too_long_to_pin(load, text):
    llama = load(n_ctx=1024, kv_budget=0.25)
    with pytest.raises(DepthKVError) as caught:
        answer(llama, build_prompt(llama, "Who?", text[:2500]), 4)
    assert "\n" not in str(caught.value)


def test_answers_start_from_an_empty_context(load):
    llama = load(kv_budget=0.5)
    first = answer(llama, build_prompt(llama, "Name a colour.", SYSTEM), 8)
    answer(llama, build_prompt(llama, "Name a city.", SYSTEM), 8)
    again = answer(llama, build_prompt(llama, "Name a colour.", SYSTEM), 8)
    assert again.text == first.text
    assert again.kv.layers == first.kv.layers


def test_characters_of_several_tokens_come_whole(load):
    llama = load()
    written = "héllo 🦙 世界 " + " " * 40 + "x"
    tokens = llama.tokenize(written.encode(), add_bos=False)
    assert b"".join(token_bytes(llama, token) for token in tokens).decode() == written
    assert any(not is_text(token_bytes(llama, token)) for token in tokens), "a token ends inside a character"


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
