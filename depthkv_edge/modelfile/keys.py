"""What calibration measured, and the GGUF keys that carry it (`depthkv.*`, version 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFValueType

from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.reader import block_count, open_gguf, scalar

PREFIX = "depthkv."
VERSION = 1
KEY_VERSION = "depthkv.version"
KEY_LAYER_IDS = "depthkv.layer_ids"
KEY_KEEP_RATIOS = "depthkv.keep_ratios"
KEY_SENSITIVITY = "depthkv.sensitivity"
KEY_SENSITIVITY_SE = "depthkv.sensitivity_se"
KEY_BUDGET = "depthkv.budget"

CHECK_BUDGET = 0.4  # at which calibration compares its budgets with uniform ones on held-out windows: `gain`

_RISE = 1e-6  # relative: a sensitivity that rises with the keep ratio by no more than this is rounding
_MAX_SAFE = 2**20  # most sink or recent tokens that the engine takes
_AGAIN = "calibrate the model again"
_BUDGET = "set a budget above 0 and at most 1, or none"


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
        windows: calibration windows.
        window_tokens: tokens of a window.
        method: `exact` or `fast`; empty if the file does not say.
        stability: Spearman correlation of the sensitivity between texts, in [-1, 1]; NaN if it was not measured.
        gain: mean KL divergence on held-out windows at `CHECK_BUDGET`, uniform over calibrated; NaN if it was not
            measured, or if the calibrated budgets lose nothing at all.
        tool: `depthkv-edge <version>`.
        budget: default budget, a fraction of the full cache in (0, 1]; None for the full cache.
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

    def check(self, n_layers: int | None = None) -> None:
        """Check every rule of the keys, on the 32-bit values that a file holds.

        Args:
            n_layers: layers of the model; None where the model is not known.

        Raises:
            DepthKVError: the message names the first key that breaks a rule.
        """
        _check_layer_ids(self.layer_ids, n_layers)
        _check_keep_ratios(np.asarray(self.keep_ratios, np.float32))
        shape = len(self.layer_ids), len(self.keep_ratios)
        for key, curves in ((KEY_SENSITIVITY, self.sensitivity), (KEY_SENSITIVITY_SE, self.sensitivity_se)):
            _check_curves(key, np.asarray(curves, np.float32), shape)
        _check_falling(np.asarray(self.sensitivity, np.float32), self.layer_ids)
        _check_full(np.asarray(self.keep_ratios, np.float32), np.asarray(self.sensitivity, np.float32), self.layer_ids)
        for key in KEYS:
            _check_fact(key, getattr(self, key.attribute))


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
    Key(KEY_SENSITIVITY_SE, "sensitivity_se", _ARRAY, _F32),
    Key("depthkv.scorer", "scorer", _STRING),
    Key("depthkv.sink_tokens", "sink_tokens", _U32),
    Key("depthkv.recent_tokens", "recent_tokens", _U32),
    Key("depthkv.rule", "rule", _STRING, missing=""),
    Key(KEY_BUDGET, "budget", _F32, missing=None),
    Key("depthkv.calibration.model", "model", _STRING, missing=""),
    Key("depthkv.calibration.corpus", "corpus", _STRING, missing=""),
    Key("depthkv.calibration.tokens", "tokens", _U32, missing=0),
    Key("depthkv.calibration.windows", "windows", _U32, missing=0),
    Key("depthkv.calibration.window_tokens", "window_tokens", _U32, missing=0),
    Key("depthkv.calibration.method", "method", _STRING, missing=""),
    Key("depthkv.calibration.stability", "stability", _F32, missing=math.nan),
    Key("depthkv.calibration.gain", "gain", _F32, missing=math.nan),
    Key("depthkv.calibration.tool", "tool", _STRING, missing=""),
)


def read_calibration(path: Path) -> Calibration | None:
    """Calibration that a GGUF carries; None if it has no `depthkv.sensitivity`.

    Raises:
        DepthKVError: the file cannot be read, or a key is missing, of the wrong type or corrupt; the message names it.
    """
    reader = open_gguf(path)
    try:
        version = scalar(reader, KEY_VERSION)
        if version is not None and version != VERSION:
            raise DepthKVError(
                f"key {KEY_VERSION} is {version!r} and this build reads version {VERSION}: update depthkv-edge"
            )
        if reader.get_field(KEY_SENSITIVITY) is None:
            return None
        calibration = from_keys({key.name: _read(reader, key) for key in KEYS if reader.get_field(key.name)})
        calibration.check(block_count(reader))
    except DepthKVError as error:
        raise DepthKVError(f"model {path}: {error}") from None
    return calibration


def read_budget(path: Path) -> float | None:
    """Default budget that a GGUF carries, calibrated or not; None if it has none.

    Raises:
        DepthKVError: the file cannot be read, or the key is of the wrong type or out of range; the message names it.
    """
    reader = open_gguf(path)
    if reader.get_field(KEY_BUDGET) is None:
        return None
    key = next(key for key in KEYS if key.name == KEY_BUDGET)
    try:
        budget = _read(reader, key)
        _check_fact(key, budget)
    except DepthKVError as error:
        raise DepthKVError(f"model {path}: {error}") from None
    return _shortest(budget)


def to_keys(calibration: Calibration) -> list[KeyValue]:
    """The keys that carry a calibration, as gguf-py writes them. What is not known has no key.

    Raises:
        DepthKVError: it breaks a rule of the keys.
    """
    calibration.check()
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
        DepthKVError: a required key is missing, or an array has the wrong length. Values are not checked.
    """
    facts: dict[str, Any] = {}
    for key in KEYS:
        if key.name not in values and key.missing is ...:
            raise DepthKVError(f"key {key.name} is missing: {_AGAIN}")
        facts[key.attribute] = values.get(key.name, key.missing)
    facts["layer_ids"] = tuple(int(layer) for layer in facts["layer_ids"])
    facts["keep_ratios"] = tuple(_shortest(ratio) for ratio in facts["keep_ratios"])
    for name in ("budget", "stability", "gain"):
        facts[name] = None if facts[name] is None else _shortest(facts[name])
    shape = len(facts["layer_ids"]), len(facts["keep_ratios"])
    for name, key_name in (("sensitivity", KEY_SENSITIVITY), ("sensitivity_se", KEY_SENSITIVITY_SE)):
        flat = np.array(facts[name], np.float32)
        if flat.size != math.prod(shape):
            raise DepthKVError(
                f"key {key_name} has {flat.size} values, not {math.prod(shape)} "
                f"({shape[0]} layers times {shape[1]} keep ratios): {_AGAIN}"
            )
        facts[name] = flat.reshape(shape)
    return Calibration(**facts)


def _read(reader: GGUFReader, key: Key) -> Any:
    field = reader.get_field(key.name)
    assert field is not None
    expected = [key.type] if key.item_type is None else [key.type, key.item_type]
    if field.types != expected:
        way_out = _BUDGET if key.name == KEY_BUDGET else _AGAIN
        raise DepthKVError(f"key {key.name} is of type {_name(field.types)}, not {_name(expected)}: {way_out}")
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


def _check_layer_ids(layer_ids: tuple[int, ...], n_layers: int | None) -> None:
    if not layer_ids:
        raise DepthKVError(f"key {KEY_LAYER_IDS} is empty: {_AGAIN}")
    for before, after in zip((-1, *layer_ids), layer_ids, strict=False):
        if after <= before:
            what = f"{after} is negative" if after < 0 else f"{after} follows {before}: layers must ascend"
            raise DepthKVError(f"key {KEY_LAYER_IDS} is wrong, {what}: {_AGAIN}")
    if n_layers is not None and layer_ids[-1] >= n_layers:
        raise DepthKVError(
            f"key {KEY_LAYER_IDS} names layer {layer_ids[-1]} of a model with {n_layers} layers: {_AGAIN}"
        )


def _check_keep_ratios(ratios: np.ndarray) -> None:
    if not ratios.size:
        raise DepthKVError(f"key {KEY_KEEP_RATIOS} is empty: {_AGAIN}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise DepthKVError(f"key {KEY_KEEP_RATIOS} holds {ratio}, which is not in (0, 1]: {_AGAIN}")
    if (np.diff(ratios) <= 0).any():
        raise DepthKVError(f"key {KEY_KEEP_RATIOS} is not ascending ({', '.join(map(str, ratios))}): {_AGAIN}")


def _check_curves(key: str, curves: np.ndarray, shape: tuple[int, int]) -> None:
    if curves.shape != shape:
        raise DepthKVError(
            f"key {key} has shape {list(curves.shape)}, not {shape[0]} layers by {shape[1]} keep ratios: {_AGAIN}"
        )
    wrong = curves[~(np.isfinite(curves) & (curves >= 0))]
    if wrong.size:
        raise DepthKVError(f"key {key} holds {wrong[0]}, which is not a finite number of at least 0: {_AGAIN}")


def _check_falling(sensitivity: np.ndarray, layer_ids: tuple[int, ...]) -> None:
    values = sensitivity.astype(np.float64)
    rises = np.argwhere(values[:, 1:] > values[:, :-1] * (1 + _RISE))
    if rises.size:
        row, column = rises[0]
        before, after = sensitivity[row, column : column + 2]
        raise DepthKVError(
            f"key {KEY_SENSITIVITY} rises with the keep ratio in layer {layer_ids[row]} ({before} to {after}): {_AGAIN}"
        )


def _check_full(ratios: np.ndarray, sensitivity: np.ndarray, layer_ids: tuple[int, ...]) -> None:
    if ratios[-1] < 1 or not sensitivity[:, -1].any():
        return
    row = int(sensitivity[:, -1].argmax())
    raise DepthKVError(
        f"key {KEY_SENSITIVITY} is {sensitivity[row, -1]} at a keep ratio of 1 in layer {layer_ids[row]}, "
        f"where nothing is lost: {_AGAIN}"
    )


def _check_fact(key: Key, value: Any) -> None:
    if key.type == _ARRAY or _is_missing(key, value):
        return
    if key.type == _STRING:
        if not isinstance(value, str) or not value:
            raise DepthKVError(f"key {key.name} is {value!r}, not a text: {_AGAIN}")
    elif key.type == _U32:
        low, high = (1, _MAX_SAFE) if key.missing is ... else (0, 2**32 - 1)
        if not low <= value <= high:
            raise DepthKVError(f"key {key.name} is {value}, not from {low} to {high}: {_AGAIN}")
    elif key.name == KEY_BUDGET:
        if not 0 < np.float32(value) <= 1:
            raise DepthKVError(f"key {key.name} is {value}: {_BUDGET}")
    elif not math.isfinite(value):
        raise DepthKVError(f"key {key.name} is {value}, not a finite number: {_AGAIN}")
