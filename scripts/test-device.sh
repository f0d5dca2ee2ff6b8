#!/bin/sh
# Runs the native tests that read models with all layers on a device, and compares it with the CPU: greedy text, evictions, saved
# states, half of the layers there, the cache in host memory.
#   scripts/test-device.sh rpc            this machine's CPU behind ggml's RPC, once and as two devices that share the layers
#   scripts/test-device.sh NAME[,NAME]    devices of this build, as build/engine/bin/llama-bench --list-devices shows them
# A device that is missing fails. Needs scripts/setup.sh --test.
set -u
cd "$(dirname "$0")/.."
bin=build/engine/bin
models=build/engine/test-models
[ $# = 1 ] || { sed -n '2,6s/^# //p' "$0" >&2; exit 2; }
[ -x $bin/depth-device ] || { echo "test-device: there is no $bin/depth-device: run scripts/setup.sh --test" >&2; exit 1; }
# what waits in a loop would take the processor from the server
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

failed=
# on DEVICES TEST...
on() {
    export DEPTHKV_TEST_DEVICE="$1"
    shift
    for test in "$@"; do
        started=$(date +%s)
        if $bin/$test $models > build/test-device.log 2>&1; then
            result=passed
        else
            tail -n 20 build/test-device.log
            result=FAILED failed=1
        fi
        echo "$DEPTHKV_TEST_DEVICE: $test $result ($(($(date +%s) - started)) s)"
    done
}

if ! [ -e $models/llama-dense.gguf ]; then
    mkdir -p $models
    $bin/test-llama-archs -o $models/ > build/test-device.log 2>&1 || { tail build/test-device.log; exit 1; }
fi

devices=$1
if [ "$devices" = rpc ]; then
    [ -x $bin/ggml-rpc-server ] || { echo "test-device: this build has no RPC server: configure with -DGGML_RPC=ON" >&2; exit 1; }
    ports=$(.venv/bin/python -c "
import socket
sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets))") || exit 1
    pids=
    trap 'kill $pids 2> /dev/null' EXIT
    for port in $ports; do
        $bin/ggml-rpc-server -H 127.0.0.1 -p "$port" -t 1 > "build/test-device-$port.log" 2>&1 &
        pids="$pids $!"
        DEPTHKV_TEST_RPC=${DEPTHKV_TEST_RPC:+$DEPTHKV_TEST_RPC,}127.0.0.1:$port
    done
    export DEPTHKV_TEST_RPC
    sleep 2
    devices=RPC0
    on RPC0,RPC1 depth-device
fi
on "$devices" depth-device test-depth-plan test-depth-score test-depth-seq test-depth-archs
[ -z "$failed" ]
