"""Bytes as a terminal shows them; quality/typeset.py sets them for a page."""

from __future__ import annotations


def mib(n_bytes: float) -> str:
    """MiB with one decimal, without the unit."""
    return f"{n_bytes / 2**20:.1f}"


def kv_share(n_bytes: int, n_bytes_full: int) -> str:
    """A KV cache beside the full one: `108.0 MiB of 180.0 MiB (60%)`."""
    return f"{mib(n_bytes)} MiB of {mib(n_bytes_full)} MiB ({n_bytes / max(1, n_bytes_full):.0%})"
