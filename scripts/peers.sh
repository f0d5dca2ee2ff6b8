#!/bin/sh
# Compares with kvpress 0.5.5 on the same model, tokens and metric: benchmarks/peers/README.md. Needs scripts/setup.sh --calibrate.
#   scripts/peers.sh MODEL.gguf [OPTION...]   a calibrated model; --help lists the options
#   scripts/peers.sh [OPTION...]              the packaged model, calibrated on the first run (about 15 minutes on two cores)
# kvpress gets an environment of its own, .venv-peers (1.4 GB): it needs an older transformers. An interrupted run goes on
# where it was. PYTHON=... chooses the interpreter for a new .venv-peers.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "peers: $1" >&2; exit 1; }

[ -x .venv/bin/python ] && .venv/bin/python -c 'import depthkv_edge, torch, transformers' 2> /dev/null ||
    fail "torch is missing in .venv: run scripts/setup.sh --calibrate"

requirements=benchmarks/peers/requirements.txt
if ! cmp -s "$requirements" .venv-peers/installed.txt; then
    python=${PYTHON:-python3}
    command -v "$python" > /dev/null || fail "no $python found: install Python 3.10 or later"
    echo "Setting up .venv-peers for kvpress" >&2
    [ -x .venv-peers/bin/pip ] || "$python" -m venv --clear .venv-peers || fail "$python lacks venv"
    pip() { .venv-peers/bin/python -m pip --disable-pip-version-check -q "$@" >&2 || fail "pip $1 failed, see above"; }
    pip install torch==2.13.0 # alone and first: see the requirements
    pip install -r "$requirements"
    cp "$requirements" .venv-peers/installed.txt
fi

case "${1-}" in
    --help) model= ;;
    "" | -*)
        model=build/peers/smollm2-depthkv.gguf
        if ! [ -f "$model" ]; then
            mkdir -p build/peers
            .venv/bin/python -m depthkv_edge calibrate smollm2 -o "$model" >&2
        fi
        ;;
    *)
        model=$1
        shift
        ;;
esac
exec .venv/bin/python -m benchmarks.peers ${model:+"$model"} "$@"
