#!/bin/sh
# Runs the engine under GCC's sanitizers, in builds of their own.
#   scripts/sanitize.sh          all of it (an hour or more)
#   scripts/sanitize.sh short    what the tests of each commit have time for: the native tests of the first build
# 1. Address and undefined behaviour, with only our own sources compiled for them, so that it is fast: native tests, `run`, the shapes
#    of real models, orders of calls, going back, the server.
# 2. The same with everything compiled for them, which is some 20 times slower: native tests, shapes of two models.
# 3. Threads, everything compiled for them, on two layers of the model: contexts in two threads, the server with four clients at once,
#    with completions of one prompt, while it decodes.
# Needs Linux, GCC and scripts/setup.sh --test. Exit status 77: its sanitizers cannot be had or do not work on this machine.
set -eu
cd "$(dirname "$0")/.."
fail() { echo "sanitize: $1" >&2; exit 1; }
cannot() { echo "sanitize: $1" >&2; exit 77; }
short=${1-}
case $short in "" | short) ;; *) fail "unknown argument $short (there is short)" ;; esac
export CC="${CC:-cc}" CXX="${CXX:-c++}" # by the names of the plain build, with whose objects a compiler cache then serves
asan=$("$CC" -print-file-name=libasan.so 2> /dev/null) && [ -e "$asan" ] ||
    cannot "$CC has no libasan.so: set CC and CXX to GCC's (gcc, g++)"
[ -x build/engine/bin/test-llama-archs ] || scripts/setup.sh --test >&2
PATH=$PWD/.venv/bin:$PATH # cmake and ninja may live there
export PATH
reports=build/sanitize-reports
rm -rf "$reports"
mkdir -p "$reports"

# Quoted, since a path may hold what separates options. Undefined behaviour ends the process as an illegal instruction that the
# address sanitizer reports: what its own runtime prints would be seen by nobody in a test that passes.
export ASAN_OPTIONS="detect_leaks=0:handle_sigill=1:log_path='$PWD/$reports/address'"
# Upstream's own: llama-server's clients read the parameters while the model's loading writes them.
echo race:server_context_impl::load_model > build/sanitize-thread.supp
export TSAN_OPTIONS="log_path='$PWD/$reports/thread':suppressions='$PWD/build/sanitize-thread.supp'"
export OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 OMP_WAIT_POLICY=passive # threads are what the third build is for

# build DIRECTORY "TARGET..." CMAKE-OPTION...
build() {
    dir=$1 targets=$2
    shift 2
    started=$(date +%s)
    {
        # shellcheck disable=SC2086
        cmake -S . -B "$dir" -G Ninja -DDEPTHKV_BUILD_TOOLS=ON -DPython_EXECUTABLE="$PWD/.venv/bin/python" "$@" &&
            cmake --build "$dir" --target $targets
    } > "$dir.log" 2>&1 || {
        tail -n 40 "$dir.log" >&2
        fail "the build failed, see above (everything: $dir.log)"
    }
    echo "$dir: built in $(($(date +%s) - started)) s"
}
# build_all DIRECTORY "TARGET..." FLAGS CMAKE-OPTION...: every source with the flags. More optimisation, or more than line numbers,
# and the compiler spends minutes on some of llama.cpp's files.
build_all() {
    dir=$1 targets=$2 flags=$3
    shift 3
    build "$dir" "$targets" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
        -DCMAKE_C_FLAGS_RELEASE="-O1 -DNDEBUG" -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" "$@"
}
failed=
# step COMMAND...
step() {
    echo "== $*"
    started=$(date +%s)
    "$@" || failed="$failed
$*"
    echo "== $(($(date +%s) - started)) s"
}
with_programs() { env DEPTHKV_TEST_PROGRAMS="$PWD/$dir/bin" "$@"; }
# Python itself is not built that way: the sanitizer has to be there before the library is, and before it what throws exceptions
with_asan() {
    with_programs env LD_PRELOAD="$asan $("$CXX" -print-file-name=libstdc++.so.6)" DEPTHKV_LIB_PATH="$PWD/$dir/bin" "$@"
}
native_tests() {
    if ! [ -e "$dir/test-models.written" ]; then # by the plain build: here they are only read
        rm -rf "$dir/test-models"
        mkdir -p "$dir/test-models"
        build/engine/bin/test-llama-archs -o "$dir/test-models/" > "$dir-models.log" 2>&1 ||
            fail "test-llama-archs failed, see $dir-models.log"
        touch "$dir/test-models.written"
    fi
    step ctest --test-dir "$dir" -L native --fixture-exclude-any test-models --no-tests=error --output-on-failure
}
# seen KIND FLAGS CODE: whether a fault is reported at all
seen() {
    echo "#include <pthread.h>
int x; void * add(void * p) { x += 1; return p; } int main(int n, char ** v) { $3 }" > "$reports/fault.cpp"
    # shellcheck disable=SC2086
    $CXX $2 -pthread -o "$reports/fault" "$reports/fault.cpp"
    "$reports/fault" > /dev/null 2>&1 || true
    rm "$reports"/fault*
    set -- "$reports/$1".*
    [ -e "$1" ] || cannot "$CXX's sanitizers report nothing here, not even a fault made for them"
    rm "$@"
}

pytest="python -m pytest -q -p no:cacheprovider"
frames="-fno-omit-frame-pointer -g1"
undefined="-fsanitize=address,undefined -fsanitize-undefined-trap-on-error"
seen address "$undefined" "char * p = new char[n]; delete[] p; return p[0];"
seen address "$undefined" "x = 0x7fffffff; x += n; return x;"
link=-fsanitize=address
[ -n "$short" ] && more= || more="depthkv-libraries llama-server"
build build/sanitize-own "depthkv-native-tests $more" -DCMAKE_BUILD_TYPE=Release -DDEPTHKV_NATIVE_FLAGS="$undefined $frames" \
    -DCMAKE_SHARED_LINKER_FLAGS=$link -DCMAKE_EXE_LINKER_FLAGS=$link
native_tests
if [ -z "$short" ]; then
    step with_asan python -m depthkv_edge run smollm2 --kv-budget 0.4 -c 3072 -n 64 --threads 2 --json \
        -f native/include/llama-depthkv.h -p "What is this?"
    step with_asan $pytest tests/engine/test_cache_states.py tests/engine/test_rollback.py tests/engine/test_engine.py tests/native/test_zoo.py
    step with_programs $pytest tests/server/test_server_native.py

    build_all build/sanitize-address "depthkv-libraries depthkv-native-tests" "$undefined $frames"
    native_tests
    step with_asan $pytest tests/native/test_zoo.py -k "gpt-oss or Gemma-4-E2B"

    seen thread -fsanitize=thread "pthread_t t; pthread_create(&t, 0, add, v); add(v); pthread_join(t, 0); return 0;"
    # OpenMP's own synchronisation is unknown to the sanitizer; that of ggml's threads is not
    build_all build/sanitize-thread "depthkv-libraries test-thread-safety llama-server" "-fsanitize=thread $frames" -DGGML_OPENMP=OFF
    python scripts/shallow-model.py build/sanitize-shallow.gguf 2
    # two contexts that evict, each in a thread of its own
    step "$dir/bin/test-thread-safety" -m build/sanitize-shallow.gguf -p "$(head -c 700 LICENSE)" -n 8 -c 256 -ub 32 -np 1 -t 1 \
        --override-kv depthkv.budget=float:0.5
    step with_programs env DEPTHKV_TEST_MODEL=build/sanitize-shallow.gguf $pytest tests/server/test_server_native.py \
        -k "clients or completions or decodes or leaves"
fi
n=$(find "$reports" -type f | wc -l)
if [ "$n" != 0 ]; then
    find "$reports" -type f -exec head -n 40 {} \; >&2
    fail "$n processes were reported, see above (everything: $reports)"
fi
[ -z "$failed" ] || fail "no report, but these steps failed:$failed"
echo "nothing was reported"
