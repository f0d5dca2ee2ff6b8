"""Standard streams as a command finds them: closed, full, a pipe without a reader, in an encoding of its own."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from depthkv_edge.errors import DepthKVError

if TYPE_CHECKING:
    from collections.abc import Buffer  # Python 3.12


class StreamError(DepthKVError):
    """A standard stream cannot be read or written."""


# Of bytes, not of text: click puts an encoding of its own around standard output where that is ASCII.
class _Output(io.BufferedWriter):
    """Standard output: what cannot be written ends the command with one line. A pipe without a reader stays one."""

    def write(self, data: Buffer) -> int:
        with _explained():
            return super().write(data)

    def flush(self) -> None:
        with _explained():
            super().flush()


class _Messages(io.BufferedWriter):
    """Standard error: what cannot be written is not worth an answer."""

    def write(self, data: Buffer) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(memoryview(data))

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StreamError(
            f"standard output cannot be written ({_why(error)}): give it a terminal, a file or a pipe"
        ) from None


def _why(error: OSError) -> str:
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)


def prepare_streams() -> None:
    """Make the standard streams safe to use. To be called before anything else is opened.

    A stream that is closed is taken by the null device, opened the wrong way round: using it fails, and no file that is
    opened later can come by its number, where messages of the engine would be written into it. That holds for a program
    that this process becomes, too.
    """
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    # characters that its encoding does not have are question marks; what is JSON has none of them
    sys.stdout = _rewrapped(_Output, sys.stdout, 1, "replace")
    sys.stderr = _rewrapped(_Messages, sys.stderr, 2, "backslashreplace")


def _rewrapped(kind: type[io.BufferedWriter], stream: TextIO | None, fd: int, errors: str) -> TextIO:
    if stream is None:
        return io.TextIOWrapper(kind(open(fd, "wb", buffering=0, closefd=False)), encoding="utf-8", errors=errors)
    if type(stream) is not io.TextIOWrapper:  # somebody's own
        return stream
    line_buffering, encoding = stream.line_buffering, stream.encoding
    buffer = stream.detach()
    raw = buffer.detach() if isinstance(buffer, io.BufferedWriter) else buffer  # python -u has no buffer
    return io.TextIOWrapper(kind(raw), encoding=encoding, errors=errors, line_buffering=line_buffering)


def abandon_output() -> None:
    """Write no more to standard output, not even what is buffered: the interpreter would fail once more at exit."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


def read_input() -> bytes:
    """All of standard input.

    Raises:
        StreamError: it cannot be read.
    """
    with reading():
        return sys.stdin.buffer.read()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around reading standard input.

    Raises:
        StreamError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise StreamError(f"standard input cannot be read ({_why(error)}): give it a file or a pipe") from None


def echo_json(value: Any) -> None:
    """One JSON object on standard output, in whatever encoding that is."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "").replace("_", "")
    click.echo(json.dumps(value, ensure_ascii=not encoding.startswith("utf"), allow_nan=False))
