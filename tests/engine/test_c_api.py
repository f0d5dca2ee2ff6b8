"""The C API as a package: found by CMake and by pkg-config, wherever it is moved to, and the examples that use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

import depthkv_edge
from depthkv_edge.engine import library

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "cc"
# scripts/setup.sh installs cmake and ninja into the environment where the system has none
PATH = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
CMAKE = shutil.which("cmake", path=PATH) or "cmake"
GENERATOR = {} if shutil.which("make") else {"CMAKE_GENERATOR": "Ninja", "PATH": PATH}


def run(*command: object, **environment: str) -> Outcome:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=os.environ | GENERATOR | environment,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def succeed(*command: object, **environment: str) -> str:
    outcome = run(*command, **environment)
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome.out


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with include/ and lib/."""
    lib = library.library_dir()
    if not (lib / "cmake").is_dir():  # DEPTHKV_LIB_PATH names a build tree
        stage = tmp_path_factory.mktemp("stage")
        succeed(CMAKE, "--install", lib.parent, "--prefix", stage)
        (lib,) = (path.parent for path in stage.rglob("cmake") if path.is_dir())
    return lib.parent


@pytest.fixture(scope="module")
def prefix(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, moved to where nobody built it."""
    moved = tmp_path_factory.mktemp("moved to") / "elsewhere"
    for part in ("include", "lib"):
        shutil.copytree(installed / part, moved / part)
    return moved


@pytest.fixture(scope="module")
def example(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("example")
    strict = "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"
    succeed(CMAKE, "-S", EXAMPLES / "c", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", strict)
    succeed(CMAKE, "--build", build)
    return build / "example"


@pytest.fixture(scope="module")
def text_file(document: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text(document(900))
    return path


# --- the package ------------------------------------------------------------------------------------------------------


def test_example(example, smollm2, text_file):
    out = succeed(example, smollm2, text_file, 0.4, 16)
    used, full = re.search(r"KV cache ([\d.]+) of ([\d.]+) MiB", out).groups()
    assert 0.36 < float(used) / float(full) <= 0.4
    layers = re.findall(r"layer +(\d+): (\d+) of (\d+) cells", out)
    assert [int(layer) for layer, _, _ in layers] == list(range(30))
    assert all(0 < int(held) <= int(cells) < 600 for _, held, cells in layers)
    assert int(re.search(r"(\d+) cells evicted", out)[1]) > 30 * 300
    assert out.splitlines()[0].strip()  # what was decoded


def test_example_says_what_is_wrong(example, smollm2, text_file):
    outcome = run(example, smollm2, text_file, "1.5")
    line = outcome.err.splitlines()[-1]
    assert outcome.code == 1 and line.startswith("example: context: ") and "KV budget 1.5" in line
    assert "none.gguf: cannot be loaded" in run(example, "none.gguf", text_file, 0.4).err


def flags(prefix: Path, *fields: str) -> list[str]:
    """What pkg-config makes of depthkv.pc: the tool is not on every machine."""
    file = prefix / "lib" / "pkgconfig" / "depthkv.pc"
    variables = {"pcfiledir": str(file.parent)}
    values = {}
    for line in file.read_text().splitlines():
        expanded = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], line)
        if match := re.fullmatch(r"(\w+)=(.*)", expanded):
            variables[match[1]] = match[2]
        elif match := re.fullmatch(r"(\w+): (.*)", expanded):
            values[match[1]] = match[2]
    return [flag for field in fields for flag in re.split(r" (?=-)", values[field])]


def test_pkg_config(prefix, smollm2, text_file, tmp_path):
    source, program = EXAMPLES / "c" / "main.c", tmp_path / "example"
    rpath = f"-Wl,-rpath,{prefix / 'lib'}"
    succeed(COMPILER, source, "-o", program, *flags(prefix, "Cflags", "Libs"), rpath)
    assert "floor" in run(program, smollm2, text_file, 0.01).err  # it runs, and reads the model
    if tool := shutil.which("pkg-config") or shutil.which("pkgconf"):
        directory = str(prefix / "lib" / "pkgconfig")
        assert succeed(tool, "--modversion", "depthkv", PKG_CONFIG_PATH=directory).strip() == version()
        assert "-lllama" in succeed(tool, "--libs", "depthkv", PKG_CONFIG_PATH=directory)


def version() -> str:
    return re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def find_package(directory: Path, prefix: Path, arguments: str) -> Outcome:
    lists = f"cmake_minimum_required(VERSION 3.21)\nproject(app NONE)\nfind_package(depthkv {arguments})\n"
    (directory / "CMakeLists.txt").write_text(lists + 'message("found ${depthkv_VERSION} in ${depthkv_LIBRARY_DIR}")\n')
    return run(CMAKE, "-S", directory, "-B", directory / "build", f"-DCMAKE_PREFIX_PATH={prefix}")


def test_version(prefix, tmp_path):
    """Found twice, as by two libraries of an app."""
    outcome = find_package(tmp_path, prefix, f"{version()} REQUIRED)\nfind_package(depthkv REQUIRED")
    assert outcome.code == 0 and f"found {version()} in {prefix / 'lib'}" in outcome.err, outcome.err
    assert find_package(tmp_path, prefix, "9.9 REQUIRED").code == 1


def test_a_tree_that_is_not_complete(prefix, tmp_path):
    shutil.copytree(prefix, tmp_path / "prefix")
    for path in (tmp_path / "prefix" / "lib").glob("*ggml-base*"):
        path.unlink()
    outcome = find_package(tmp_path, tmp_path / "prefix", "REQUIRED")
    assert outcome.code == 1
    assert "ggml-base" in outcome.err and "copied as a whole" in " ".join(outcome.err.split())


@pytest.mark.parametrize("standard", ["-std=c11", "-std=c++17"])
def test_the_header_alone(prefix, tmp_path, standard):
    # a copy, since upstream's headers are not free of warnings, and in system directories none are given
    shutil.copy(prefix / "include" / "llama-depthkv.h", tmp_path)
    (tmp_path / "program").write_text('#include "llama-depthkv.h"\n')
    language = ["-x", "c++" if "++" in standard else "c", standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    include = ["-I", tmp_path, "-isystem", prefix / "include"]
    succeed(COMPILER, *language, *include, "-fsyntax-only", tmp_path / "program")


@pytest.mark.skipif("DEPTHKV_LIB_PATH" in os.environ, reason="a build tree is laid out otherwise")
def test_directories_of_the_package():
    assert (depthkv_edge.cmake_dir() / "depthkv-config.cmake").is_file()
    assert (depthkv_edge.include_dir() / "llama-depthkv.h").is_file()
    assert (depthkv_edge.library_dir() / "pkgconfig" / "depthkv.pc").is_file()


# --- mobile recipes: the compilers are not here, so stand-ins record how they are called ------------------------------


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Directory of stand-ins for cmake, libtool and xcodebuild: what they are told goes into its file `calls`."""
    directory = tmp_path / "tools"
    directory.mkdir()
    scripts = {
        "cmake": """
            while [ $# -gt 0 ]; do [ "$1" = --prefix ] && prefix=$2; shift; done
            [ -z "${prefix-}" ] && exit
            mkdir -p "$prefix/lib/cmake" "$prefix/include"
            touch "$prefix/include/llama-depthkv.h"
            touch "$prefix/lib/libllama.so" "$prefix/lib/libggml.so" "$prefix/lib/libllama.a"
        """,
        "libtool": 'touch "$3"',
        "xcodebuild": 'while [ "$1" != -output ]; do shift; done; mkdir "$2"',
    }
    for name, script in scripts.items():
        path = directory / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> "{directory}/calls"\n{script}\n')
        path.chmod(0o755)
    return directory


def with_tools(tools: Path) -> dict[str, str]:
    return {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}


def test_android(tools, tmp_path):
    ndk = tmp_path / "ndk"
    for path in (
        "build/cmake/android.toolchain.cmake",
        *(
            f"toolchains/llvm/prebuilt/linux-x86_64/sysroot/usr/lib/{triple}-linux-android/libc++_shared.so"
            for triple in ("aarch64", "x86_64")
        ),
    ):
        (ndk / path).parent.mkdir(parents=True)
        (ndk / path).touch()
    environment = with_tools(tools) | {"ANDROID_NDK": str(ndk), "ABIS": "arm64-v8a x86_64"}
    succeed(EXAMPLES / "android" / "build.sh", tmp_path / "out", **environment)
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / "jniLibs").rglob("*.so")) == [
        f"jniLibs/{abi}/{name}"
        for abi in ("arm64-v8a", "x86_64")
        for name in ("libc++_shared.so", "libggml.so", "libllama.so")
    ]
    assert (tmp_path / "out" / "include" / "llama-depthkv.h").is_file()
    configure, build, install = (tools / "calls").read_text().splitlines()[:3]
    assert f"-S {ROOT}" in configure and "-DANDROID_ABI=arm64-v8a -DANDROID_PLATFORM=android-28" in configure
    assert "--build" in build and "--install" in install


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"ANDROID_NDK": ""}, "ANDROID_NDK is not set"), ({"ANDROID_NDK": "/none"}, "no /none/build/cmake")],
)
def test_android_without_an_ndk(tmp_path, environment, reason):
    outcome = run(EXAMPLES / "android" / "build.sh", tmp_path / "out", **({"ANDROID_NDK_HOME": ""} | environment))
    assert outcome.code == 1 and reason in outcome.err
    assert not (tmp_path / "out").exists()


def test_ios(tools, tmp_path):
    succeed(EXAMPLES / "ios" / "build.sh", tmp_path / "out", **with_tools(tools))
    assert (tmp_path / "out" / "depthkv.xcframework").is_dir()
    for sdk in ("iphoneos", "iphonesimulator"):
        assert (tmp_path / "out" / f"build-{sdk}" / "install" / "include" / "module.modulemap").is_file()
        assert (tmp_path / "out" / f"build-{sdk}" / "libdepthkv.a").is_file()
    calls = (tools / "calls").read_text()
    assert "-DCMAKE_OSX_SYSROOT=iphoneos -DCMAKE_OSX_ARCHITECTURES=arm64 " in calls
    assert "-DCMAKE_OSX_SYSROOT=iphonesimulator -DCMAKE_OSX_ARCHITECTURES=arm64;x86_64 " in calls


def test_ios_without_xcode(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "/usr/bin/dirname")
    outcome = run("/bin/sh", EXAMPLES / "ios" / "build.sh", tmp_path / "out", PATH=str(tmp_path))
    assert outcome.code == 1 and "needs macOS with Xcode" in outcome.err
    assert not (tmp_path / "out").exists()
