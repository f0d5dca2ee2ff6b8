"""What an evaluation has measured so far, on disk: an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from depthkv_edge.errors import DepthKVError

Record = dict[str, Any]


def digest(facts: Any) -> str:
    """A name for JSON-able facts; other facts, another name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Records by key, appended to a file of JSON lines.

    A line that an interrupt cut short, and everything after it, is measured again.

    Raises:
        DepthKVError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._records: dict[str, Record] = {}
        with self._writing():
            good = 0
            for line in self._lines():
                try:
                    key, record = json.loads(line)
                except ValueError:
                    break
                self._records[key] = record
                good += len(line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(good)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DepthKVError(
                f"cannot keep results in {self._path}: {error.strerror}; set XDG_CACHE_HOME to a directory with room"
            ) from None

    def _lines(self) -> Iterator[bytes]:
        if self._path.exists():
            with self._path.open("rb") as file:
                yield from (line for line in file if line.endswith(b"\n"))

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __setitem__(self, key: str, record: Record) -> None:
        line = json.dumps([key, record]) + "\n"
        with self._writing(), self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        # as a later run will read it: what is reported must not depend on where it was interrupted
        self._records[key] = json.loads(line)[1]
