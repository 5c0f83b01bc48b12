#!/bin/bash
# The tests of the exchange that need a GPU, from the repository's root. Kills come without MPS.
# All of them run, whichever fails; exit status 1 if one did.
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
status=0
run() {
    timeout 240 python3 -m pytest -q "$@" || { echo "exit status $?: $*"; status=1; }
}
FLEXPERT_KILL_TRIALS=${FLEXPERT_KILL_TRIALS:-50} run tests/comm/test_cuda_processes.py -k killed
run tests/comm/test_nixl_ep_graph.py tests/comm/test_nixl_ep_elastic.py -k "graph or on_a_gpu"
export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
nvidia-cuda-mps-control -d
run tests/comm/test_cuda_processes.py
echo quit | nvidia-cuda-mps-control
exit $status
