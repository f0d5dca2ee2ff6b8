"""Ctrl-C while the engine works."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from depthkv_edge.errors import Stopped


@contextlib.contextmanager
def interruptible(stopping: threading.Event) -> Iterator[None]:
    """Let Ctrl-C stop the next decode: raised at once, it may be lost in llama.cpp's log callback.

    A second one is raised at once.
    """

    def stop(signum: int, frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield
        return
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
        interrupted = stopping.is_set()
    except Stopped:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        raise KeyboardInterrupt
