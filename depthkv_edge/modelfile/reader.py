"""A GGUF as gguf-py reads it: fast whatever the size of its vocabulary, and with one clear line when it is damaged."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.packaged import check_gguf

_MAX_NESTING = 8  # arrays in arrays; real files have none


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF and read its keys and tensor infos. Tensor data is read when it is used.

    A string array is one field without elements, so that a vocabulary costs nothing; arrays of numbers are complete.

    Raises:
        DepthKVError: missing, not a GGUF, truncated or damaged.
    """
    check_gguf(path)
    try:
        return _Reader(path)
    except MemoryError:
        raise
    except Exception as error:  # whatever the bytes make numpy and the enums of gguf-py raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise DepthKVError(f"model {path} is damaged or incomplete ({why}): get the file again") from error


def scalar(reader: GGUFReader, key: str) -> Any:
    """Value of a scalar or string key as a Python object; None if the key is missing.

    Raises:
        DepthKVError: the key holds an array, or text that is not UTF-8.
    """
    field = reader.get_field(key)
    if field is None:
        return None
    if field.types[0] == GGUFValueType.ARRAY:
        raise DepthKVError(f"key {key} is an array, not one value: get the model file again")
    try:
        return field.contents()
    except UnicodeDecodeError as error:
        raise DepthKVError(f"key {key} is not UTF-8 text (byte {error.start}): get the model file again") from None


def block_count(reader: GGUFReader) -> int:
    """Number of layers that the file declares.

    Raises:
        DepthKVError: the file does not declare it.
    """
    architecture = scalar(reader, "general.architecture")
    if not isinstance(architecture, str):
        raise DepthKVError("key general.architecture is missing: give the GGUF of a language model")
    key = f"{architecture}.block_count"
    count = scalar(reader, key)
    if not isinstance(count, int):
        raise DepthKVError(f"key {key} is missing: give the GGUF of a language model")
    return count


class _Reader(GGUFReader):
    # The base class makes one numpy view per array element, seconds for a large vocabulary, and reads on past the end
    # of a truncated file, for ever if an array claims to be long enough.

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise EOFError(f"it ends at byte {len(self.data)}, before byte {end}")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        end, types = self._skip_array(int(orig_offs))
        item_type, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        dtype = self.gguf_scalar_to_np.get(types[1])
        if dtype is None:
            items, data = self._get(orig_offs + 12, np.uint8, end - orig_offs - 12), []
        else:
            items, data = self._get(orig_offs + 12, dtype, count[0]), [2]
        return end - orig_offs, [item_type, count, items], data, types

    def _skip_array(self, offset: int, depth: int = 1) -> tuple[int, list[GGUFValueType]]:
        """Offset of what follows an array, and its types down to the first element that is no array."""
        if depth > _MAX_NESTING:
            raise ValueError(f"arrays nested more than {_MAX_NESTING} deep")
        item_type = GGUFValueType(self._get(offset, np.uint32)[0])
        count = int(self._get(offset + 4, np.uint64)[0])
        offset += 12
        if item_type == GGUFValueType.ARRAY:
            types = [item_type]
            for i in range(count):
                offset, inner = self._skip_array(offset, depth + 1)
                types = inner if i == 0 else types
            return offset, [GGUFValueType.ARRAY, *types]
        if item_type == GGUFValueType.STRING:
            offset = self._skip_strings(offset, count)
        else:
            offset += count * np.dtype(self.gguf_scalar_to_np[item_type]).itemsize
        if offset > len(self.data):
            raise EOFError(f"it ends at byte {len(self.data)}, before byte {offset}")
        return offset, [GGUFValueType.ARRAY, item_type]

    def _skip_strings(self, offset: int, count: int) -> int:
        swapped = self.byte_order == "S"
        length = struct.Struct(">Q" if (sys.byteorder == "big") != swapped else "<Q")
        buffer, size = memoryview(self.data), len(self.data)
        for _ in range(count):
            if offset + 8 > size:
                raise EOFError(f"it ends at byte {size}, inside an array of {count} strings")
            offset += 8 + length.unpack_from(buffer, offset)[0]
        return offset
