#!/bin/sh
# Builds the libraries without our patches, llama-bench, llama-perplexity and upstream's tests from the same pinned sources, with
# the same flags, for comparisons. Prints the directory that holds them.
#   scripts/build-baseline.sh [--libraries] [DIRECTORY]    default: build/baseline; --libraries: nothing else
set -eu
cd "$(dirname "$0")/.."
targets="depthkv-libraries depthkv-tools"
if [ "${1-}" = --libraries ]; then
    targets=depthkv-libraries
    shift
fi
dir=${1:-build/baseline}
[ -x .venv/bin/python ] || scripts/setup.sh >&2
PATH=$PWD/.venv/bin:$PATH # cmake and ninja may live there
export PATH
if [ -z "${CC-}${CXX-}" ] && command -v cc > /dev/null && command -v c++ > /dev/null; then
    export CC=cc CXX=c++ # as setup.sh does: the same compiler for both builds
fi
mkdir -p "$dir"
log=$dir/build.log
echo "Building llama.cpp without patches (some minutes the first time; progress in $log)" >&2
# shellcheck disable=SC2086
{
    cmake -S . -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DDEPTHKV_BASELINE=ON -DDEPTHKV_BUILD_TOOLS=ON \
        -DPython_EXECUTABLE="$PWD/.venv/bin/python" ${CMAKE_ARGS-} &&
        cmake --build "$dir" --target $targets
} > "$log" 2>&1 || {
    tail -n 40 "$log" >&2
    echo "build-baseline: the build failed, see above (everything: $log)" >&2
    exit 1
}
cd "$dir/bin"
pwd
