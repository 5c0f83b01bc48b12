#!/bin/bash
# The tests of the exchange that need a GPU, from the repository's root. Kills come without MPS.
set -e
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
FLEXPERT_KILL_TRIALS=${FLEXPERT_KILL_TRIALS:-50} python3 -m pytest -q tests/comm/test_cuda_processes.py -k killed
python3 -m pytest -q tests/comm/test_nixl_ep_graph.py tests/comm/test_nixl_ep_elastic.py -k "graph or on_a_gpu"
export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
nvidia-cuda-mps-control -d
trap 'echo quit | nvidia-cuda-mps-control' EXIT
python3 -m pytest -q tests/comm/test_cuda_processes.py
