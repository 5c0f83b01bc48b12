#!/bin/bash
# The exchange beside nixl_ep on one NVIDIA GPU, in some eight minutes; from the repository:
#     bash tools/gpu/exchange.sh [FOLDER]
# With NVIDIA's package where PYTHONPATH finds it. Figures go to FOLDER (default: build/gpu).
# Exit status 1 if anything computes something else.
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD/src:$PWD/tests/comm${PYTHONPATH:+:$PYTHONPATH}
status=0
run() {
    limit=$1 name=$2
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || { echo "$name: exit status $?"; status=1; }
    tail -n 30 "$out/$name.log"
}
bench() {
    ranks=$1 tokens=$2 baselines=$3
    run 180 "exchange$ranks" python3 tools/gpu/bench_exchange.py --ranks "$ranks" \
        --tokens "$tokens" --baselines "$baselines" --json "$out/exchange$ranks.json"
}
mps() {
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    nvidia-cuda-mps-control -d
}
no_mps() {
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}
bench 1 1,16,128,512 nixl_ep,interface,torch,checks
run 60 backend1 python3 tools/gpu/check_nixl_ep_backend.py 1
mps
bench 2 1,16,128,512 nixl_ep,interface,checks
run 90 backend2 python3 tools/gpu/check_nixl_ep_backend.py 2
no_mps
mps  # what did not finish above may have left it in disorder
bench 4 1,128 interface,checks
bench 8 1,128 checks
no_mps
# one process: the kernels' own memory. Flags between processes are no race to racecheck.
for tool in memcheck racecheck; do
    run 150 $tool compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
        python3 -m pytest -q -p no:cacheprovider -k "not processes" \
        tests/comm/test_cuda_exchange.py tests/comm/test_cuda_expert_major.py
done
exit $status
