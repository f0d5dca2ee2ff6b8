#!/bin/sh
# What a budget costs on a GPU, in some minutes: tests on the device, divergence from the full cache, speed beside the stock cache.
# Needs a built tree with the tools, and Python 3 without packages.
#   benchmarks/gpu.sh MODEL.gguf [DEVICE]
# DEVICE: as llama-bench --list-devices shows it, the first one otherwise. BUILD=build/engine, OUT=docs/results/gpu.json,
# TEXT=a file to read (some 8,192 tokens), CTX=4096, DEPTHS=0,8192,32768, BUDGETS="0.9 0.6 0.3" and REPEAT=2 can be set, and
# RPC=HOST:PORT for the device RPC0 of a server there.
set -eu
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
model=$1
bin=${BUILD:-build/engine}/bin
text=${TEXT:-native/src/llama-kv-cache-depth.cpp}
depths=${DEPTHS:-0,8192,32768}
budgets=${BUDGETS:-0.9 0.6 0.3}
repeat=${REPEAT:-2}
out=${OUT:-docs/results/gpu.json}
rpc=${RPC:+--rpc $RPC}
export DEPTHKV_TEST_RPC="${RPC:-}"
[ -x "$bin/depth-device" ] || { echo "gpu: there is no $bin/depth-device: build target depthkv-tools" >&2; exit 1; }
device=${2:-$("$bin/llama-bench" --list-devices 2> /dev/null | sed -n 's/^ *\([^ :]*\):.*/\1/p' | head -n 1)}
[ -n "$device" ] || { echo "gpu: this build has no device: configure with -DGGML_CUDA=ON or another backend" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$(date +%s)
say() { echo "gpu: $* ($(($(date +%s) - started)) s)" >&2; }

# tests first: what is wrong need not be fast
mkdir -p "$work/models"
"$bin/test-llama-archs" -o "$work/models/" > "$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
for test in depth-device test-depth-score test-depth-seq test-depth-archs; do
    if DEPTHKV_TEST_DEVICE=$device "$bin/$test" "$work/models" > "$work/$test.log" 2>&1; then
        echo "$test passed" >> "$work/tests"
    else
        grep -v ' OK: \| refused: ' "$work/$test.log" | tail -n 20 >&2
        echo "$test failed" >> "$work/tests"
    fi
done
rm -r "$work/models"
say "tests done"

# second half of each window, against the stock cache on the same device, with both kernels
for fa in on off; do
    # shellcheck disable=SC2086
    perplexity() { "$bin/llama-perplexity" -m "$model" -f "$text" -c "${CTX:-4096}" --chunks 2 $rpc -ngl 999 -dev "$device" -fa $fa "$@" 2>&1; }
    perplexity --kl-divergence-base "$work/base" > "$work/log" || { tail "$work/log" >&2; exit 1; }
    for budget in $budgets; do
        kl=$(perplexity --kl-divergence-base "$work/base" --kl-divergence --kv-budget "$budget" | sed -n 's/^Mean *KLD: *\([-0-9.]*\).*/\1/p')
        echo "$fa $budget ${kl:-failed}" >> "$work/kl"
    done
    rm "$work/base"
done
say "divergence measured"

for fa in 1 0; do
    for budget in stock $budgets; do
        [ "$budget" = stock ] && options= || options="--kv-budget $budget"
        # shellcheck disable=SC2086
        "$bin/llama-bench" -m "$model" $rpc -ngl 999 -dev "$device" -fa $fa -p 512 -n 32 -d "$depths" -r "$repeat" -o json $options \
            > "$work/bench-$fa-$budget.json" 2> "$work/log" || { tail "$work/log" >&2; echo "[]" > "$work/bench-$fa-$budget.json"; }
    done
    say "speed with -fa $fa measured"
done

python3 - "$work" "$out" "$device" "$model" << 'EOF'
import json, pathlib, sys, time
work, out, device, model = pathlib.Path(sys.argv[1]), *sys.argv[2:]
tests = dict(line.rsplit(" ", 1) for line in (work / "tests").read_text().splitlines())
kl = [dict(zip(("flash_attn", "budget", "kl"), line.split())) for line in (work / "kl").read_text().splitlines()]
rows = []
for path in sorted(work.glob("bench-*.json")):
    _, fa, budget = path.stem.split("-", 2)
    for run in json.loads(path.read_text()):
        what = "prefill" if run["n_prompt"] else "decode"
        rows.append({"flash_attn": fa, "budget": budget, "what": what, "depth": run["n_depth"], "tokens_per_second": run["avg_ts"],
                     "stddev": run["stddev_ts"], "card": run["gpu_info"], "commit": run["build_commit"]})
stock = {(r["flash_attn"], r["what"], r["depth"]): r["tokens_per_second"] for r in rows if r["budget"] == "stock"}
for row in rows:
    of_stock = stock.get((row["flash_attn"], row["what"], row["depth"]))  # none: it failed, and said why
    row["ratio"] = row["tokens_per_second"] / of_stock if of_stock else None
report = {"device": device, "model": pathlib.Path(model).name, "date": time.strftime("%Y-%m-%d"), "tests": tests, "kl": kl, "speed": rows}
pathlib.Path(out).write_text(json.dumps(report, indent=1) + "\n")
for name, result in tests.items():
    print(f"{name}: {result}")
for each in kl:
    print(f"KL at {each['budget']}, flash attention {each['flash_attn']}: {each['kl']}")
for row in rows:
    print(f"{row['what']} at {row['depth']:>6}, -fa {row['flash_attn']}, {row['budget']:>5}: {row['tokens_per_second']:>9.1f} tokens/s, {row['ratio'] or 0:.2f} of stock")
EOF
say "written to $out"
grep -q failed "$work/tests" && exit 1 || exit 0
