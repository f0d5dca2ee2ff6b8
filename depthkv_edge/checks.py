"""Numbers that the engine takes as they are: too large a one would arrive as another, and some would crash it."""

from __future__ import annotations

import contextlib
import operator
import os
from typing import Any

from depthkv_edge.errors import DepthKVError

INT32_MAX = 2**31 - 1
MAX_THREADS = 512  # GGML_MAX_N_THREADS of ggml.h, beyond which arrays overflow
_FEW_THREADS = 64  # run on any machine, if slowly
_THREADS_PER_CORE = 4  # more wait for each other most of the time


def check_number(name: str, value: Any, least: int = 0, most: int = INT32_MAX) -> int:
    """A whole number in a range.

    Args:
        name: what the user calls it.

    Raises:
        DepthKVError: it is no whole number, or not in the range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise DepthKVError(f"{name} {value!r} is not a whole number: give {least} to {most}") from None
    if not least <= number <= most:
        raise DepthKVError(f"{name} {_short(number)} is out of range: give {least} to {most}")
    return number


def check_threads(name: str, value: Any) -> int:
    """A number of CPU threads.

    Raises:
        DepthKVError: it is no whole number, below 1, or so far above the cores that nothing would get done.
    """
    cores = os.cpu_count() or 1
    most = min(MAX_THREADS, max(_FEW_THREADS, _THREADS_PER_CORE * cores))
    with contextlib.suppress(TypeError):
        number = operator.index(value)
        if number > most:
            raise DepthKVError(
                f"{name} {_short(number)} is far above the {cores} cores of this machine: give 1 to {most}"
            )
    return check_number(name, value, 1, most)


def default_threads() -> int:
    """The physical cores, or as many as the engine has room for."""
    import psutil  # imported here: not every use of the package counts them

    return min(MAX_THREADS, psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def _short(number: int) -> str:
    # Python refuses to write out numbers of thousands of digits
    return str(number) if abs(number) < 10**30 else "of more than 30 digits"
