"""How much of the full KV cache a context may have, as users write it. native/src/llama-kv-budget.cpp reads it."""

from __future__ import annotations

from dataclasses import dataclass

from depthkv_edge.errors import DepthKVError

FORMS = 'a fraction in (0, 1], "60%", "96MiB", "4096t" (tokens per layer on average) or "auto"'
FRACTION, BYTES, TOKENS, AUTO = range(4)  # enum llama_depthkv_budget_type

_MOST_CHARACTERS = 100  # a key-value override has room for 127 bytes


@dataclass(frozen=True)
class Budget:
    """A budget that the engine understands.

    Attributes:
        text: as it was written.
        kind: what the number is: FRACTION, BYTES (of K and V over all layers), TOKENS (that a layer holds, on average)
            or AUTO (the largest cache that fits free memory: see fit.py).
        value: the number.
    """

    text: str
    kind: int
    value: float

    @property
    def is_auto(self) -> bool:
        return self.kind == AUTO


def parse_budget(written: Budget | float | str) -> Budget:
    """Read a budget as users write it.

    Raises:
        DepthKVError: not one of the forms, or a value out of range.
    """
    from depthkv_edge.engine import capi  # imported here: other commands start without the engine

    if isinstance(written, Budget):
        return written
    text = str(written)
    if len(text) > _MOST_CHARACTERS or not text.isprintable():
        raise DepthKVError(f"KV budget {text[:_MOST_CHARACTERS]!r} is not understood: give {FORMS}")
    raw = capi.llama_depthkv_budget()
    if not capi.llama_depthkv_budget_parse(text.encode("utf-8", "replace"), raw):
        raise DepthKVError(capi.last_error())
    return Budget(text.strip(), raw.type, raw.value)


def parse_size(written: str) -> int:
    """Bytes of a size as users write it: `512MiB`, `1.5GB`, `800 kb`.

    Raises:
        DepthKVError: not a number with a unit, or less than one byte.
    """
    try:
        size = parse_budget(written)
    except DepthKVError:
        size = None
    if size is None or size.kind != BYTES:
        raise DepthKVError(f"memory {written!r} is not understood: give a size such as 512MiB or 2GB")
    return int(size.value)
