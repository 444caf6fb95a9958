#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go and under nine minutes: docs/benchmarks.md.
#
#   bash bench/gpu.sh [OUT]              on a machine with a GPU, torch >= 2.11, triton >= 3.6; no network is needed
#   bash bench/gpu.sh --rehearse [OUT]   the same steps, tiny, on a CPU with the kernels interpreted
#   PYTHON=.venv/bin/python bash ...     with another Python than python3
#
# OUT (default bench/results/, or a temporary folder in a rehearsal) receives one log per step, JSON and PNG. Each step has a
# time limit, and one that fails does not stop the rest. Exit status: 0 where all that ran passed, 1 otherwise.
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
if [ $REHEARSE = 1 ]; then OUT=${1:-$(mktemp -d)}; else OUT=${1:-bench/results}; fi
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "gpu.sh: $PYTHON cannot import torch: set PYTHON to one that can" >&2
    exit 2
fi
if [ $REHEARSE = 0 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no GPU here; --rehearse runs the same steps on a CPU" >&2
    exit 2
fi

# Measured choices and compiled code of an earlier run must not colour this one.
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export FASTLORA_CACHE_DIR="$SCRATCH/fastlora" TRITON_CACHE_DIR="$SCRATCH/triton"

BEGUN=$SECONDS
TOTAL=520 # seconds: what is not begun by then is left out
SUMMARY="$OUT/steps.txt"
: >"$SUMMARY"
FAILED=0

# step NAME SECONDS COMMAND...: runs it with a time limit, its output in OUT/NAME.log and on the screen.
step() {
    local name=$1 limit=$2 begun=$SECONDS status left
    shift 2
    left=$((TOTAL - (SECONDS - BEGUN)))
    if [ $left -le 5 ]; then
        echo "$name: left out, $TOTAL s are over" | tee -a "$SUMMARY"
        FAILED=1
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    tail -n 40 "$OUT/$name.log"
    case $status in
    0) verdict=passed ;;
    124 | 137) verdict="stopped at its limit of $limit s" FAILED=1 ;;
    *) verdict="FAILED with status $status" FAILED=1 ;;
    esac
    echo "$name: $verdict ($((SECONDS - begun)) s)" | tee -a "$SUMMARY"
}


if [ $REHEARSE = 1 ]; then
    export OMP_NUM_THREADS=1
    step doctor 60 "$PYTHON" -m fastlora.doctor
    step gpu_tests 120 "$PYTHON" -m pytest -q -m gpu tests/gpu -p no:cacheprovider
    step self_checks 150 env TRITON_INTERPRET=1 "$PYTHON" -m bench.self_checks --only-fp32
    step tune 90 env TRITON_INTERPRET=1 "$PYTHON" -m fastlora.tune --device cpu --shape 24x40 --tokens 16 --r 4 --dtype fp32 \
        --json "$OUT/tuned.json"
    step overhead 30 "$PYTHON" -m bench.overhead --device cpu --rounds 5 --out "$OUT/overhead.json"
    step table 120 env TRITON_INTERPRET=1 "$PYTHON" -m bench.lora_linear --device cpu --shapes tiny --dtype fp32 \
        --rounds 2 --contenders frozen,eager,peft,addmm,torch,cublas,triton,triton_s_inside \
        --out "$OUT/lora_linear.json"
    step lora_ga 60 "$PYTHON" -m bench.lora_ga --shapes tiny --r 4 --tokens 40 --layers 1 --whole --out "$OUT/lora_ga.json"
else
    step doctor 60 "$PYTHON" -m fastlora.doctor
    step self_checks 90 "$PYTHON" -m bench.self_checks
    # Fills the cache that the steps after it use, backend "auto" among them.
    step tune 120 "$PYTHON" -m fastlora.tune --model-shapes llama-3-8b --tokens 8192 --r 16 --adapter-dtype bf16 \
        --dropout both --json "$OUT/tuned.json"
    step overhead 30 "$PYTHON" -m bench.overhead --out "$OUT/overhead.json"
    # The tables come before the long tests: if the machine vanishes, the numbers are there.
    step table 200 "$PYTHON" -m bench.lora_linear --device cuda --time-limit 150 --out "$OUT/lora_linear.json"
    # LoRA-GA at Llama-2-7B's shapes, through the compiled engine where nvcc can build it.
    FASTLORA_CUDA_ARCHS=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))')
    export FASTLORA_CUDA_ARCHS # nvcc compiles for this GPU alone: a third of the time
    step engine_build 60 "$PYTHON" -m fastlora.doctor --build
    step lora_ga 90 "$PYTHON" -m bench.lora_ga --shapes llama-2-7b --device cuda --whole --layers 2 --out "$OUT/lora_ga.json"
    # Most of their time goes into compiling, on one core for each process.
    WORKERS=$("$PYTHON" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
    # shellcheck disable=SC2086
    step gpu_tests 220 "$PYTHON" -m pytest -q -m gpu tests/gpu -p no:cacheprovider $WORKERS
fi
# The compiled engine's tests, which build csrc/ once more.
step engine 90 "$PYTHON" -m pytest -q -m gpu tests/test_csrc.py tests/test_csrc_linalg.py -p no:cacheprovider
[ -f "$OUT/lora_linear.json" ] && step plot 30 "$PYTHON" -m bench.plot "$OUT/lora_linear.json"

if command -v compute-sanitizer >/dev/null; then
    # PyTorch's caching allocator would hide an access just beyond a tensor from it, so it is switched off.
    step sanitizer 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
        "$PYTHON" -m bench.self_checks --backends cublas,triton --only-fp32
else
    echo "sanitizer: left out, compute-sanitizer is not on the PATH" | tee -a "$SUMMARY"
fi

echo
echo "== results in $OUT, after $((SECONDS - BEGUN)) s"
[ -f "$OUT/lora_linear.json" ] && "$PYTHON" -m bench.lora_linear --show "$OUT/lora_linear.json"
cat "$SUMMARY"
exit $FAILED
