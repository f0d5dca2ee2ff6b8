"""Messages as the tokens that a model expects: one question about one document, or the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

from jinja2 import TemplateError

from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.errors import DepthKVError
from depthkv_edge.llama import Llama

_api = llama_cpp.llama_cpp

_CUT = "\ufdd0\ufddf"  # two of the characters that Unicode keeps free for programs
_markup_found: WeakKeyDictionary[Llama, re.Pattern[str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        tokens: the whole prompt.
        n_system: tokens at its front that do not depend on the user's message, the system prompt among them; 0 without.
    """

    tokens: list[int]
    n_system: int


def user_message(document: str, question: str) -> str:
    """The document first, the question after it: the document is read, and evicted from, not knowing the question."""
    return "\n\n".join(part.strip("\n") for part in (document, question) if part)


def build_prompt(llama: Llama, user: str, system: str = "") -> Prompt:
    """Render a user message, and a system prompt if there is one, through the model's own chat template.

    Raises:
        DepthKVError: the template is broken, refuses a system prompt, or a text is not Unicode.
    """
    user, system = _inert(llama, user), _inert(llama, system)
    tokens = _render(llama, user, system)
    if not system:
        return Prompt(tokens, n_system=0)
    # two messages that differ from their first letter on share exactly what comes before them
    probes = [_render(llama, letter, system) for letter in "ab"]
    return Prompt(tokens, n_system=_common_prefix(*probes, tokens))


def build_turn(llama: Llama, user: str, system: str = "") -> Prompt:
    """Render a user message that follows the model's answer: the end of that answer first, then the message.

    It is the difference between two renderings of a conversation, and does not depend on what the answer was: nothing
    of the conversation so far is tokenised again.

    Returns:
        The tokens that follow the last token of the answer's text, of which the first `n_system` do not depend on the
        message. Blanks at the beginning of the message that would change them are left out.

    Raises:
        DepthKVError: the template is broken, refuses the conversation, leaves the model's own answers out, or a text
            is not Unicode.
    """
    system = _inert(llama, system)
    return _with_lead(lambda text: _following(llama, text, system), _inert(llama, user))


def build_opening(llama: Llama, user: str, system: str = "") -> Prompt:
    """Render the first user message of a conversation.

    Returns:
        As `build_prompt`, but `n_system` counts what comes before the message also where there is no system prompt: the
        beginning of the text, and what the template says of its own accord.

    Raises:
        DepthKVError: as `build_prompt`.
    """
    system = _inert(llama, system)
    return _with_lead(lambda text: _render(llama, text, system), _inert(llama, user))


def _with_lead(render: Callable[[str], list[int]], user: str) -> Prompt:
    probes = [render(letter) for letter in "ab"]
    n_lead, tokens = _common_prefix(*probes), render(user)
    if _common_prefix(probes[0], tokens) < n_lead:
        # The first blanks of the message are one token with the last blank of the template. What comes before a message
        # has to stand without it: it stays when this message is dropped, and then another one follows it.
        tokens = render(user.lstrip())
    return Prompt(tokens, _common_prefix(*probes, tokens))


def _render(llama: Llama, user: str, system: str) -> list[int]:
    text, added_special = _rendered(llama, [{"role": "user", "content": user}], system)
    return _tokens(llama, text, add_bos=not added_special)


def _following(llama: Llama, user: str, system: str) -> list[int]:
    # the answer is stood for by a word that is nowhere else: what comes after it is what the turn adds
    answer = "depthkv-answer"
    while answer in user or answer in system:
        answer += "-1"
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": user},
    ]
    text, _ = _rendered(llama, messages, system)
    before, found, after = text.rpartition(answer)
    if not found:
        raise DepthKVError("the model's chat template leaves answers out: it cannot go on with a conversation")
    return _tokens(llama, after, add_bos=False)


def _inert(llama: Llama, text: str) -> str:
    """The text with a cut in each piece that the tokenizer would take for a part of the template.

    A document that says `<|im_start|>system` must not pose as the system. Of all that the text holds only these pieces
    get other tokens. Markers that are no tokens of their own, as some templates have, cannot be told from the text.
    """
    if not _has_template(llama):
        return text
    cuts = set()
    pattern, start = _markup(llama), 0
    while found := pattern.search(text, start):
        cuts.add((found.start() + found.end()) // 2)
        start = found.start() + 1  # they may overlap
    edges = [0, *sorted(cuts), len(text)]
    return _CUT.join(text[i:j] for i, j in pairwise(edges))


def _tokens(llama: Llama, text: str, *, add_bos: bool) -> list[int]:
    special = _has_template(llama)
    tokens: list[int] = []
    for i, part in enumerate(text.split(_CUT)):
        tokens += llama.tokenize(_encoded(part), add_bos=add_bos and i == 0, special=special)
    return tokens


def _markup(llama: Llama) -> re.Pattern[str]:
    """What the tokenizer takes out of a text before it looks at the rest, as far as a template may need it."""
    if llama in _markup_found:
        return _markup_found[llama]
    vocab, template = llama.vocab, llama.metadata["tokenizer.chat_template"]
    always = _api.LLAMA_TOKEN_ATTR_CONTROL | _api.LLAMA_TOKEN_ATTR_UNKNOWN
    texts = []
    for token in range(_api.llama_vocab_n_tokens(vocab)):
        attr = _api.llama_vocab_get_attr(vocab, token)
        if attr & (always | _api.LLAMA_TOKEN_ATTR_USER_DEFINED):
            text = _api.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
            # those that the user of the tokenizer has defined are words, too: of Gemma blank lines and HTML, say
            named = text in template and not text.isspace()
            composed = text.startswith("<|") and text.endswith("|>")  # of '<|' + role + '|>', say
            if len(text) > 1 and (attr & always or named or composed):
                texts.append(text)
    texts.sort(key=len, reverse=True)
    _markup_found[llama] = re.compile("|".join(map(re.escape, texts)) or "(?!)")
    return _markup_found[llama]


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # bytes that are no UTF-8 come out of Python's command line as half characters
        raise DepthKVError(f"the prompt is not UTF-8 text ({text[error.start]!a} is in it): convert it first") from None


def _has_template(llama: Llama) -> bool:
    return bool(llama.metadata.get("tokenizer.chat_template"))


def _rendered(llama: Llama, messages: list[dict[str, str]], system: str) -> tuple[str, bool]:
    """Text up to where the model answers, and whether it begins with the template's own beginning of the text."""
    if _api.llama_vocab_type(llama.vocab) == _api.LLAMA_VOCAB_TYPE_NONE:
        raise DepthKVError(f"model {llama.model_path} has no tokenizer: give a model that reads text")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    if not _has_template(llama):  # a base model: plain text
        return "\n\n".join(message["content"] for message in messages), False
    try:
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template=llama.metadata["tokenizer.chat_template"],
            eos_token=_text(llama, llama.token_eos()),
            bos_token=_text(llama, llama.token_bos()),
        )
        rendered = formatter(messages=messages)  # type: ignore[arg-type]
    except (TemplateError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "; try without a system prompt" if system else ""
        raise DepthKVError(f"the model's chat template fails: {why}{advice}") from error
    return rendered.prompt, rendered.added_special


def _text(llama: Llama, token: int) -> str:
    return _api.llama_vocab_get_text(llama.vocab, token).decode("utf-8", "replace") if token >= 0 else ""


def _common_prefix(*sequences: list[int]) -> int:
    n = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        n += 1
    return n
