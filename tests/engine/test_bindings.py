"""The bindings mirror the header, run on our library, and pass on what they are told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import run_python
from support.tiny import write_llama

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.engine import capi, library

HEADER = Path(__file__).parents[2] / "native" / "include" / "llama-depthkv.h"


def without_comments() -> str:
    return re.sub(r"//.*", "", HEADER.read_text())


def test_every_struct_is_mirrored():
    structs = re.findall(r"^struct (\w+) \{(.*?)^\};", without_comments(), re.DOTALL | re.MULTILINE)
    assert structs
    for name, body in structs:
        fields = re.findall(r"(\w+)(?:\[\d+\])?\s*;", body)
        assert [field[0] for field in getattr(capi, name)._fields_] == fields, name


def test_every_function_is_bound():
    functions = re.findall(r"LLAMA_API\s[^;(]*?(\w+)\s*\(([^;]*)\);", without_comments())
    assert functions
    for name, arguments in functions:
        n_arguments = 0 if arguments.strip() == "void" else arguments.count(",") + 1
        assert len(getattr(capi, name).argtypes) == n_arguments, name


def test_last_error_is_of_the_last_call():
    with pytest.raises(DepthKVError, match="budget"):
        capi.alloc(1.5, 2, 100)
    assert capi.last_error()
    capi.llama_depthkv_clear_error()
    assert capi.last_error() == ""


def test_our_library_is_the_one_in_use():
    assert Path(capi.llama_cpp.llama_cpp._lib._name).resolve().parent == library.library_dir()


def test_another_version_of_the_bindings(monkeypatch):
    monkeypatch.setattr(library, "BINDINGS_VERSION", "0.0.1")
    with pytest.raises(DepthKVError, match=r"0\.3\.36 is installed, and the engine needs 0\.0\.1"):
        library.import_bindings()


def test_llama_cpp_imported_first_with_another_library(tmp_path):
    for path in library.library_dir().glob("*"):
        if ".so" in path.name or path.suffix in (".dylib", ".dll"):
            shutil.copy(path, tmp_path)
    code = "import llama_cpp\nfrom depthkv_edge import Llama"
    outcome = run_python("-c", code, LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert outcome.code == 1
    assert "DepthKVError: llama_cpp was imported before depthkv_edge" in outcome.err.splitlines()[-1]
    assert str(tmp_path) in outcome.err.splitlines()[-1]


def test_nothing_is_imported_before_it_is_needed():
    code = """
import sys
import depthkv_edge, depthkv_edge.cli.main
assert "llama_cpp" not in sys.modules
import depthkv_edge.llama, depthkv_edge.chat.answer
assert "torch" not in sys.modules
"""
    outcome = run_python("-c", code)
    assert outcome.code == 0, outcome.err


def test_precedence(load, tmp_path):
    """The argument, then the key-value override, then the file."""
    path = write_llama(tmp_path / "m.gguf", lambda writer: writer.add_float32("depthkv.budget", 0.5))
    override = {"depthkv.budget": 0.75}
    cells = {
        "file": load(path).kv_stats(),
        "override": load(path, kv_overrides=override).kv_stats(),
        "argument": load(path, kv_overrides=override, kv_budget=0.25).kv_stats(),
        "whole": load(path, kv_budget=1.0).kv_stats(),
    }
    assert [stats.budget for stats in cells.values()] == [0.5, 0.75, 0.25, 1.0]
    assert [stats.bytes / stats.bytes_full for stats in cells.values()] == [0.5, 0.75, 0.25, 1.0]
    assert not cells["whole"].active


def test_a_load_that_fails_is_quiet_and_leaves_nothing_behind(smollm2, tmp_path, capfd):
    with pytest.raises(DepthKVError, match="floor"):
        Llama(smollm2, kv_budget="1KiB", verbose=False)
    (tmp_path / "m.gguf").write_bytes(smollm2.read_bytes()[:5000])
    with pytest.raises(DepthKVError, match="damaged or incomplete"):
        Llama(tmp_path / "m.gguf", verbose=False)
    assert capfd.readouterr() == ("", "")
