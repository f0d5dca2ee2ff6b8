"""Numbers as people read them. All end up in running text: the minus is a minus, and a unit never starts a line."""

from __future__ import annotations

import math

MISSING = "–"
_SPACE = "\N{NO-BREAK SPACE}"


def small(value: float | None) -> str:
    """Two digits that count, such as 0.0044; below 0.00001 as 3.1e-6."""
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = f"{value:.1e}"
    mantissa, exponent = rounded.split("e")
    if int(exponent) < -5:
        return _minus(f"{mantissa}e{int(exponent)}")
    return _minus(f"{float(rounded):.{max(0, 1 - int(exponent))}f}")


def plain(value: float) -> str:
    """A tick of an axis: as few digits as say it, 0.001 rather than 1e-3."""
    text = small(value) if 0 < abs(value) < 1e-5 else f"{value:.10f}".rstrip("0").rstrip(".")
    return _minus(text.replace(".0e", "e"))


def fixed(value: float | None, digits: int) -> str:
    """So many digits after the point."""
    return _minus(f"{value:.{digits}f}") if is_number(value) else MISSING


def nats(value: float | None) -> str:
    """A log-probability of several tokens: three digits that count, or two below 1."""
    return fixed(value, 1 if is_number(value) and abs(value) >= 9.995 else 2)


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1."""
    return f"{fixed(100 * share, digits)}{_SPACE}%" if is_number(share) else MISSING


def times(ratio: float | None) -> str:
    return f"{fixed(ratio, 2)}×" if is_number(ratio) else MISSING


def mib(n_bytes: float) -> str:
    return f"{fixed(n_bytes / 2**20, 1)}{_SPACE}MiB"


def count(value: float | None) -> str:
    """A whole number in groups of three."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}") if is_number(value) else MISSING


def duration(seconds: float) -> str:
    """In the largest unit of which there is more than one."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f}{_SPACE}{name}"
    return f"{seconds:.0f}{_SPACE}s"


def is_number(value: float | None) -> bool:
    """Whether there is a value that can be drawn or printed."""
    return value is not None and math.isfinite(value)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}") if text.strip("-0.") else text.replace("-", "")
