"""What has been measured so far, beside the output, so that an interrupted calibration goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from depthkv_edge.errors import DepthKVError

_SUFFIX = ".calibration"


class State:
    """Measurements of one process, saved after each of them.

    Every process of a calibration writes a file of its own, and reads those of all: the number of processes may change
    between an interrupted run and the next.

    Args:
        output: the model file that is going to be written.
        fingerprint: of everything that the measurements depend on; what another one left behind is not used.
        rank: index of the process.
    """

    def __init__(self, output: Path, fingerprint: str, rank: int = 0):
        self._output = output
        self._fingerprint = fingerprint
        self._path = output.with_name(f"{output.name}{_SUFFIX}.{rank}.json")
        self._found: dict[str, list[float]] = {}
        self.stale = False
        for path in self._files():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                if saved["fingerprint"] != fingerprint:
                    self.stale = True
                else:
                    self._found |= saved["measured"]
            except (ValueError, KeyError, TypeError, OSError):
                self.stale = True  # not ours, or not whole: measure again

    def __len__(self) -> int:
        return len(self._found)

    def get(self, method: str, window: int, layer: int) -> list[float] | None:
        """Sensitivity [R] of a layer in a window, if it is known."""
        return self._found.get(f"{method} {window} {layer}")

    def put(self, method: str, window: int, layers: dict[int, list[float]]) -> None:
        """Remember the sensitivity [R] of some layers in a window.

        Raises:
            DepthKVError: the file cannot be written.
        """
        for layer, curve in layers.items():
            self._found[f"{method} {window} {layer}"] = curve
        part = self._path.with_name(self._path.name + ".part")
        try:
            part.write_text(json.dumps({"fingerprint": self._fingerprint, "measured": self._found}), encoding="utf-8")
            os.replace(part, self._path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DepthKVError(
                f"{self._path} cannot be written: {error.strerror}; free some space, then run the same command to go on"
            ) from None

    def remove(self) -> None:
        """Forget everything, the files of other processes too."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        prefix = f"{self._output.name}{_SUFFIX}."
        try:
            names = sorted(os.listdir(self._output.parent))
        except OSError:
            return []
        middle = (name.removeprefix(prefix).removesuffix(".json") for name in names)
        return [
            self._output.with_name(name)
            for name, rank in zip(names, middle, strict=True)
            if name == f"{prefix}{rank}.json" and rank.isdigit()
        ]


def fingerprint(*parts: object) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
