"""What llama.cpp logs, and why a call of it failed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from depthkv_edge.engine import capi
from depthkv_edge.engine.capi import llama_cpp

_ERROR, _CONT = 4, 5  # enum ggml_log_level
_capture = threading.local()
_bindings_callback = llama_cpp._logger.llama_log_callback


@llama_cpp.llama_cpp.llama_log_callback
def log_callback(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Takes every line that llama.cpp logs in this process."""
    lines: list[str] | None = getattr(_capture, "lines", None)
    if lines is None or _capture.verbose:
        _bindings_callback(level, text, user_data)
    if lines is None:
        return
    if level == _ERROR:
        lines.append(text.decode("utf-8", "replace"))
    elif level == _CONT and _capture.level == _ERROR and lines:
        lines[-1] += text.decode("utf-8", "replace")
    if level != _CONT:
        _capture.level = level


llama_cpp.llama_cpp.llama_log_set(log_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def capture_errors(verbose: bool) -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs on this thread; without `verbose` they are not printed."""
    previous = getattr(_capture, "lines", None), getattr(_capture, "verbose", True), getattr(_capture, "level", 0)
    _capture.lines, _capture.verbose, _capture.level = [], verbose, 0
    try:
        yield _capture.lines
    finally:
        _capture.lines, _capture.verbose, _capture.level = previous


def reason(lines: list[str], path: Path | str | None = None) -> str:
    """Why the last call failed, in the engine's own words; empty if it says nothing.

    Args:
        lines: the error lines of that call: upstream refuses some parameters of a context there only.
        path: the model file, if it was loaded.
    """
    error = capi.last_error()
    if path is not None and not capi.llama_depthkv_check_file(os.fsencode(path)):
        return capi.last_error()  # of a damaged file the loader says no more than that it has failed
    return error or (lines[-1].strip().rpartition(": ")[2] if lines else "")
