"""The prompt: a long real text."""

from __future__ import annotations

from pathlib import Path

from depthkv_edge.errors import DepthKVError


def prompt_text(file: str | None) -> str:
    """The text of a file, or the Python reference, which comes with every Python: about 100,000 tokens.

    Raises:
        DepthKVError: the file is missing or not text.
    """
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(file).read_text("utf-8-sig")
    except FileNotFoundError:
        raise DepthKVError(f"prompt {file} does not exist: give the path of a text file with --prompt") from None
    except OSError as error:
        raise DepthKVError(f"prompt {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DepthKVError(f"prompt {file} is not UTF-8 text (byte {error.start}): convert it first") from None
