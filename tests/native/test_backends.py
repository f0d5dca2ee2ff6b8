"""Where the libraries of a wheel look for the CPU code that suits a processor: backends that only say who they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "engine" / "llama.cpp"
BUILD = ROOT / "build" / "engine" / "bin"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "c++"

BACKEND = """
#include "ggml-backend-impl.h"
#include <cstdio>
static const char * get_name(ggml_backend_reg_t) { return NAME; }
static size_t get_device_count(ggml_backend_reg_t) { return 0; }
static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, { get_name, get_device_count, nullptr, nullptr }, nullptr };
extern "C" {
int ggml_backend_score() { return SCORE; }
ggml_backend_reg_t ggml_backend_init() { return &reg; }
}
__attribute__((constructor)) static void loaded() { puts("opened " NAME); }
"""

PROGRAM = """
#include "ggml-backend.h"
#include <cstdio>
int main() {
    for (int i = 0; i < 2; ++i) {
        ggml_backend_load_all();
    }
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        printf("registered %s\\n", ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
}
"""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names and compiler options are Linux's"),
    pytest.mark.skipif(not TREE.is_dir(), reason="the engine was built elsewhere"),
]


def compile_to(path: Path, source: str | list[Path], *options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, str):
        file = path.parent.parent / f"{path.name}.cpp"
        file.write_text(source)
        source = [file]
    include = [f"-I{TREE / 'ggml' / part}" for part in ("include", "src")]
    command = [COMPILER, "-std=c++17", "-O0", *include, *map(str, source), "-o", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of ggml's registry as a wheel has it, and of a program in another directory."""
    root = tmp_path_factory.mktemp("registry")
    library = root / "lib"
    library.mkdir()
    shutil.copy(BUILD / "libggml-base.so", library)
    sources = [TREE / "ggml" / "src" / name for name in ("ggml-backend-reg.cpp", "ggml-backend-dl.cpp")]
    link = ["-shared", "-fPIC", f"-L{library}", "-lggml-base", "-ldl", "-Wl,-rpath,$ORIGIN"]
    compile_to(library / "libggml.so", sources, "-DGGML_BACKEND_DL", "-DGGML_BUILD", "-DGGML_SHARED", "-DNDEBUG", *link)
    compile_to(root / "app" / "program", PROGRAM, f"-L{library}", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}")
    return root


@pytest.fixture
def directories(registry: Path, tmp_path: Path) -> dict[str, Path]:
    """The same, moved, and a current directory."""
    shutil.copytree(registry, tmp_path / "moved")
    (tmp_path / "current").mkdir()
    return {
        "library": tmp_path / "moved" / "lib",
        "program": tmp_path / "moved" / "app",
        "current": tmp_path / "current",
    }


def add_backend(directory: Path, name: str, score: int) -> None:
    file = directory / f"libggml-{name}.so"
    compile_to(file, BACKEND, f'-DNAME="{name}"', f"-DSCORE={score}", "-shared", "-fPIC")


def run(directories: dict[str, Path]) -> tuple[set[str], list[str]]:
    """Backends that were opened, and those that were registered."""
    done = subprocess.run(
        [directories["program"] / "program"],
        cwd=directories["current"],
        env=os.environ | {"LD_LIBRARY_PATH": str(directories["library"])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    return {name for what, name in words if what == "opened"}, [name for what, name in words if what == "registered"]


def test_the_best_that_can_run_is_taken_once(directories):
    for name, score in (("cpu-old", 1), ("cpu-new", 7), ("cpu-newer", 0)):  # 0: this processor cannot
        add_backend(directories["library"], name, score)
    assert run(directories)[1] == ["cpu-new"]


def test_beside_the_library_before_beside_the_program(directories):
    add_backend(directories["library"], "cpu-ours", 1)
    add_backend(directories["program"], "cpu-theirs", 9)
    assert run(directories) == ({"cpu-ours"}, ["cpu-ours"])


def test_beside_the_program_if_nowhere_else(directories):
    add_backend(directories["program"], "cpu-theirs", 1)
    assert run(directories)[1] == ["cpu-theirs"]


def test_never_in_the_current_directory(directories):
    for name in ("cpu-trap", "cpu", "cuda-trap", "vulkan"):
        add_backend(directories["current"], name, 9)
    assert run(directories) == (set(), [])
    add_backend(directories["library"], "cpu-ours", 1)
    assert run(directories) == ({"cpu-ours"}, ["cpu-ours"])
