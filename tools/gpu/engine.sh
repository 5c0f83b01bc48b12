#!/bin/sh
# Everything about the engine that needs one NVIDIA GPU, in some nine minutes; from the repository:
#     sh tools/gpu/engine.sh [FOLDER]
# Figures go to FOLDER (default: build/gpu). Exit status 1 if anything computes something else.
set -u
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
status=0
run() {
    name=$1
    shift
    timeout 240 "$@" > "$out/$name.log" 2>&1 || { echo "$name: exit status $?"; status=1; }
    tail -n 40 "$out/$name.log"
}
run killed python3 tools/gpu/check_serving.py --kill
CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
nvidia-cuda-mps-control -d
run serving python3 tools/gpu/check_serving.py
# half of the layers: four ranks with all of them need more than 80 GB
run ranks python3 -m flexpert bench decode --ranks 1,2,4 --layers 24 --output "$out/ranks.json"
echo quit | nvidia-cuda-mps-control
unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
run decode python3 -m flexpert bench decode --output "$out/decode.json"
# half of the layers: transformers has the same weights in bf16 beside them
run decode_fp8 python3 -m flexpert bench decode --layers 24 --quantization fp8 \
    --output "$out/decode_fp8.json"
run layer python3 -m flexpert bench layer --baselines grouped_mm --output "$out/layer.json"
run layer_fp8 python3 -m flexpert bench layer --baselines grouped_mm --quantization fp8 \
    --output "$out/layer_fp8.json"
run fp8 python3 tools/gpu/check_serving.py --fp8
run kernels python3 tools/gpu/check_kernels.py
exit $status
