#!/bin/sh
# Sets up and runs every test: our native ones, upstream's that touch the cache, the linter, the Python ones.
set -u
cd "$(dirname "$0")/.."
started=$(date +%s)
scripts/setup.sh --test || exit 1
took="build $(($(date +%s) - started)) s"

failed=
logs=build/test-logs
mkdir -p "$logs"
# step NAME COMMAND...: runs the command, shows and keeps its output
step() {
    name=$1
    shift
    echo "== $name"
    started=$(date +%s)
    { "$@" 2>&1; echo $? > "$logs/$name.status"; } | tee "$logs/$name.log"
    [ "$(cat "$logs/$name.status")" = 0 ] || failed="$failed $name"
    took="$took, $name $(($(date +%s) - started)) s"
}
# summary NAME PATTERN: the last line of a step's output that says how many passed
summary() { printf '%-9s %s\n' "$1" "$(grep -E "$2" "$logs/$1.log" | tail -n 1 | sed 's/^=* *//; s/ *=*$//')"; }

ctest=$(command -v ctest || echo "$PWD/.venv/bin/ctest")
# In one run, because native tests too read the models that an upstream test writes.
step native "$ctest" --test-dir build/engine -L 'native|upstream' --no-tests=error --output-on-failure
step device scripts/test-device.sh rpc
rm -f build/engine/test-models/*.gguf # 900 MB that the next run writes again
step lint .venv/bin/ruff check .
# A file at a time on each core. One thread each, which does not wait in a loop: more would keep each other from running.
# Both variables, or torch counts on threads that it does not get, and computes a part of what it should.
step pytest env OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist loadfile

echo "== summary"
summary native 'tests passed|No tests'
grep -E '^(native|upstream) +=' "$logs/native.log" | sed 's/^/          /'
summary lint 'checks passed|Found [0-9]+ error'
summary pytest '(passed|failed|error|no tests ran).* in '
echo "time      $took"
if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
echo "all passed"
