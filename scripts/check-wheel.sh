#!/bin/sh
# Builds a wheel, installs it in an environment of its own, and runs it as this processor and, under emulation, as others.
#   scripts/check-wheel.sh [WHEEL]    default: the one that `pip wheel .` makes (many minutes the first time)
# Leaves the environment in build/check-wheel/venv, for `python -m benchmarks.wheel`. Emulation needs qemu (Debian: apt-get install
# qemu-user) and an x86-64 machine. PYTHON=... chooses the interpreter. Exit status 77: all was well but what takes qemu, which
# is missing.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
fail() { echo "check-wheel: $1" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" > /dev/null || fail "no $python found: install Python 3.10 or later"
if [ -z "${CC-}${CXX-}" ] && command -v cc > /dev/null && command -v c++ > /dev/null; then
    export CC=cc CXX=c++ # as setup.sh does: the same compiler, and the same entries of a compiler cache
fi
work=$root/build/check-wheel
venv=$work/venv
mkdir -p "$work"
"$python" -m venv --clear "$venv" || fail "$python lacks venv (Debian: apt-get install python3-venv)"
PATH=$venv/bin:$PATH
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q "$@" || fail "pip $1 failed, see above"; }

wheel=${1-}
if [ -z "$wheel" ]; then
    rm -rf "$work/wheels"
    started=$(date +%s)
    pip wheel . --no-deps -w "$work/wheels"
    wheel=$(ls "$work"/wheels/depthkv_edge-*.whl)
    echo "built in $(($(date +%s) - started)) s"
fi
echo "wheel: $(basename "$wheel"), $(($(wc -c < "$wheel") / 1000000)) MB"
case $wheel in *-py3-none-*.whl) ;; *) fail "$wheel is not for every Python 3" ;; esac

version=$("$venv/bin/python" -c "import json; print(json.load(open('native/llama.cpp.lock'))['version'])")
CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install "llama-cpp-python==$version"
pip install "$wheel"
command -v cmake > /dev/null || pip install cmake

# From here on in a directory that has nothing to do with any of it, but holds a library that asks to be loaded.
foreign=$work/elsewhere
rm -rf "$foreign"
mkdir "$foreign"
cd "$foreign"
lib=$(python -c "import depthkv_edge; print(depthkv_edge.library_dir())")
case $lib in "$venv"/*) ;; *) fail "$lib is not the wheel's" ;; esac
model=$(depthkv-edge fetch smollm2)
cat > trap.c << 'END'
#include <stdio.h>
int ggml_backend_score(void) { return 1 << 30; }
__attribute__((constructor)) static void loaded(void) { fclose(fopen("loaded", "w")); }
END
${CC:-cc} -shared -fPIC trap.c -o libggml-cpu-trap.so
cp libggml-cpu-trap.so libggml-blas-trap.so

# --- what it holds ----------------------------------------------------------------------------------------------------

variants=$(cd "$lib" && ls | sed -n -e 's/^\(lib\)\{0,1\}ggml-cpu-\(.*\)\.so$/\2/p' -e 's/^\(lib\)\{0,1\}ggml-cpu-\(.*\)\.dll$/\2/p')
echo "variants:" $variants
[ "$(echo "$variants" | wc -l)" -gt 1 ] || fail "there is no choice of processors in $lib"
if [ "$(uname -sm)" = "Linux x86_64" ] && command -v objdump > /dev/null; then
    # uses LIBRARY REGISTERS: whether there is code for them. libllama.so has some, and asks the processor first: what runs below
    # as a processor without AVX shows that
    uses() { objdump -d --no-show-raw-insn "$lib/$1" | grep -q -m 1 "%$2"; }
    for library in libggml.so libggml-base.so llama-server libggml-cpu-x64.so libggml-cpu-sse42.so; do
        ! uses "$library" '[yz]mm' || fail "$library needs AVX"
    done
    uses libggml-cpu-haswell.so ymm || fail "libggml-cpu-haswell.so has no AVX2"
    ! uses libggml-cpu-haswell.so zmm || fail "libggml-cpu-haswell.so needs AVX-512"
    uses libggml-cpu-zen4.so zmm || fail "libggml-cpu-zen4.so has no AVX-512"
fi

# --- who runs it ------------------------------------------------------------------------------------------------------

cmake -S "$root/examples/c" -B "$work/example" -Ddepthkv_DIR="$(python -c 'import depthkv_edge; print(depthkv_edge.cmake_dir())')" \
    > "$work/example.log" && cmake --build "$work/example" >> "$work/example.log" || fail "the C example does not build: $work/example.log"
python -c "
from pydoc_data.topics import topics
print(topics['specialnames'][:700])" > document.txt
head -c 150 document.txt > short.txt

# A program that knows the bindings only. It says which library computes, and that asking again changes nothing.
cat > plain.py << 'END'
import ctypes, os, re, sys
import llama_cpp
lines = []
@llama_cpp.llama_log_callback
def log(level, text, data):
    lines.append(text.decode())
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=2)
answer = llm("The capital of France is", max_tokens=2, temperature=0)["choices"][0]["text"]
(chosen,) = re.findall(r"loaded CPU backend from .*ggml-cpu-(.*)\.", "".join(lines))
directory = os.environ["LLAMA_CPP_LIB_PATH"]
ggml = ctypes.CDLL(os.path.join(directory, next(n for n in ("libggml.so", "libggml.dylib", "ggml.dll") if os.path.exists(os.path.join(directory, n)))))
before = ggml.ggml_backend_reg_count(), ggml.ggml_backend_dev_count()
ggml.ggml_backend_load_all()
assert before == (ggml.ggml_backend_reg_count(), ggml.ggml_backend_dev_count()), "registered twice"
print(chosen, repr(answer))
END

cat > server.py <<'END'
import json, socket, subprocess, sys, time, urllib.request
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
url = f"http://127.0.0.1:{port}/"
with subprocess.Popen([*sys.argv[1:], "--port", str(port)], stdout=subprocess.DEVNULL, stderr=open("server.err", "w")) as server:
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(url + "health")
                break
            except OSError:
                time.sleep(0.2)
        body = json.dumps({"prompt": "Hello", "n_predict": 2}).encode()
        answer = json.load(urllib.request.urlopen(urllib.request.Request(url + "completion", body)))
        assert answer["timings"]["predicted_n"] == 2, answer
    finally:
        server.kill()
END

# as NAME FILE BUDGET EMULATOR...: the bindings and the C example, as the processor that the emulator shows
as() {
    name=$1 file=$2 budget=$3
    shift 3
    started=$(date +%s)
    plain=$(LLAMA_CPP_LIB_PATH=$lib "$@" "$venv/bin/python" plain.py "$model" 2> plain.err) ||
        fail "$name: llama_cpp failed: $(tail -n 3 plain.err)"
    "$@" "$work/example/example" "$model" "$file" "$budget" 2 > example.txt 2> example.err ||
        fail "$name: the C example failed: $(tail -n 3 example.err)"
    evicted=$(grep -o '[0-9]* cells evicted' example.txt) || fail "$name: the C example has no statistics"
    echo "$name: $plain, $evicted by the C example ($(($(date +%s) - started)) s)"
}
# programs NAME EMULATOR...: the command line and the server
programs() {
    name=$1
    shift
    "$@" "$venv/bin/python" -m depthkv_edge run smollm2 --kv-budget 0.5 -c 512 -n 2 --threads 2 -p "Hello" > run.txt 2> run.err ||
        fail "$name: depthkv-edge run failed: $(tail -n 3 run.err)"
    "$venv/bin/python" server.py "$@" "$lib/llama-server" -m "$model" -c 256 -t 2 2> /dev/null ||
        fail "$name: llama-server failed: $(tail -n 3 server.err)"
    echo "$name: depthkv-edge run and llama-server answer"
}
# expect NAME VARIANT EMULATOR...
expect() {
    name=$1 variant=$2
    shift 2
    as "$name" short.txt 1 "$@" # a hundred tokens, to evict some, would take minutes
    [ "${plain%% *}" = "$variant" ] || fail "$name: chose ${plain%% *} instead of $variant"
}
as "this processor" document.txt 0.6
[ "${evicted%% *}" -gt 0 ] || fail "the C example evicts nothing"
programs "this processor"
untried=
if [ "$(uname -sm)" = "Linux x86_64" ]; then
    if command -v qemu-x86_64 > /dev/null; then
        export OMP_THREAD_LIMIT=2 OMP_WAIT_POLICY=passive # emulated threads that spin keep the others from running
        expect "Haswell (no AVX-512)" haswell qemu-x86_64 -cpu Haswell
        expect "SandyBridge (no AVX2)" sandybridge qemu-x86_64 -cpu SandyBridge
        expect "Nehalem (no AVX)" sse42 qemu-x86_64 -cpu Nehalem
        programs "Nehalem (no AVX)" qemu-x86_64 -cpu Nehalem
    else
        untried=1
    fi
fi
[ ! -e loaded ] || fail "a library in the current directory was loaded"
if [ -n "$untried" ]; then
    echo "check-wheel: good as this processor, not tried as others: no qemu-x86_64 found (Debian: apt-get install qemu-user)" >&2
    exit 77
fi
echo "the wheel is good"
