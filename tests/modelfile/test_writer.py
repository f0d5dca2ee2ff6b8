"""A calibration goes into a model file, and nothing else of the file changes, whatever happens meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_python
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.keys import make_calibration

from depthkv_edge import DepthKVError
from depthkv_edge.modelfile import writer
from depthkv_edge.modelfile.keys import Calibration, read_calibration, to_keys
from depthkv_edge.modelfile.reader import open_gguf
from depthkv_edge.modelfile.writer import TEMPORARY_SUFFIX, check_writable, write_calibrated

T = GGUFValueType
SCALARS = {T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i"}
SCALARS |= {T.UINT64: "Q", T.INT64: "q", T.FLOAT32: "f", T.FLOAT64: "d", T.BOOL: "?"}


# a GGUF from first principles, so that what the writer makes can be compared byte for byte


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # innermost first, as in the file
    type: int
    data: bytes


@dataclass(frozen=True)
class Gguf:
    keys: list[tuple[bytes, bytes]]  # name, and type with value as packed
    tensors: list[Tensor] = field(default_factory=list)
    alignment: int = 32
    order: str = "<"
    version: int = 3

    def pack(self) -> bytes:
        out = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, len(self.tensors), len(self.keys))
        for name, value in self.keys:
            out += self.string(name) + value
        data = b""
        for tensor in self.tensors:
            out += self.string(tensor.name.encode())
            out += struct.pack(f"{self.order}I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            out += struct.pack(f"{self.order}IQ", tensor.type, len(data))
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        return out + bytes(-len(out) % self.alignment) + data

    def string(self, text: bytes) -> bytes:
        return struct.pack(f"{self.order}Q", len(text)) + text

    def value(self, gguf_type: GGUFValueType, value: Any, item_type: GGUFValueType | None = None) -> bytes:
        return struct.pack(f"{self.order}I", gguf_type) + self.bare(gguf_type, value, item_type)

    def bare(self, gguf_type: GGUFValueType, value: Any, item_type: GGUFValueType | None = None) -> bytes:
        if gguf_type == T.STRING:
            return self.string(value if isinstance(value, bytes) else value.encode())
        if gguf_type == T.ARRAY:
            if item_type is not None:
                value = item_type, [self.bare(item_type, item) for item in value]
            item_type, items = value
            return struct.pack(f"{self.order}IQ", item_type, len(items)) + b"".join(items)
        return struct.pack(self.order + SCALARS[gguf_type], value)


def key_name() -> st.SearchStrategy[bytes]:
    return st.text(min_size=1, max_size=12).map(str.encode).filter(lambda name: not name.startswith(b"depthkv."))


@st.composite
def packed_value(draw: st.DrawFn, gguf: Gguf, gguf_type: GGUFValueType) -> bytes:
    if gguf_type in SCALARS:
        size = struct.calcsize("<" + SCALARS[gguf_type])
        raw = draw(st.binary(min_size=size, max_size=size))  # NaNs with a payload among the floats
        return bytes([raw[0] & 1]) if gguf_type == T.BOOL else raw
    if gguf_type == T.STRING:
        return gguf.string(draw(st.binary(max_size=9)))  # need not be UTF-8: some vocabularies are not
    item_type = draw(st.sampled_from([t for t in T if t != T.ARRAY]))  # the engine reads no array of arrays
    items = draw(st.lists(packed_value(gguf, item_type), max_size=4))
    return gguf.bare(T.ARRAY, (item_type, items))


@st.composite
def files(draw: st.DrawFn) -> tuple[Gguf, list[tuple[bytes, bytes]]]:
    """A file with exotic keys and tensors, and its keys without the old calibration among them."""
    gguf = Gguf([], order=draw(st.sampled_from("<>")), version=draw(st.sampled_from([2, 3])))
    kept = [(b"general.architecture", gguf.value(T.STRING, "llama")), (b"llama.block_count", gguf.value(T.UINT32, 2))]
    alignment = draw(st.sampled_from([None, 8, 32, 64, 4096]))
    if alignment:
        kept.append((b"general.alignment", gguf.value(T.UINT32, alignment)))
    for name in draw(st.lists(key_name(), max_size=6, unique=True)):
        gguf_type = draw(st.sampled_from(list(T)))
        kept.append((name, struct.pack(f"{gguf.order}I", gguf_type) + draw(packed_value(gguf, gguf_type))))
    kept = draw(st.permutations(kept))
    old = [(b"depthkv.budget", gguf.value(T.FLOAT32, 0.5)), (b"depthkv.unknown", gguf.value(T.ARRAY, [1, 2], T.INT16))]
    old = old[: draw(st.integers(0, 2))]
    keys = list(kept)
    for key in old:
        keys.insert(draw(st.integers(0, len(keys))), key)
    tensors = []
    for i in range(draw(st.integers(0, 4))):
        rows = draw(st.integers(1, 3))
        # F32, Q4_0 (18 bytes for 32 weights), Q4_K (144 for 256)
        ggml_type, columns, n_bytes = draw(st.sampled_from([(0, 7, 28), (2, 64, 36), (12, 256, 144)]))
        tensors.append(Tensor(f"t{i}", (columns, rows), ggml_type, draw(st.randoms()).randbytes(rows * n_bytes)))
    return replace(gguf, keys=keys, tensors=tensors, alignment=alignment or 32), kept


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(file=files(), in_place=st.booleans())
def test_only_the_calibration_changes(file, in_place):
    gguf, kept = file
    calibration = make_calibration()
    new = [(k.name.encode(), gguf.value(k.type, k.value, k.item_type)) for k in to_keys(calibration)]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "in.gguf"
        target = source if in_place else Path(directory) / "out.gguf"
        source.write_bytes(gguf.pack())
        write_calibrated(source, target, calibration)
        assert target.read_bytes() == replace(gguf, keys=kept + new).pack()
        if not in_place:
            assert source.read_bytes() == gguf.pack()
        assert_same(read_calibration(target), calibration)


def assert_same(found: Calibration | None, expected: Calibration) -> None:
    assert found is not None
    assert to_keys(found) == to_keys(expected)


def small(path: Path, n_bytes: int = 4096) -> Path:
    gguf = Gguf([])
    keys = [(b"general.architecture", gguf.value(T.STRING, "llama")), (b"llama.block_count", gguf.value(T.UINT32, 2))]
    data = np.random.default_rng(0).bytes(n_bytes)
    path.write_bytes(replace(gguf, keys=keys, tensors=[Tensor("t", (n_bytes // 4,), 0, data)]).pack())
    return path


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.endswith(TEMPORARY_SUFFIX)]


def content(path: Path) -> dict[str, str]:
    """A hash of each key and tensor, with all that the file says of it, in its order."""
    reader = open_gguf(path)
    parts = {name: field.parts for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    parts |= {tensor.name: [*tensor.field.parts, tensor.data] for tensor in reader.tensors}
    return {name: hashlib.sha256(b"".join(part.tobytes() for part in of)).hexdigest() for name, of in parts.items()}


def test_packaged_model(smollm2, tmp_path, load, tokens):
    """Every key and tensor of a real model survives, and llama.cpp loads it and generates the same."""
    target, calibration = tmp_path / "m.gguf", make_calibration(30)
    write_calibrated(smollm2, target, calibration)
    new = {key.name for key in to_keys(calibration)}
    kept = {name: digest for name, digest in content(target).items() if name not in new}
    assert list(kept.items()) == list(content(smollm2).items())

    def greedy(path: Path) -> list[int]:
        llama = load(path, n_ctx=256, n_threads=1, n_threads_batch=1)
        assert not llama.kv_stats().active
        generated = llama.generate(tokens[:32], temp=0.0)
        return [next(generated) for _ in range(8)]

    assert greedy(target) == greedy(smollm2)


def test_writing_again_changes_nothing(tmp_path):
    path = small(tmp_path / "m.gguf")
    write_calibrated(path, path, make_calibration(budget=0.4))
    first = path.read_bytes()
    write_calibrated(path, path, make_calibration(budget=0.4))
    assert path.read_bytes() == first
    write_calibrated(path, path, make_calibration())
    assert read_calibration(path).budget is None
    assert b"depthkv.budget" in first and b"depthkv.budget" not in path.read_bytes()


@pytest.mark.parametrize("relation", ["symlink", "hardlink", "relative", "dangling"])
def test_links(tmp_path, monkeypatch, relation):
    source = small(tmp_path / "real.gguf")
    original = source.read_bytes()
    target = tmp_path / "link.gguf"
    written = source
    if relation == "symlink":
        target.symlink_to("real.gguf")
    elif relation == "dangling":
        written = tmp_path / "sub" / "new.gguf"
        written.parent.mkdir()
        target.symlink_to(written)
    elif relation == "hardlink":
        os.link(source, target)
        written = target
    else:
        monkeypatch.chdir(tmp_path)
        target = Path("../" + tmp_path.name) / "real.gguf"
    write_calibrated(source, target, make_calibration())
    assert target.is_symlink() == (relation in ("symlink", "dangling"))
    assert_same(read_calibration(target), make_calibration())
    assert_same(read_calibration(written), make_calibration())
    if relation in ("hardlink", "dangling"):
        assert source.read_bytes() == original
    assert leftovers(tmp_path) == []


def test_leftovers_of_killed_runs(tmp_path):
    """Those for this target that are older than this process; none that may be another's."""
    path = small(tmp_path / "m.gguf")
    names = {
        "m.gguf.0123abcd": True,
        "m.gguf.ffffffff": False,  # young: another process is writing it
        "m.gguf.0123abcdef": False,
        "mm.gguf.0123abcd": False,
        "m_gguf.0123abcd": False,
    }
    for name in names:
        (tmp_path / (name + TEMPORARY_SUFFIX)).touch()
        if name != "m.gguf.ffffffff":
            os.utime(tmp_path / (name + TEMPORARY_SUFFIX), (1e9, 1e9))
    write_calibrated(path, path, make_calibration())
    left = {found.name.removesuffix(TEMPORARY_SUFFIX) for found in leftovers(tmp_path)}
    assert left == {name for name, gone in names.items() if not gone}


def test_permissions(tmp_path):
    source, target = small(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_calibrated(source, target, make_calibration())
    assert target.stat().st_mode & 0o777 == 0o640
    (tmp_path / "plain").touch()
    write_calibrated(source, tmp_path / "c.gguf", make_calibration())
    assert (tmp_path / "c.gguf").stat().st_mode == (tmp_path / "plain").stat().st_mode, "what the umask says"


def test_read_back_is_checked(tmp_path, monkeypatch):
    path = small(tmp_path / "m.gguf")
    original = path.read_bytes()
    monkeypatch.setattr(
        writer, "_copy", lambda source, target, start, end, advance: target.write(bytes(end - start))
    )
    with pytest.raises(DepthKVError):
        write_calibrated(path, path, make_calibration())
    assert path.read_bytes() == original
    assert leftovers(tmp_path) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_interrupted(tmp_path, monkeypatch, where, error):
    path = small(tmp_path / "m.gguf")
    original = path.read_bytes()

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(DepthKVError if isinstance(error, OSError) else type(error)) as caught:
        write_calibrated(path, path, make_calibration())
    assert isinstance(error, OSError) == ("no space left" in str(caught.value))
    assert path.read_bytes() == original
    assert list(tmp_path.iterdir()) == [path]


def child(path: Path, code: str) -> str:
    """A program that knows what it needs to write a calibration into a file."""
    return (
        f"import os, sys; sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]!r}\n"
        "from itertools import cycle; from pathlib import Path\n"
        "from support.keys import make_calibration\n"
        "from depthkv_edge.modelfile.writer import check_writable, write_calibrated\n"
        f"path = Path({str(path)!r})\n{code}"
    )


def test_file_size_limit(tmp_path):
    """The disk fills up while the copy is written: as if, for a process that may not write a file of that size."""
    path = small(tmp_path / "m.gguf", 2**20)
    original = path.read_bytes()
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))\n"
        "try: write_calibrated(path, path, make_calibration())\n"
        "except ValueError as error: print(error)"
    )
    outcome = run_python("-c", child(path, code))
    assert outcome.code == 0, outcome.err
    assert "no space left" in outcome.out and str(path) in outcome.out and outcome.out.count("\n") == 1
    assert path.read_bytes() == original
    assert list(tmp_path.iterdir()) == [path]


def test_disk_almost_full(tmp_path, monkeypatch):
    path = small(tmp_path / "m.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda directory: usage._replace(free=1000))
    with pytest.raises(DepthKVError, match="no space left, 0 MiB are free") as caught:
        check_writable(path, tmp_path / "out.gguf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_killed(tmp_path):
    """SIGKILL at random moments of writing in place: the file is always one of the two that are written in turn."""
    path = small(tmp_path / "m.gguf", 8 * 2**20)
    whole = {}
    for budget in (0.25, 0.75):
        target = tmp_path / f"{budget}.gguf"
        write_calibrated(path, target, make_calibration(budget=budget))
        whole[target.read_bytes()] = budget
        target.unlink()
    write_calibrated(path, path, make_calibration(budget=0.25))
    code = child(
        path,
        "print('ready', flush=True)\n"
        "for budget in cycle((0.75, 0.25)): write_calibrated(path, path, make_calibration(budget=budget))",
    )
    rng, seen, mid_copy = random.Random(0), set(), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        content = path.read_bytes()
        assert content in whole
        assert read_calibration(path).budget == whole[content]
        seen.add(whole[content])
        temporary = leftovers(tmp_path)
        mid_copy += len(temporary)
        for stale in temporary:
            assert stale.name.startswith("m.gguf.")
            stale.unlink()
        assert list(tmp_path.iterdir()) == [path]
    assert mid_copy > 0, "never killed while it was writing: the test shows nothing"


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("none/out.gguf", "none is not a directory"),
        ("in.gguf/out.gguf", "in.gguf is not a directory"),
        (".", "it is a directory"),
        ("pipe", "not a regular file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_refused_targets(tmp_path, target, part):
    source = small(tmp_path / "in.gguf")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DepthKVError) as caught:
        check_writable(source, tmp_path / target)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("kind", "part"), [("directory", "Permission denied"), ("file", "read-only")])
def test_unwritable(kind, part):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = small(directory / "in.gguf")
        (directory / "out.gguf").write_bytes(b"old")
        source.chmod(0o644)
        if kind == "directory":
            (directory / "out.gguf").unlink()
            directory.chmod(0o555)
        else:
            (directory / "out.gguf").chmod(0o444)
            directory.chmod(0o777)
        code = (
            "if os.geteuid() == 0: os.setuid(65534)\n"  # root may write anywhere
            f"try: check_writable(path, Path({str(directory / 'out.gguf')!r}))\n"
            "except ValueError as error: print(error)"
        )
        outcome = run_python("-c", child(source, code))
        directory.chmod(0o755)
        assert outcome.code == 0, outcome.err
        assert part in outcome.out and outcome.out.count("\n") == 1


def test_split_model(tmp_path):
    gguf = Gguf([])
    keys = [(b"general.architecture", gguf.value(T.STRING, "llama")), (b"split.count", gguf.value(T.UINT16, 3))]
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(replace(gguf, keys=keys).pack())
    with pytest.raises(DepthKVError, match="one of 3 files.*llama-gguf-split --merge"):
        check_writable(path, tmp_path / "out.gguf")


def test_truncated_source(tmp_path):
    """Wherever a file ends too early, it is refused at once, and in one line."""
    whole = small(tmp_path / "m.gguf", 64).read_bytes()
    target = tmp_path / "out.gguf"
    for n_bytes in range(len(whole)):
        (tmp_path / "m.gguf").write_bytes(whole[:n_bytes])
        with pytest.raises(DepthKVError) as caught:
            check_writable(tmp_path / "m.gguf", target)
        assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_source(data):
    """Damage anywhere in the header is refused in one line, or read; it never hangs and raises nothing else."""
    gguf, _ = data.draw(files())
    content = bytearray(gguf.pack())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.gguf"
        path.write_bytes(content)
        try:
            check_writable(path, path)
            read_calibration(path)
        except DepthKVError as error:
            assert "\n" not in str(error)
        assert path.read_bytes() == content


def test_layers_beyond_the_model(tmp_path):
    path = small(tmp_path / "m.gguf")
    original = path.read_bytes()
    with pytest.raises(DepthKVError, match="depthkv.layer_ids' names layer 2: the model has 2"):
        write_calibrated(path, path, make_calibration(3))
    assert path.read_bytes() == original
