#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go and under nine minutes: docs/benchmarks.md.
#
#   bash bench/gpu.sh [OUT]              on a machine with a GPU, torch >= 2.11, triton >= 3.6; no network is needed
#   bash bench/gpu.sh --rehearse [OUT]   the same steps, tiny, on a CPU with the kernels interpreted
#   PYTHON=.venv/bin/python bash ...     with another Python than python3
#
# OUT (default bench/results/<gpu>/, or a temporary folder in a rehearsal) receives JSON and PNG, and OUT/logs one log per step.
# Each step has a share of the time; what it leaves over goes to those after it, and what it lacks it does not take from
# them. One that fails does not stop the rest. Exit status: 0 where all that ran passed, 1 otherwise.
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

REHEARSE=0
if [ "${1:-}" = "--rehearse" ]; then
    REHEARSE=1
    shift
fi
case ${1:-} in
-*)
    echo "gpu.sh: got $1, want [--rehearse] [OUT]" >&2
    exit 2
    ;;
esac
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "gpu.sh: $PYTHON cannot import torch: set PYTHON to one that can" >&2
    exit 2
fi
if [ $REHEARSE = 0 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU here; --rehearse runs the same steps on a CPU" >&2
    exit 2
fi
if [ $REHEARSE = 1 ]; then
    OUT=${1:-$(mktemp -d)}
else
    OUT=${1:-bench/results/$("$PYTHON" -c 'import torch; from bench import machine; print(machine.slug(machine.describe(torch.device("cuda"))))')}
fi
mkdir -p "$OUT/logs" || exit 2
OUT=$(cd "$OUT" && pwd)

# Measured choices and compiled code of an earlier run must not colour this one.
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export FASTLORA_CACHE_DIR="$SCRATCH/fastlora" TRITON_CACHE_DIR="$SCRATCH/triton"

TOTAL=520             # seconds; the shares below add up to it
DEADLINE=0            # of the step that runs: the shares up to it
SUMMARY="$OUT/steps.txt"
: >"$SUMMARY"
FAILED=0

now() { echo $((SECONDS - BEGUN)); }

verdict() { # NAME STATUS SECONDS LIMIT
    case $2 in
    0) echo "$1: passed ($3 s)" ;;
    124 | 137) echo "$1: STOPPED at its limit of $4 s" ;;
    *) echo "$1: FAILED with status $2 ($3 s)" ;;
    esac | tee -a "$SUMMARY"
    [ "$2" = 0 ] || FAILED=1
}

# step NAME SHARE COMMAND...: runs it until its deadline at most. %LEFT% in an argument is the seconds that it has, less
# a reserve to end in good order; its output goes to OUT/logs/NAME.log, the end of it to the screen.
step() {
    local name=$1 begun limit reserve status
    DEADLINE=$((DEADLINE + $2))
    shift 2
    begun=$(now)
    limit=$((DEADLINE - begun))
    if [ $limit -le 3 ]; then
        echo "$name: LEFT OUT, the time is over" | tee -a "$SUMMARY"
        FAILED=1
        return
    fi
    reserve=$((limit / 4 < 12 ? limit / 4 : 12))
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "${@//%LEFT%/$((limit - reserve))}" >"$OUT/logs/$name.log" 2>&1
    status=$?
    tail -n "${SHOWN:-25}" "$OUT/logs/$name.log"
    verdict "$name" $status $(($(now) - begun)) $limit
}

# start NAME SECONDS COMMAND...: the same beside other steps, for what is not timed. `finish NAME` waits for it.
start() {
    local name=$1 limit=$2
    shift 2
    (
        begun=$(now)
        timeout --kill-after=5 "$limit" "$@" >"$OUT/logs/$name.log" 2>&1
        echo "$? $(($(now) - begun)) $limit" >"$SCRATCH/$name.status"
    ) &
    eval "PID_$name=$!"
}

finish() {
    local name=$1 pid
    eval "pid=\${PID_$name:-}"
    [ -n "$pid" ] || return
    wait "$pid"
    echo "== $name"
    tail -n 8 "$OUT/logs/$name.log"
    # shellcheck disable=SC2046
    verdict "$name" $(cat "$SCRATCH/$name.status")
}

BEGUN=$SECONDS
BENCH=("$PYTHON" -m)
TESTS=("$PYTHON" -m pytest -q -p no:cacheprovider)

rehearse() {
    export OMP_NUM_THREADS=1
    local interpreted=(env TRITON_INTERPRET=1 "$PYTHON" -m)
    step doctor 30 "${BENCH[@]}" fastlora.doctor
    step self_checks 90 "${interpreted[@]}" bench self_checks --only-fp32 --jobs 2
    step correctness 60 "${interpreted[@]}" bench correctness --device cpu --dtype fp32 --out "$OUT/correctness.json"
    step tune 40 "${interpreted[@]}" fastlora.tune --device cpu --shape 24x40 --tokens 16 --r 4 --dtype fp32 --json "$OUT/tuned.json"
    step overhead 15 "${BENCH[@]}" bench overhead --device cpu --rounds 5 --out "$OUT/overhead.json"
    step table 60 "${interpreted[@]}" bench lora_linear --device cpu --shapes tiny --dtype fp32 --rounds 2 --time-limit %LEFT% \
        --contenders frozen,eager,peft,addmm,torch,cublas,triton,triton_s_inside --out "$OUT/lora_linear.json"
    step compiled 40 "${BENCH[@]}" bench lora_linear --device cpu --shapes tiny --dtype fp32 --dropout 0 --rounds 2 \
        --contenders frozen,eager,compile,auto --out "$OUT/lora_linear_compiled.json"
    step suite 80 "${BENCH[@]}" bench suite --device cpu --size tiny --time-limit %LEFT% --out "$OUT/suite.json"
    step dora 15 "${BENCH[@]}" bench dora --device cpu --size tiny --rounds 2 --out "$OUT/dora.json"
    step experts 15 "${BENCH[@]}" bench experts --device cpu --size tiny --rounds 2 --out "$OUT/experts.json"
    step adalora 15 "${BENCH[@]}" bench adalora --device cpu --layers 4 --width 16 --rounds 2 --out "$OUT/adalora.json"
    step questions 45 "${interpreted[@]}" bench questions --device cpu --rounds 2 --out "$OUT/questions.json"
    step lora_ga 20 "${BENCH[@]}" bench lora_ga --shapes tiny --r 4 --tokens 40 --layers 1 --whole --out "$OUT/lora_ga.json"
}

measure() {
    # nvcc compiles for this GPU alone, a third of the time, and beside steps that are not timed.
    FASTLORA_CUDA_ARCHS=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
    export FASTLORA_CUDA_ARCHS
    start engine_build 100 "${BENCH[@]}" fastlora.doctor --build
    step doctor 12 "${BENCH[@]}" fastlora.doctor
    step self_checks 48 "${BENCH[@]}" bench self_checks --jobs "$((CORES > 8 ? 8 : CORES))"
    step correctness 30 "${BENCH[@]}" bench correctness --out "$OUT/correctness.json"
    finish engine_build
    # Fills the cache that the steps after it use, backend "auto" among them.
    step tune 50 "${BENCH[@]}" fastlora.tune --model-shapes llama-3-8b --tokens 8192 --r 16 --adapter-dtype bf16 --dropout both \
        --json "$OUT/tuned.json"
    step overhead 8 "${BENCH[@]}" bench overhead --out "$OUT/overhead.json"
    step table 55 "${BENCH[@]}" bench lora_linear --device cuda --dtype bf16 --dtype mixed --time-limit %LEFT% \
        --contenders frozen,eager,peft,addmm,auto,cublas,triton,triton_s_inside --out "$OUT/lora_linear.json"
    step questions 35 "${BENCH[@]}" bench questions --out "$OUT/questions.json"
    step suite 87 "${BENCH[@]}" bench suite --device cuda --time-limit %LEFT% --out "$OUT/suite.json" \
        --contenders "frozen,eager,peft,addmm,one by one,group,mlp,mixed batch,fastlora,fastlora grouped,fastlora fused"
    step lora_ga 40 "${BENCH[@]}" bench lora_ga --shapes llama-2-7b --device cuda --whole --layers 2 --out "$OUT/lora_ga.json"
    # torch.compile takes seconds for each shape, so one shape is enough.
    step compiled 30 "${BENCH[@]}" bench lora_linear --device cuda --shape 8192x4096x4096 --rounds 20 --time-limit %LEFT% \
        --contenders frozen,eager,compile,auto --out "$OUT/lora_linear_compiled.json"
    step peers 35 "${BENCH[@]}" bench lora_linear --device cuda --shapes peers --rounds 15 --time-limit %LEFT% \
        --contenders frozen,eager,peft,addmm,auto,cublas,triton --out "$OUT/lora_linear_peers.json"
    step dora 18 "${BENCH[@]}" bench dora --dtype bf16 --dtype mixed --rounds 10 --out "$OUT/dora.json"
    step experts 30 "${BENCH[@]}" bench experts --device cuda --rounds 10 --time-limit %LEFT% --out "$OUT/experts.json"
    step adalora 15 "${BENCH[@]}" bench adalora --width 4096 --rounds 10 --out "$OUT/adalora.json"
}

CORES=$("$PYTHON" -c 'import os; print(os.cpu_count())')
if [ $REHEARSE = 1 ]; then rehearse; else measure; fi
for name in lora_linear suite; do
    [ -f "$OUT/$name.json" ] && step "plot_$name" 5 "${BENCH[@]}" bench plot "$OUT/$name.json"
done

# What is left of the time is for the tests, all at once: nothing is timed any more. Most of it goes into compiling, on one core for
# each process.
LEFT=$((TOTAL - $(now)))
WORKERS=()
[ $REHEARSE = 1 ] || mapfile -t WORKERS < <("$PYTHON" -c "import xdist; print('-n'); print(min(10, $CORES))" 2>/dev/null)
start engine "$LEFT" "${TESTS[@]}" -m gpu tests/runtime/test_csrc.py tests/linalg/test_native.py
if command -v compute-sanitizer >/dev/null; then
    # PyTorch's caching allocator would hide an access just beyond a tensor from it, so it is switched off.
    start sanitizer "$LEFT" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
        "$PYTHON" -m bench self_checks --backends cublas,triton --only-fp32
else
    echo "sanitizer: left out, compute-sanitizer is not on the PATH" | tee -a "$SUMMARY"
fi
DEADLINE=$(now)
step gpu_tests "$LEFT" "${TESTS[@]}" -m gpu tests/gpu ${WORKERS[@]+"${WORKERS[@]}"}
finish engine
finish sanitizer

echo
echo "== results in $OUT, after $(now) s"
grep -v -e "^ *(" "$OUT/logs/questions.log" 2>/dev/null | tail -n 60
"${BENCH[@]}" bench summary "$OUT"
cat "$SUMMARY"
exit $FAILED
