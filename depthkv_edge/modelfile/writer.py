"""Write a calibration into a model file without ever damaging it.

The bytes of every other key, of the tensor infos and of the tensors are copied as they are: whatever a model carries,
keys and tensor types unknown to us among them, survives bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import psutil
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from gguf.gguf_writer import WriterState
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import PREFIX, Calibration, KeyValue, read_calibration, to_keys
from depthkv_edge.modelfile.reader import open_gguf, scalar

TEMPORARY_SUFFIX = ".depthkv-tmp"  # what a killed run leaves behind: <target>.<8 hex digits>.depthkv-tmp

_NAME_LENGTH = 48  # of the target, in the name of a temporary file: a file system bounds the length of the whole
_CHUNK = 4 * 2**20
_MARGIN = 2**20  # bytes to spare on the disk: the keys of a calibration, and the directory's own growth
_HEADER_BYTES = 24  # magic, version, number of tensors, number of keys


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a GGUF are. Offsets and sizes in bytes.

    Attributes:
        keys: start and end of every key that is kept.
        infos: start and end of the tensor infos.
        data: start of the tensor data.
        size: end of the file.
    """

    keys: list[tuple[int, int]]
    infos: tuple[int, int]
    data: int
    size: int
    n_tensors: int
    alignment: int
    big_endian: bool


def check_writable(source: Path, target: Path) -> None:
    """Check that `write_calibrated` can do its work, before hours go into a calibration.

    Raises:
        DepthKVError: the source is not a whole, single GGUF; or the target cannot be written, or has no space.
    """
    _check_source(source, open_gguf(source))
    target = _resolve(target)
    with _reasons(target):
        _check_target(target)
        with _temporary(target):
            pass  # the one sure way to know that a file can be created there
        _check_space(source, target)


def write_calibrated(source: Path, target: Path, calibration: Calibration) -> None:
    """Copy a GGUF with a calibration in place of whatever `depthkv.*` keys it has.

    The target appears, or is replaced, in one step when the copy is complete and on the disk: source and target may be
    the same file. A target that is a link is followed; one that exists keeps its permissions. On a terminal, standard
    error shows a progress bar. What killed runs have left beside it is removed.

    Raises:
        DepthKVError: as `check_writable`; or the calibration breaks a rule of its keys, or does not fit the model.
            The target is as it was.
    """
    keys = to_keys(calibration)
    _remove_leftovers(_resolve(target))
    check_writable(source, target)
    reader = open_gguf(source)
    layout, infos = _layout(reader), _tensor_infos(reader)
    del reader  # unmaps the file, which some systems do not replace while it is mapped

    target = _resolve(target)
    with _reasons(target), _temporary(target) as (file, temporary):
        with source.open("rb") as original, _progress(layout.size) as advance:
            _write(original, file, layout, _pack(keys, layout.big_endian), len(keys), advance)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if _tensor_infos(open_gguf(temporary)) != infos:
            raise DepthKVError(f"{temporary} does not read back as it was written: check the disk and try again")
        read_calibration(temporary)
        os.replace(temporary, target)
        _sync_directory(target.parent)


def _check_source(source: Path, reader: GGUFReader) -> None:
    try:
        n_files = scalar(reader, "split.count")
    except DepthKVError as error:
        raise DepthKVError(f"model {source}: {error}") from None
    if isinstance(n_files, int) and n_files > 1:
        raise DepthKVError(
            f"model {source} is one of {n_files} files: merge them first with `llama-gguf-split --merge`"
        )


def _resolve(target: Path) -> Path:
    return Path(os.path.realpath(target))


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise DepthKVError(f"cannot write {target}: {target.parent} is not a directory; create it or choose another")
    if target.is_dir():
        raise DepthKVError(f"cannot write {target}: it is a directory; give the path of a file")
    if target.exists():
        if not target.is_file():
            raise DepthKVError(f"cannot write {target}: it is not a regular file; choose another path")
        if not os.access(target, os.W_OK):
            raise DepthKVError(f"cannot write {target}: it is read-only; make it writable or choose another path")


def _check_space(source: Path, target: Path) -> None:
    needed, free = source.stat().st_size + _MARGIN, shutil.disk_usage(target.parent).free
    if free < needed:
        raise DepthKVError(
            f"cannot write {target}: no space left, {free / 2**20:.0f} MiB are free in {target.parent} and the copy "
            f"takes {needed / 2**20:.0f} MiB; free some or choose another directory"
        )


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside the target, with its permissions if it exists. It is gone at the end unless it was moved."""
    # in the target's own directory, for a rename is atomic only within a file system
    path = target.with_name(f"{target.name[:_NAME_LENGTH]}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with path.open("xb") as file:
            _copy_permissions(target, path)
            yield file, path
    finally:
        with contextlib.suppress(OSError):  # moved, or never created
            path.unlink()


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of killed runs: those for this target that are older than this process.

    Another process that is writing to the same target now has a younger one.
    """
    if len(target.name) > _NAME_LENGTH:
        return  # another target may share the beginning of the name
    name = re.compile(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
    started = psutil.Process().create_time()
    with contextlib.suppress(OSError):  # tidying must not stand in the way of the work
        for path in target.parent.iterdir():
            if name.fullmatch(path.name) and path.stat().st_mtime < started:
                path.unlink()


def _copy_permissions(target: Path, temporary: Path) -> None:
    if not target.exists():
        return  # the umask has decided
    status = target.stat()
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # only root may give files away, and root should not take them either
            os.chown(temporary, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):  # not every file system has them
        temporary.chmod(stat.S_IMODE(status.st_mode))


@contextlib.contextmanager
def _reasons(target: Path) -> Iterator[None]:
    """Turn a failure of the file system into one line about the target."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
            why = f"no space left ({error.strerror}); free some or choose another directory"
        else:
            why = f"{error.strerror or error}; choose another path"
        raise DepthKVError(f"cannot write {target}: {why}") from error


def _layout(reader: GGUFReader) -> _Layout:
    fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    tensors = [tensor.field for tensor in reader.tensors]
    # the parts of a field are all its bytes, in order; the reader's own GGUF.* fields are the header
    ends = [field.offset + sum(part.nbytes for part in field.parts) for field in fields]
    infos_start = ends[-1] if ends else _HEADER_BYTES
    infos_end = tensors[-1].offset + sum(part.nbytes for part in tensors[-1].parts) if tensors else infos_start
    return _Layout(
        keys=[
            (field.offset, end) for field, end in zip(fields, ends, strict=True) if not field.name.startswith(PREFIX)
        ],
        infos=(infos_start, infos_end),
        data=int(reader.data_offset),
        size=len(reader.data),
        n_tensors=len(tensors),
        alignment=int(reader.alignment),
        big_endian=reader.endianess == GGUFEndian.BIG,
    )


def _tensor_infos(reader: GGUFReader) -> list[tuple[str, tuple[int, ...], int, int, int]]:
    """Name, shape, type, bytes and offset in the data section of every tensor."""
    return [
        (
            tensor.name,
            tuple(tensor.shape.tolist()),
            int(tensor.tensor_type),
            int(tensor.n_bytes),
            int(tensor.data_offset) - int(reader.data_offset),
        )
        for tensor in reader.tensors
    ]


def _pack(keys: list[KeyValue], big_endian: bool) -> bytes:
    """Bytes of keys, as gguf-py packs them."""
    writer = GGUFWriter(None, "", endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    for key in keys:
        writer.add_key_value(key.name, key.value, key.type, key.item_type)
    packed = BytesIO()
    writer.fout, writer.state = [packed], WriterState.HEADER  # type: ignore[list-item]
    writer.write_kv_data_to_file()
    return packed.getvalue()


def _write(
    source: BinaryIO,
    target: BinaryIO,
    layout: _Layout,
    packed: bytes,
    n_packed: int,
    advance: Callable[[int], None],
) -> None:
    order = ">" if layout.big_endian else "<"
    target.write(source.read(8))  # magic and version
    target.write(struct.pack(f"{order}QQ", layout.n_tensors, len(layout.keys) + n_packed))
    for start, end in layout.keys:
        _copy(source, target, start, end, advance)
    target.write(packed)
    _copy(source, target, *layout.infos, advance)  # their offsets count from the start of the data: they stay true
    target.write(bytes(-target.tell() % layout.alignment))
    if layout.data < layout.size:
        _copy(source, target, layout.data, layout.size, advance)


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int, advance: Callable[[int], None]) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(_CHUNK, end - start))
        if not chunk:
            raise DepthKVError("the model file became shorter while it was copied: try again")
        target.write(chunk)
        start += len(chunk)
        advance(len(chunk))


@contextlib.contextmanager
def _progress(n_bytes: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    columns = TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing", total=n_bytes)
        yield lambda n: progress.advance(task, n)


def _sync_directory(directory: Path) -> None:
    # the rename itself must reach the disk; where a directory cannot be opened there is no way to ask for it
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
