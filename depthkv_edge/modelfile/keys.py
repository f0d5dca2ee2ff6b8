"""What calibration measured, and the GGUF keys that carry it (`depthkv.*`, version 1)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFEndian, GGUFReader, GGUFValueType

from depthkv_edge.engine import capi, log
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.reader import open_gguf, scalar

PREFIX = "depthkv."
VERSION = 1
KEY_VERSION = "depthkv.version"
KEY_LAYER_IDS = "depthkv.layer_ids"
KEY_KEEP_RATIOS = "depthkv.keep_ratios"
KEY_SENSITIVITY = "depthkv.sensitivity"
KEY_BUDGET = "depthkv.budget"

CHECK_BUDGET = 0.4  # at which calibration compares its budgets with uniform ones on held-out windows: `gain`

_AGAIN = "calibrate the model again"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The sensitivity of every layer whose cells grow with the context, and how it was measured.

    Attributes:
        layer_ids: index of each calibrated layer in the model, ascending; L of them.
        keep_ratios: share of its tokens that a layer keeps, ascending, each in (0, 1]; R of them.
        sensitivity: float32 [L, R], mean KL divergence from the full cache, in nats per token, when only this layer is
            pruned to that keep ratio; never rises with the keep ratio.
        sensitivity_se: float32 [L, R], its standard error over the calibration windows, in nats per token.
        scorer: token-scoring rule that it was measured with.
        sink_tokens: tokens never evicted at the front of a sequence.
        recent_tokens: tokens never evicted at its end.
        rule: allocation rule; `uniform` where calibration showed no gain on its own held-out windows. Empty: the
            engine's own choice.
        model: name or path that the user gave.
        corpus: `<name> sha256:<hex>`.
        tokens: tokens measured in all.
        windows: calibration windows of running text.
        window_tokens: tokens of a window.
        method: `exact` or `fast`; empty if the file does not say.
        stability: Spearman correlation of the sensitivity between texts, in [-1, 1]; NaN if it was not measured.
        gain: mean KL divergence on held-out windows at `CHECK_BUDGET`, uniform over calibrated; NaN if it was not
            measured, or if the calibrated budgets lose nothing at all.
        tool: `depthkv-edge <version>`.
        budget: default budget, a fraction of the full cache in (0, 1]; None for the full cache.
        recall_windows: windows that asked for hidden facts.
    """

    layer_ids: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    sensitivity: np.ndarray
    sensitivity_se: np.ndarray
    scorer: str
    sink_tokens: int
    recent_tokens: int
    rule: str
    model: str
    corpus: str
    tokens: int
    windows: int
    window_tokens: int
    method: str
    stability: float
    gain: float
    tool: str
    budget: float | None = None
    recall_windows: int = 0


class Key(NamedTuple):
    """A GGUF key and the attribute of `Calibration` that it carries."""

    name: str
    attribute: str
    type: GGUFValueType
    item_type: GGUFValueType | None = None  # of an array
    missing: Any = ...  # what a file without the key says; `...`: the key is required


class KeyValue(NamedTuple):
    """A key as gguf-py writes it."""

    name: str
    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None


_U32, _I32, _F32 = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32
_STRING, _ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY

# what describes the measurement is optional, what allocation and eviction depend on is not
KEYS = (
    Key(KEY_LAYER_IDS, "layer_ids", _ARRAY, _I32),
    Key(KEY_KEEP_RATIOS, "keep_ratios", _ARRAY, _F32),
    Key(KEY_SENSITIVITY, "sensitivity", _ARRAY, _F32),
    Key("depthkv.sensitivity_se", "sensitivity_se", _ARRAY, _F32),
    Key("depthkv.scorer", "scorer", _STRING),
    Key("depthkv.sink_tokens", "sink_tokens", _U32),
    Key("depthkv.recent_tokens", "recent_tokens", _U32),
    Key("depthkv.rule", "rule", _STRING, missing=""),
    Key(KEY_BUDGET, "budget", _F32, missing=None),
    Key("depthkv.calibration.model", "model", _STRING, missing=""),
    Key("depthkv.calibration.corpus", "corpus", _STRING, missing=""),
    Key("depthkv.calibration.tokens", "tokens", _U32, missing=0),
    Key("depthkv.calibration.windows", "windows", _U32, missing=0),
    Key("depthkv.calibration.recall_windows", "recall_windows", _U32, missing=0),
    Key("depthkv.calibration.window_tokens", "window_tokens", _U32, missing=0),
    Key("depthkv.calibration.method", "method", _STRING, missing=""),
    Key("depthkv.calibration.stability", "stability", _F32, missing=math.nan),
    Key("depthkv.calibration.gain", "gain", _F32, missing=math.nan),
    Key("depthkv.calibration.tool", "tool", _STRING, missing=""),
)


def check_file(path: Path) -> None:
    """Check every rule of the keys that the engine goes by, by the engine itself.

    Raises:
        DepthKVError: the message names the first key that breaks a rule.
    """
    with log.capture_errors(verbose=False):
        sound = capi.llama_depthkv_check_file(os.fsencode(path))
    if not sound:
        error = capi.last_error()
        way_out = "" if KEY_VERSION in error or KEY_BUDGET in error else f"; {_AGAIN}"
        raise DepthKVError(f"model {path}: {error}{way_out}")


def read_calibration(path: Path) -> Calibration | None:
    """Calibration that a GGUF carries; None if it has no `depthkv.sensitivity`.

    Raises:
        DepthKVError: the file cannot be read, or a key is missing, of the wrong type or corrupt; the message names it.
    """
    reader = _open_checked(path)
    if reader.get_field(KEY_SENSITIVITY) is None:
        return None
    try:
        return from_keys({key.name: _read(reader, key) for key in KEYS if reader.get_field(key.name)})
    except DepthKVError as error:
        raise DepthKVError(f"model {path}: {error}") from None


def read_budget(path: Path) -> float | None:
    """Default budget that a GGUF carries, calibrated or not; None if it has none.

    Raises:
        DepthKVError: as `read_calibration`.
    """
    budget = scalar(_open_checked(path), KEY_BUDGET)
    return None if budget is None else _shortest(budget)


def _open_checked(path: Path) -> GGUFReader:
    reader = open_gguf(path)
    if (reader.endianess == GGUFEndian.BIG) == (sys.byteorder == "big"):  # the engine reads no other
        check_file(path)
    return reader


def to_keys(calibration: Calibration) -> list[KeyValue]:
    """The keys that carry a calibration, as gguf-py writes them, unchecked. What is not known has no key."""
    keys = [KeyValue(KEY_VERSION, VERSION, _U32, None)]
    for key in KEYS:
        value = getattr(calibration, key.attribute)
        if key.type == _ARRAY:
            dtype = np.int32 if key.item_type == _I32 else np.float32
            value = np.asarray(value, dtype).reshape(-1).tolist()
        elif _is_missing(key, value):
            continue
        keys.append(KeyValue(key.name, value, key.type, key.item_type))
    return keys


def from_keys(values: Mapping[str, Any]) -> Calibration:
    """The calibration that keys of the right types carry: scalars, and flat arrays or lists.

    Raises:
        KeyError: a required key is missing.
    """
    facts: dict[str, Any] = {
        key.attribute: values[key.name] if key.missing is ... else values.get(key.name, key.missing) for key in KEYS
    }
    facts["layer_ids"] = tuple(int(layer) for layer in facts["layer_ids"])
    facts["keep_ratios"] = tuple(_shortest(ratio) for ratio in facts["keep_ratios"])
    for name in ("budget", "stability", "gain"):
        facts[name] = None if facts[name] is None else _shortest(facts[name])
    shape = len(facts["layer_ids"]), len(facts["keep_ratios"])
    for name in ("sensitivity", "sensitivity_se"):
        facts[name] = np.array(facts[name], np.float32).reshape(shape)
    return Calibration(**facts)


def _read(reader: GGUFReader, key: Key) -> Any:
    field = reader.get_field(key.name)
    assert field is not None
    expected = [key.type] if key.item_type is None else [key.type, key.item_type]
    if field.types != expected:
        raise DepthKVError(f"key {key.name} is of type {_name(field.types)}, not {_name(expected)}: {_AGAIN}")
    return scalar(reader, key.name) if key.item_type is None else np.array(field.parts[field.data[0]])


def _name(types: list[GGUFValueType]) -> str:
    return " of ".join(gguf_type.name.lower() for gguf_type in types)


def _shortest(value: float) -> float:
    # 0.2 went into the file as the nearest 32-bit float: read 0.2, not 0.20000000298
    return float(str(np.float32(value)))


def _is_missing(key: Key, value: Any) -> bool:
    if value is None or isinstance(key.missing, str):
        return value == key.missing
    return isinstance(key.missing, float) and math.isnan(value)
