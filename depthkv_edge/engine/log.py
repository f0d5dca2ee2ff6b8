"""llama.cpp reports why a load failed only through its log: collect the error lines while one is under way."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator

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


def reason(lines: list[str]) -> str:
    """The line that says why, among the error lines of one failed load; empty if there is none."""
    # "llama_model_load: error loading model: <why>" says it best, unless <why> is only that loading failed: then the
    # reader of the file has spoken before
    for line in lines:
        if (match := re.search(r"error loading model: (.*)", line)) and "failed to load" not in match[1]:
            return match[1].strip()
    for line in lines:
        origin, _, text = line.strip().rpartition(": ")
        if text and "failed to load" not in text:
            return f"damaged or incomplete ({text})" if origin.startswith("gguf_") else text
    return ""
