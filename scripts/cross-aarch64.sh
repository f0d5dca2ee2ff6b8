#!/bin/sh
# Builds for 64-bit ARM on another Linux machine, every variant of the CPU code as in a wheel, and runs under emulation, as several
# processors: a shape of the zoo and a real model that evict, and of our native tests those of kernels; as the first one all tests.
#   scripts/cross-aarch64.sh [CPU...]    default: those below, as qemu names them (qemu-aarch64 -cpu help)
# Needs a cross compiler and qemu (Debian: apt-get install g++-aarch64-linux-gnu qemu-user). The models that the tests read are
# written by the build of scripts/setup.sh --test. CMAKE_ARGS=... adds CMake options. Exit status 77: one of the two is missing.
set -eu
cd "$(dirname "$0")/.."
fail() { echo "cross-aarch64: $1" >&2; exit 1; }
cannot() { echo "cross-aarch64: $1" >&2; exit 77; }

# Cortex-A76 (Raspberry Pi 5): dot products, half floats. Cortex-A72 (Raspberry Pi 4): ARMv8.0. The last one has all that
# the emulator knows, with vectors as long as in most processors: SVE2, matrix products of bytes.
[ $# -gt 0 ] || set -- cortex-a76 cortex-a72 max,sve-default-vector-length=16
# variants CPU: those of which one has to be chosen; none is said for other processors
variants() {
    case $1 in
        cortex-a72) echo armv8.0_1 ;;
        cortex-a76) echo armv8.2_2 ;;
        max,sve-default-vector-length=16) echo armv8.6_2 armv9.2_2 ;; # without and with SME, which takes GCC 14
    esac
}
triple=aarch64-linux-gnu
command -v $triple-g++ > /dev/null || cannot "no $triple-g++ found: install it (Debian: apt-get install g++-$triple)"
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) ||
    cannot "no qemu-aarch64 found: install it (Debian: apt-get install qemu-user)"
native=build/engine/bin
[ -x $native/depth-zoo-make ] || scripts/setup.sh --test >&2
PATH=$PWD/.venv/bin:$PATH # cmake and ninja may live there
export PATH QEMU_LD_PREFIX="${QEMU_LD_PREFIX-/usr/$triple}"
export OMP_WAIT_POLICY=passive OMP_THREAD_LIMIT=1 # emulated threads wait for each other most of the time

dir=build/aarch64
log=$dir/build.log
mkdir -p "$dir"
model=$(.venv/bin/depthkv-edge fetch smollm2)
started=$(date +%s)
echo "Building (some minutes the first time; progress in $log)"
# Of the server nothing is built: it is the larger part, and nothing in it depends on the processor.
{
    cmake -S . -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_C_COMPILER=$triple-gcc -DCMAKE_CXX_COMPILER=$triple-g++ -DCMAKE_CROSSCOMPILING_EMULATOR="$qemu" \
        -DDEPTHKV_PORTABLE=ON -DDEPTHKV_BUILD_TOOLS=ON -DDEPTHKV_BUILD_SERVER=OFF -DDEPTHKV_TEST_MODEL="$model" \
        -DPython_EXECUTABLE="$PWD/.venv/bin/python" ${CMAKE_ARGS-} &&
        cmake --build "$dir" --target depthkv-libraries depthkv-native-tests llama-perplexity test-llama-archs
} > "$log" 2>&1 || {
    tail -n 40 "$log" >&2
    fail "the build failed, see above (everything: $log)"
}
echo "built in $(($(date +%s) - started)) s: $(cd "$dir/bin" && ls | grep -c '^libggml-cpu-') variants of the CPU code"

# of the architectures those that people run, and one that is refused: all of them would take an hour
rm -f "$dir"/test-models/*.gguf
archs='llama|qwen2|qwen3|qwen3moe|gemma2|gemma3|phi3|smollm3|gpt-oss|granite|olmo2|exaone4|mistral3|minicpm3|grok|mamba'
$native/test-llama-archs -a "^($archs)$" -o "$dir/test-models/" > "$dir/test-llama-archs.log" 2>&1 ||
    fail "test-llama-archs failed, see $dir/test-llama-archs.log"
# Gemma 3 1B has most that a shape can have: windows, heads of 256, norms of Q and K
zoo=$dir/zoo.gguf
.venv/bin/python -m benchmarks.zoo 'Gemma 3 1B' --write "$zoo" || fail "the zoo cannot be written"

# perplexity PROGRAM...: of 160 tokens in 128 cells; the log says which variant was loaded
perplexity() {
    "$@" -m "$model" -f native/include/llama-depthkv.h -c 160 --chunks 1 -t 2 --override-kv depthkv.budget=float:0.5 \
        --no-log-prefix --log-verbosity 4 > "$dir/perplexity.log" 2>&1 &&
        sed -n 's/^Final estimate: PPL = \([0-9.]*\).*/\1/p' "$dir/perplexity.log"
}
here=$(perplexity $native/llama-perplexity) || here=
[ -n "$here" ] || { tail -n 20 "$dir/perplexity.log" >&2; fail "llama-perplexity failed on this machine"; }

ctest=$(command -v ctest)
tests=. # the first processor runs all of them, the others those that depend on the processor's kernels
for cpu in "$@"; do
    echo "== $cpu"
    export QEMU_CPU="$cpu"
    started=$(date +%s)
    "$ctest" --test-dir "$dir" -j 2 -L native -R "$tests" -E perplexity --fixture-exclude-any test-models --no-tests=error --output-on-failure ||
        fail "a test failed as $cpu, see above"
    tests=score
    "$qemu" "$dir/bin/depth-zoo-run" "$zoo" > "$dir/zoo.log" || { cat "$dir/zoo.log" >&2; fail "the zoo failed as $cpu"; }
    ppl=$(perplexity "$qemu" $dir/bin/llama-perplexity) || ppl=
    [ -n "$ppl" ] || { tail -n 20 "$dir/perplexity.log" >&2; fail "llama-perplexity failed as $cpu"; }
    chosen=$(sed -n 's/.*loaded CPU backend from .*ggml-cpu-\(.*\)\.so.*/\1/p' "$dir/perplexity.log" | head -n 1)
    expected=$(variants "$cpu")
    case " ${expected:-$chosen} " in
        *" $chosen "*) ;;
        *) fail "chose ${chosen:-no variant} as $cpu instead of $expected" ;;
    esac
    # the same text, tokens and budget, but other kernels: about 1 % apart
    awk "BEGIN { r = $ppl / $here; exit r < .97 || r > 1.03 }" ||
        fail "perplexity $ppl as $cpu, $here on this machine"
    echo "$cpu: variant ${chosen:-?}, zoo $(grep -c 'ok$' "$dir/zoo.log") of $(grep -c . "$dir/zoo.log"), perplexity $ppl (this machine: $here), $(($(date +%s) - started)) s"
done
