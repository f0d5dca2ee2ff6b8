"""Conversations as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from depthkv_edge.chat.conversation import Conversation
from depthkv_edge.errors import DepthKVError

_PATH_ERRORS = (OSError, ValueError, RuntimeError)  # no such file, a NUL in its name, no such home directory


def check_messages(data: Any) -> tuple[str, list[dict[str, str]]]:
    """System prompt and messages of a saved conversation.

    Raises:
        DepthKVError: `data` is not one; the message names the first thing that is wrong.
    """
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise DepthKVError('it is not a saved conversation: an object with "messages" is needed')
    system = data.get("system", "")
    if not isinstance(system, str):
        raise DepthKVError('its "system" is not a text')
    _check_unicode('"system"', system)
    messages = []
    for i, message in enumerate(data["messages"]):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
            raise DepthKVError(f'its message {i} is not of the role "{role}" with a text as "content"')
        _check_unicode(f"message {i}", message["content"])
        messages.append({"role": role, "content": message["content"]})
    if len(messages) % 2:
        raise DepthKVError("its last message has no answer")
    return system, messages


def _check_unicode(name: str, text: str) -> None:
    # JSON can write down half of a character, which no tokenizer takes
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DepthKVError(f"its {name} is not Unicode: {text[error.start]!a} at character {error.start}") from None


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON: model, system prompt, all messages.

    Args:
        path: a `~` at its beginning is a home directory.

    Raises:
        DepthKVError: the file cannot be written.
    """
    data = {
        "model": Path(conversation.llama.model_path).name,
        "system": conversation.system,
        "messages": conversation.messages,
    }
    try:
        path.expanduser().write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except _PATH_ERRORS as error:
        raise DepthKVError(f"{_shown(path)} cannot be written: {_why(error)}; give another path") from None


def read_saved(path: Path) -> tuple[str, list[dict[str, str]]]:
    """System prompt and messages of a file that `save` wrote.

    Args:
        path: a `~` at its beginning is a home directory.

    Raises:
        DepthKVError: the file cannot be read, or is not a saved conversation.
    """
    try:
        written = path.expanduser().read_bytes()
    except _PATH_ERRORS as error:
        raise DepthKVError(f"{_shown(path)} cannot be read: {_why(error)}; give another path") from None
    try:
        data = json.loads(written.decode())
    except (ValueError, RecursionError):
        raise DepthKVError(f"{_shown(path)} is not JSON: give a file that /save wrote") from None
    try:
        return check_messages(data)
    except DepthKVError as error:
        raise DepthKVError(f"{_shown(path)}: {error}") from None


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".")
