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
from depthkv_edge.engine.rules import SCORERS

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


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.6, 0.3, 0.15])
@pytest.mark.parametrize("n_ctx", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("n_layers", [1, 2, 30, 31])
def test_alloc(n_layers, n_ctx, budget):
    cells = capi.alloc(budget, n_layers, n_ctx, n_align=32)
    assert len(cells) == n_layers
    assert sum(cells) <= budget * n_layers * n_ctx + 1e-6
    assert budget * n_layers * n_ctx - sum(cells) < 32
    assert max(cells) - min(cells) <= 32
    assert all(n % 32 == 0 or n == n_ctx for n in cells)


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


def test_llama_cpp_imported_first_with_our_library():
    code = "import llama_cpp\nfrom depthkv_edge import Llama"
    outcome = run_python("-c", code, LLAMA_CPP_LIB_PATH=str(library.library_dir()))
    assert outcome.code == 0, outcome.err


def test_importing_the_package_loads_no_library():
    code = "import sys, depthkv_edge, depthkv_edge.cli.main; assert 'llama_cpp' not in sys.modules"
    outcome = run_python("-c", code)
    assert outcome.code == 0, outcome.err


def test_no_torch():
    code = "import sys; import depthkv_edge.llama, depthkv_edge.chat.answer; assert 'torch' not in sys.modules"
    outcome = run_python("-c", code)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_is_known_to_the_engine(load, tmp_path, scorer):
    llama = load(write_llama(tmp_path / "m.gguf"), kv_budget=0.5, scorer=scorer)
    assert llama.kv_stats().scorer == scorer


@pytest.mark.parametrize("option", [{"scorer": "magic"}, {"n_sink": -1}, {"n_recent": -1}, {"n_ctx": -1}])
def test_wrong_option(smollm2, option):
    with pytest.raises(DepthKVError):
        Llama(smollm2, verbose=False, **option)


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


def test_sizes_in_bytes_and_tokens(load, tmp_path):
    path = write_llama(tmp_path / "m.gguf")
    full = load(path).kv_stats().bytes_full
    assert full == 2 * 512 * 2 * 64 * 2  # layers, positions, K and V, row, bytes of an F16
    assert load(path, kv_budget=f"{full // 2048}KiB").kv_stats().bytes == full // 2
    assert load(path, kv_budget="256t").kv_stats().bytes == full // 2
    assert load(path, kv_budget="384t", type_k=8, type_v=8).kv_stats().budget == 0.75
    assert load(path, kv_budget="1GiB").kv_stats().bytes == full


def test_an_error_of_one_load_does_not_leak_into_the_next(smollm2, tmp_path):
    with pytest.raises(DepthKVError, match="floor"):
        Llama(smollm2, kv_budget="1KiB", verbose=False)
    (tmp_path / "m.gguf").write_bytes(smollm2.read_bytes()[:5000])
    with pytest.raises(DepthKVError, match="damaged or incomplete"):
        Llama(tmp_path / "m.gguf", verbose=False)


def test_quiet_unless_verbose(smollm2, capfd):
    with pytest.raises(DepthKVError):
        Llama(smollm2, kv_budget="1KiB", verbose=False)
    assert capfd.readouterr() == ("", "")


def test_rebuilt_from_its_state(load, tmp_path):
    llama = load(write_llama(tmp_path / "m.gguf"), kv_budget=0.5, scorer="window", n_sink=8, n_recent=64)
    state = llama.__getstate__()
    again = load(Path(state.pop("model_path")), **state)
    assert again.kv_stats().to_dict() == llama.kv_stats().to_dict()
    assert again.context_params.flash_attn_type == llama.context_params.flash_attn_type
