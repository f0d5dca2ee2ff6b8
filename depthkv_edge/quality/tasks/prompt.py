"""Tokens of what a model is asked: in plain text, or through its own chat template."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.model import Model, api
from depthkv_edge.errors import DepthKVError

_DOCUMENT = "<<document>>"  # where the document goes, in a rendered template


@dataclass(frozen=True)
class Frame:
    """What a chat is made of around a document.

    Attributes:
        head: tokens before the document, the system prompt among them: nothing in them depends on the document.
        tail: the text after the document, the question in it and the beginning of the model's turn.
    """

    head: list[int]
    tail: str


def frame(model: Model, question: str, system: str = "") -> Frame:
    """The document first, the question after it: the document is read, and evicted from, not knowing the question.

    A model without a template gets the same in plain text.

    Raises:
        DepthKVError: the model's template is broken.
    """
    template = model.chat_template()
    user = f"{_DOCUMENT}\n\n{question}"
    if template is None:
        text = "\n\n".join(filter(None, (system, user, "Answer:\n")))
    else:
        text = _render(model, template, user, system)
    head, found, tail = text.partition(_DOCUMENT)
    if not found or _DOCUMENT in tail:
        raise DepthKVError(f"{model.path}: the chat template does not render a user's message once")
    has_bos = template is not None  # a template puts it where it belongs
    return Frame(([] if has_bos else model.bos) + model.tokenize(head, special=True), tail)


def follow(model: Model, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of the answer after it, as they are when tokenised together."""
    alone, both = (model.tokenize(text, special=True) for text in (prompt, prompt + answer))
    n = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
    return both[:n], both[n:]


def _render(model: Model, template: str, user: str, system: str) -> str:
    vocab = api.llama_model_get_vocab(model.handle)
    bos, eos = (
        api.llama_vocab_get_text(vocab, token).decode() if token >= 0 else ""
        for token in (api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab))
    )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    try:
        formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
        return formatter(messages=messages).prompt  # type: ignore[arg-type]
    except (TemplateError, ValueError) as error:
        if system:  # some templates know none: it goes where such models are told to read it
            return _render(model, template, f"{system}\n\n{user}", "")
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DepthKVError(f"{model.path}: the chat template fails: {why}") from error
