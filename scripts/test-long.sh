#!/bin/sh
# Everything that takes too long for each commit, hours in all: empty machines, a wheel as other processors, 64-bit ARM, sanitizers,
# orders of calls, the table of models. Needs root and network for the first, and qemu and a cross compiler for the next two; says
# what it could not do.
#   scripts/test-long.sh [WORD...]    only the steps whose command holds one of the words, such as trixie, wheel, aarch64, zoo
set -u
cd "$(dirname "$0")/.."
summary=
failed=
# step COMMAND...
step() {
    if [ -n "$words" ]; then
        found=
        for word in $words; do case "$*" in *"$word"*) found=1 ;; esac; done
        [ -n "$found" ] || return
    fi
    echo "== $*"
    started=$(date +%s)
    "$@"
    status=$?
    case $status in
        0) result=passed ;;
        77) result="not possible here" ;;
        *) result="failed ($status)" failed=1 ;;
    esac
    summary="$summary
$(printf '%6d s  %-18s %s' $(($(date +%s) - started)) "$result" "$*")"
}
words=$*

for suite in bookworm trixie; do
    step .ci/clean-root $suite ./scripts/run-demo.sh
    step .ci/clean-root $suite ./scripts/test.sh
done
[ -x build/engine/bin/depth-zoo-make ] || scripts/setup.sh --test || exit 1
step scripts/check-wheel.sh
step scripts/cross-aarch64.sh
step scripts/sanitize.sh
step env DEPTHKV_SEQUENCES=10000 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses=4 tests/engine/test_cache_states.py
step .venv/bin/python -m benchmarks.zoo
echo "== summary$summary"
[ -z "$failed" ]
