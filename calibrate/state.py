"""What has been measured so far, beside the output, so that an interrupted calibration goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from depthkv_edge.errors import DepthKVError

_SUFFIX = ".calibration"


class SavedState:
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
            saved = self._read(path)
            self.stale |= saved is None
            self._found |= saved or {}

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
        try:
            self._write(self._path, self._found)
        except OSError as error:
            raise DepthKVError(
                f"{self._path} cannot be written: {error.strerror}; free some space, then run the same command to go on"
            ) from None

    def remove(self, methods: Collection[str]) -> None:
        """Forget what was measured by some methods, in the files of other processes too.

        What an interrupted calibration by another method has measured stays. A file that cannot be changed stays, too:
        the calibration is done, and what is in it can do no harm.
        """
        for path in self._files():
            saved = self._read(path) or {}
            others = {name: curve for name, curve in saved.items() if name.split()[0] not in methods}
            with contextlib.suppress(OSError):
                if others:
                    self._write(path, others)
                else:
                    path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[str, list[float]] | None:
        """What a file holds; None if it was measured with other settings, or is not whole."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return dict(saved["measured"]) if saved["fingerprint"] == self._fingerprint else None
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def _write(self, path: Path, measured: dict[str, list[float]]) -> None:
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps({"fingerprint": self._fingerprint, "measured": measured}), encoding="utf-8")
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

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
