#!/usr/bin/env bash
# Correctness, memory check and timings on a machine with a GPU and no network: at most 8 minutes, 10 where the CUDA
# library has to be built first.
#   bash bench/gpu.sh [FOLDER FOR RESULTS]
# Needs torch and triton; pytest, bitsandbytes, peft and compute-sanitizer are used where they are installed. With nvcc the
# CUDA library is built for this card if it is not there.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
mkdir -p "$results"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
summary=()

# step NAME SECONDS COMMAND...: run a command within a time limit, keep its output, note how it went.
step() {
    local name=$1 limit=$2 started=$SECONDS verdict=ok
    shift 2
    timeout "$limit" "$@" >"$results/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || verdict="FAILED ($status)"
    [ $status -ne 124 ] || verdict="out of time ($limit s)"
    summary+=("$(printf '%-12s %-20s %4d s  %s' "$name" "$verdict" $((SECONDS - started)) "$(tail -n 1 "$results/$name.log")")")
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name())' || exit 1

library=sda_fast/ops/libsda_fast_cuda.so
if [ ! -f "$library" ] && { command -v nvcc || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; } >/dev/null; then
    capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    SDA_FAST_CUDA_TARGETS=$capability step library 115 "$python" csrc/compile.py "$library"
fi
step kernels 80 "$python" bench/check_kernels.py
suite=(tests/kernels/test_moda_kernels.py tests/kernels/test_gates_kernels.py tests/kernels/test_nf4_kernels.py tests/csrc/test_csrc_on_gpu.py tests/csrc/test_csrc_passes_on_gpu.py tests/ops tests/moda)
if "$python" -c 'import xdist' 2>/dev/null; then
    # Compiling takes most of the time.
    step suite 110 "$python" -m pytest -p no:cacheprovider -n 12 --dist worksteal "${suite[@]}"
elif "$python" -c 'import pytest' 2>/dev/null; then
    step suite 110 "$python" -m pytest -p no:cacheprovider "${suite[@]}"
else
    summary+=("suite        not run: pytest is not installed")
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
    step memcheck 70 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" bench/check_kernels.py
else
    summary+=("memcheck     not run: compute-sanitizer is not installed")
fi
step speed 45 "$python" bench/kernel_speed.py --out "$results/kernel_speed.json"
# Into a folder of its own: what was measured here decides nothing until it is put where tables are looked for.
step tune 45 "$python" -m sda_fast.cli bench --tune --device cuda --seconds 0.1 --limit 35 --output "$results/tuned"
step nf4 45 "$python" -m sda_fast.cli bench --what nf4 --device cuda --seconds 0.3 --limit 33 --no-picture \
    --output "$results"
step cmsa 30 "$python" -m sda_fast.cli bench --what cmsa --device cuda --items 8192 65536 --dimensions 3584 --seconds 0.3 \
    --methods ours "plain PyTorch" "as in open_clip" --limit 12 --no-picture --output "$results"
# A second run goes on with the cases that this one had no time for. A compilation takes as long as measuring three cases.
step layers 50 "$python" -m sda_fast.cli bench --device cuda --seconds 0.5 --limit 35 --compile-cases 1 --no-picture \
    --output "$results"
cat "$results/tune.log" "$results/speed.log" "$results/nf4.log" "$results/cmsa.log"
sed -n '/^summary/,$p' "$results/layers.log"
echo
printf '%s\n' "${summary[@]}"
[[ "${summary[*]}" != *FAILED* && "${summary[*]}" != *"out of time"* ]]
