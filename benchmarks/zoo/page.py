"""docs/support.md: what works on which model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.zoo.check import Attempt, Check

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

_HEADERS = (
    "model",
    "architecture",
    "layers, with a budget",
    "heads, KV heads, size",
    "F16",
    "q8_0",
    "q4_0",
    "context shift",
)

TOP = """\
# What works on which model

Written by `.venv/bin/python -m benchmarks.zoo` (some minutes on two cores); the test suite repeats it. Each model is a
file with random weights and the attention of the real one: layers, heads, KV heads, head sizes, sliding windows, sinks,
RoPE, context and the name of its architecture. Feed-forward layers and vocabulary are tiny, and so is the width where
the architecture allows it.

- **All layers**, in every combination: a context with a budget of 40 % is made; `doctor` and `inspect` read the file.
- **A few layers**, in every combination: with room for everything the logits are those of stock llama.cpp (normalised
  squared error below 1e-10; where V is quantised, about as near to those of F16 cells as stock's), also after a context
  shift. With half of the cells a prompt larger than they are is read, tokens are decoded, the context shifts, and the
  sequence is saved and restored. Prompts have 200 tokens and sliding windows 64 here, whatever the real model's.

A type is listed with the attention kernels that it works with: `fa` with flash attention, `no fa` without. A quantised
V needs flash attention, as in stock llama.cpp: without it only K is quantised. Defaults (F16, and the engine chooses
the kernel) are tried as well.

"""

_REFUSED = """
## Refused

A budget is refused in a line that names the architecture and says why; without one these models run as in stock
llama.cpp. From the tiny model of every architecture that llama.cpp's own tests write:

"""


def row(check: Check) -> list[str]:
    """A line of the table."""
    shape = check.shape
    n, budget = shape.n_layers, check.n_layers_budget
    head = f"{shape.head}" if not shape.head_swa else f"{shape.head} ({shape.head_swa} in windows)"
    return [
        shape.name,
        shape.arch,
        f"{n}" if n == budget else f"{n}, {budget}",
        f"{shape.n_heads}, {shape.n_heads_kv}, {head}",
        *(_kernels(check.ran, type_k) for type_k in ("f16", "q8_0", "q4_0")),
        "yes" if all(attempt.shifted for attempt in check.ran) else "no: windows",
    ]


def render(rows: Sequence[Sequence[str]], refused: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        refused: architectures, and why.
    """
    return TOP + tabulate(rows, _HEADERS, tablefmt="pipe", disable_numparse=True) + "\n" + refusals(refused)


def refusals(refused: Sequence[tuple[str, str]]) -> str:
    """The end of the page."""
    why = sorted({reason for _, reason in refused})
    groups = [(", ".join(arch for arch, reason in refused if reason == each), each) for each in why]
    return _REFUSED + tabulate(groups, ("architectures", "why"), tablefmt="pipe", disable_numparse=True) + "\n"


def _kernels(attempts: Sequence[Attempt], type_k: str) -> str:
    ok = {a.flash_attn for a in attempts if a.type_k == type_k and a.result == "ok"}
    names = [name for kernel, name in (("enabled", "fa"), ("disabled", "no fa")) if kernel in ok]
    return ", ".join(names) or "no"
