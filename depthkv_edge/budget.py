"""How much of the full KV cache a context may have: what users write, and the fraction it comes to."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from depthkv_edge.errors import DepthKVError

FORMS = 'a fraction in (0, 1], "60%", "96MiB", "4096t" (tokens per layer on average) or "auto"'

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_WRITTEN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf)\s*(%|t|[kmg]i?b)?", re.IGNORECASE)


@dataclass(frozen=True)
class FullCache:
    """The full KV cache of a context.

    Attributes:
        n_ctx: positions of one sequence.
        bytes_growing: K and V of the layers whose cells grow with the context, which a budget shrinks.
        bytes_window: K and V of the sliding-window layers, which it leaves alone.
    """

    n_ctx: int
    bytes_growing: int
    bytes_window: int


@dataclass(frozen=True)
class Fraction:
    """A share of the full cache, in (0, 1]."""

    value: float

    def resolve(self, full: FullCache) -> float:
        return self.value


@dataclass(frozen=True)
class Bytes:
    """Bytes of K and V over all layers."""

    value: int

    def resolve(self, full: FullCache) -> float:
        return _share(self.value, full)


@dataclass(frozen=True)
class Tokens:
    """Tokens that a layer holds, on average."""

    value: int

    def resolve(self, full: FullCache) -> float:
        return largest_share(self.value, full.n_ctx)


@dataclass(frozen=True)
class Auto:
    """The largest cache that fits free memory: see fit.py."""


Budget = Fraction | Bytes | Tokens | Auto


def parse_budget(written: Budget | float | str) -> Budget:
    """Read a budget as users write it.

    Raises:
        DepthKVError: not one of the forms, or a value out of range.
    """
    if isinstance(written, Budget):
        return written
    text = str(written).strip()
    if text.lower() == "auto":
        return Auto()
    match = _WRITTEN.fullmatch(text)
    if match is None or isinstance(written, bool):
        raise DepthKVError(f"KV budget {text!r} is not understood: give {FORMS}")
    value, unit = float(match[1]), (match[2] or "").lower()
    if not (math.isfinite(value) and value > 0):
        raise DepthKVError(f"KV budget {text} is not above 0: give {FORMS}")
    if unit in _UNITS:
        return Bytes(_whole(value * _UNITS[unit], text, "byte"))
    if unit == "t":
        return Tokens(_whole(value, text, "token"))
    fraction = value / 100 if unit == "%" else value
    if fraction > 1:
        raise DepthKVError(f"KV budget {text} is above the full cache: give {FORMS}")
    if np.float32(fraction) == 0:  # the engine reads 32 bits, where 0 means no budget
        raise DepthKVError(f"KV budget {text} is not above 0: give {FORMS}")
    return Fraction(fraction)


def parse_size(written: str) -> int:
    """Bytes of a size as users write it: `512MiB`, `1.5GB`, `800 kb`.

    Raises:
        DepthKVError: not a number with a unit, or less than one byte.
    """
    match = _WRITTEN.fullmatch(written.strip())
    unit = (match[2] or "").lower() if match else ""
    if match is None or unit not in _UNITS:
        raise DepthKVError(f"memory {written!r} is not understood: give a size such as 512MiB or 2GB")
    n_bytes = float(match[1]) * _UNITS[unit]
    if not (math.isfinite(n_bytes) and n_bytes >= 1):
        raise DepthKVError(f"memory {written} is less than one byte: give a size such as 512MiB or 2GB")
    return int(min(n_bytes, 2.0**62))


def largest_share(part: int, whole: int) -> float:
    """`part / whole`, at most 1, as a 32-bit fraction `f` with `floor(f * whole) <= part`.

    The engine reads the budget as a 32-bit float: a share rounded to the nearest could exceed what was asked for, and
    one always rounded down would lose a whole cell where the share is exact.
    """
    if part >= whole:
        return 1.0
    below = above = np.float32(part / whole)
    while float(above) < part / whole:
        above = np.nextafter(above, np.float32(1))
    while int(float(below) * whole) > part:
        below = np.nextafter(below, np.float32(0))
    return float(above if int(float(above) * whole) <= part else below)


def _whole(value: float, text: str, unit: str) -> int:
    if value < 1:
        raise DepthKVError(f"KV budget {text} is less than one {unit}: give {FORMS}")
    return int(min(value, 2.0**62))


def _share(n_bytes: int, full: FullCache) -> float:
    part = n_bytes - full.bytes_window
    if part <= 0:
        raise DepthKVError(
            f"a KV budget of {n_bytes} bytes is less than the {full.bytes_window} bytes of the sliding-window layers, "
            "which are never reduced: give more"
        )
    return largest_share(part, full.bytes_growing)
