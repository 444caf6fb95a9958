#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go: docs/benchmarks.md. The steps are bench/gpu/session.py's.
#
#   bash bench/gpu.sh [OUT]              on a machine with a GPU, torch >= 2.11, triton >= 3.6; no network is needed
#   bash bench/gpu.sh --rehearse [OUT]   the same ways, tiny, on a CPU with the kernels interpreted
#   GPU_SECONDS=520                      the whole of it, from this line on; PYTHON=python3
#
# OUT (default: gpu-results) receives results.tar.gz, steps.txt and summary.txt, after every step. Exit status: 0 where
# all that ran passed, 1 otherwise.
BEGUN=$(date +%s)
set -u
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
REHEARSE=()
if [ "${1:-}" = "--rehearse" ]; then
    REHEARSE=(--rehearse)
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    shift
fi
case ${1:-} in
-*)
    echo "gpu.sh: got $1, want [--rehearse] [OUT]" >&2
    exit 2
    ;;
esac
OUT=${1:-gpu-results}
WORK=$(mktemp -d)
# Measured choices and compiled code of an earlier run must not colour this one.
export FASTLORA_CACHE_DIR="$WORK/cache" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$WORK/triton}"
DEADLINE=$((BEGUN + ${GPU_SECONDS:-520}))
mkdir -p "$OUT" "$WORK/results" || exit 2

# Whatever ends this script: what there is lies packed in OUT.
finish() {
    tar -C "$WORK" -czf "$OUT/.results" results 2>/dev/null && mv "$OUT/.results" "$OUT/results.tar.gz"
    cp "$WORK/results/steps.txt" "$OUT/" 2>/dev/null
    rm -rf "$WORK"
}
trap finish EXIT
trap 'exit 1' TERM INT

STATUS=75
for _ in 1 2 3 4 5; do # again where a step has left the process's GPU broken, or has hung
    LEFT=$((DEADLINE - $(date +%s)))
    if [ $LEFT -le 5 ]; then break; fi
    timeout --kill-after=5 "$LEFT" "$PYTHON" -m bench gpu "$OUT" --work "$WORK/results" --deadline "$DEADLINE" ${REHEARSE[@]+"${REHEARSE[@]}"}
    STATUS=$?
    case $STATUS in 0 | 1 | 2) break ;; esac
done
[ $STATUS = 2 ] && exit 2
echo "== results in $OUT, after $(($(date +%s) - BEGUN)) s"
cat "$WORK/results/steps.txt"
[ $STATUS = 0 ] || exit 1
