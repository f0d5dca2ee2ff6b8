"""One question about one document, as the tokens that a model expects."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from depthkv_edge._native import llama_cpp
from depthkv_edge.errors import DepthKVError
from depthkv_edge.llama import Llama

_api = llama_cpp.llama_cpp


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
        DepthKVError: the template is broken, or refuses a system prompt.
    """
    tokens = _render(llama, user, system)
    if not system:
        return Prompt(tokens, n_system=0)
    # two messages that differ from their first letter on share exactly what comes before them
    probes = [_render(llama, letter, system) for letter in "ab"]
    return Prompt(tokens, n_system=_common_prefix(*probes, tokens))


def _render(llama: Llama, user: str, system: str) -> list[int]:
    if _api.llama_vocab_type(llama._model.vocab) == _api.LLAMA_VOCAB_TYPE_NONE:
        raise DepthKVError(f"model {llama.model_path} has no tokenizer: give a model that reads text")
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:  # a base model: plain text
        text = f"{system}\n\n{user}" if system else user
        return llama.tokenize(text.encode(), add_bos=True, special=False)
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            template=template, eos_token=_text(llama, llama.token_eos()), bos_token=_text(llama, llama.token_bos())
        )
        rendered = formatter(messages=messages)  # type: ignore[arg-type]
    except (TemplateError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "; try without a system prompt" if system else ""
        raise DepthKVError(f"the model's chat template fails: {why}{advice}") from error
    return llama.tokenize(rendered.prompt.encode(), add_bos=not rendered.added_special, special=True)


def _text(llama: Llama, token: int) -> str:
    return llama._model.token_get_text(token) if token >= 0 else ""


def _common_prefix(*sequences: list[int]) -> int:
    n = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        n += 1
    return n
