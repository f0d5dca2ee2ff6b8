"""What follows from the numbers of a report, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from depthkv_edge.quality.typeset import fixed, mib, nats, percent, plain, small, times

Report = dict[str, Any]
Row = dict[str, Any]

LIMIT = 0.01  # nats per token: up to here a cache is called close to the full one
_ROUNDING = 1e-9  # nats per token: below it, a ratio of two divergences says nothing
_OURS = "depth"


@dataclass(frozen=True)
class Verdict:
    """What a reader should know first.

    Attributes:
        summary: the smallest cache that is close to the full one, and what it would take otherwise.
        remarks: who is better where, and what may be noise.
    """

    summary: str
    remarks: list[str]


def verdict(report: Report) -> Verdict:
    """Words for the numbers of all rows that KL divergence was measured of."""
    full, noise, *methods = report["rows"]
    rows = [row for row in methods if _kl(row)]
    if not rows:
        return Verdict("KL divergence was not measured in this run, so that no row is called the best.", [])
    limit = max(LIMIT, _kl(noise)["high"]) if _kl(noise) else LIMIT
    remarks = [*_beaten(rows), *_against_uniform(rows), *_in_noise(rows, noise)]
    return Verdict(" ".join(_smallest(rows, full, limit)), remarks)


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats: no larger, no farther from the full cache, and better in one of the two."""
    measured = [row for row in rows if _kl(row)]
    return [row for row in measured if not any(_beats(other, row) for other in measured)]


def _smallest(rows: Sequence[Row], full: Row, limit: float) -> Iterator[str]:
    close = sorted((row for row in rows if _kl(row)["high"] <= limit), key=lambda row: (_bytes(row), _kl(row)["mean"]))
    meaning = f"(KL divergence up to {plain(limit)} nats per token, interval included)"
    if not close:
        nearest = min(rows, key=lambda row: _kl(row)["mean"])
        yield f"No row stays close to the full cache {meaning}; {nearest['label']} comes nearest: {_facts(nearest)}."
        return
    best = close[0]
    yield f"The smallest KV cache that stays close to the full one {meaning} is {best['label']}: {_facts(best)}."
    yield from _aside(best, full)
    how = f"With{'out' if _is_ours(best) else ''} layers sized by calibration"
    if other := next((row for row in close if _is_ours(row) != _is_ours(best)), None):
        yield f"{how}, the smallest is {other['label']}: {_size(other)}."
    elif any(_is_ours(row) != _is_ours(best) for row in rows):
        yield f"{how}, no row stays that close."


def _aside(best: Row, full: Row) -> Iterator[str]:
    """What else there is to say of the smallest close row."""
    parts = []
    for metric, title in (("multikey", "multi-key"), ("passkey", "passkey")):
        if metric in best["metrics"] and metric in full["metrics"]:
            own, reference = best["metrics"][metric], full["metrics"][metric]
            parts.append(
                f"its {title} log-probability is {nats(own['log_prob'])} nats, that of the full cache "
                f"{nats(reference['log_prob'])}"
            )
            break
    if "decode" in best["metrics"]:
        parts.append(f"it decodes at {times(best['metrics']['decode']['ratio'])} the full cache's speed")
    if parts:
        text = ", and ".join(parts)
        yield f"{text[0].upper()}{text[1:]}."


def _beaten(rows: Sequence[Row]) -> Iterator[str]:
    """Where another method is the better choice than calibrated layers."""
    for row in filter(_is_ours, rows):
        better = [other for other in rows if not _is_ours(other) and _beats(other, row)]
        if better:
            other = min(better, key=lambda other: _kl(other)["mean"])
            doubt = ", though their intervals overlap" if _overlap(other, row) else ""
            yield (
                f"{other['label']} beats {row['label']}: {_size(other)} against {_size(row)}, KL divergence "
                f"{small(_kl(other)['mean'])} against {small(_kl(row)['mean'])}{doubt}."
            )


def _against_uniform(rows: Sequence[Row]) -> Iterator[str]:
    """Calibrated against equal layers, budget by budget."""
    at = {method: {row["budget"]: row for row in rows if row["method"] == method} for method in (_OURS, "uniform")}
    parts = []
    for budget in sorted(at[_OURS].keys() & at["uniform"].keys()):
        ours, uniform = at[_OURS][budget], at["uniform"][budget]
        if min(_kl(ours)["mean"], _kl(uniform)["mean"]) < _ROUNDING:
            continue
        ratio = _kl(uniform)["mean"] / _kl(ours)["mean"]
        direction = "lower" if ratio >= 1 else "higher"
        doubt = " (the intervals overlap)" if _overlap(ours, uniform) else ""
        parts.append(f"{fixed(max(ratio, 1 / ratio), 1)} times {direction} at {budget:g}{doubt}")
    if parts:
        yield f"Against uniform at the same budget, the KL divergence of depth is {_list(parts)}."


def _in_noise(rows: Sequence[Row], noise: Row) -> Iterator[str]:
    if not _kl(noise):
        return
    if found := [row["label"] for row in rows if _kl(row)["low"] <= _kl(noise)["high"]]:
        floor = small(_kl(noise)["mean"])
        yield f"The loss of {_list(found)} may be no more than an irrelevant change costs: the noise floor is {floor}."


def _kl(row: Row) -> dict[str, Any]:
    return row["metrics"].get("kl", {})


def _bytes(row: Row) -> int:
    return row["kv"]["bytes"]


def _is_ours(row: Row) -> bool:
    return row["method"].split("+")[0] == _OURS


def _beats(row: Row, other: Row) -> bool:
    own, their = (_bytes(row), _kl(row)["mean"]), (_bytes(other), _kl(other)["mean"])
    return own != their and own[0] <= their[0] and own[1] <= their[1]


def _overlap(row: Row, other: Row) -> bool:
    return _kl(row)["low"] <= _kl(other)["high"] and _kl(other)["low"] <= _kl(row)["high"]


def _size(row: Row) -> str:
    return f"{mib(_bytes(row))} ({percent(row['kv']['share'])})"


def _facts(row: Row) -> str:
    kl = _kl(row)
    return f"{_size(row)}, KL divergence {small(kl['mean'])} (95 % interval {small(kl['low'])} to {small(kl['high'])})"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
