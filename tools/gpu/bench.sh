#!/bin/bash
# Every benchmark that needs NVIDIA GPUs, in some fifteen minutes: make bench-gpu
# Figures go to $OUT (default: build/gpu). NVIDIA's nixl_ep takes part where PYTHONPATH finds it.
# Exit status 1 if anything computes something else.
cd "$(dirname "$0")/../.."
out=${OUT:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
status=0
bench() {
    limit=$1 name=$2
    shift 2
    timeout "$limit" "$python" -m flexpert bench "$@" --output "$out/$name.json" > "$out/$name.log" 2>&1 ||
        { echo "$name: exit status $?"; status=1; }
    tail -n 40 "$out/$name.log"
}
mps() {  # several ranks of one GPU run at once only under it
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    nvidia-cuda-mps-control -d
}
no_mps() {
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}
comm() {
    bench 180 "comm$1" comm --device cuda --ranks "$1" --tokens "$2" --baselines "$3"
}
eager() {
    bench 180 "eager$1" comm --device cuda --eager --experts 16 --ranks "$1" --tokens 1,16,128,512
}
comm 1 1,16,128,512 nixl_ep,interface,torch,checks
eager 1
((gpus > 1)) || mps
comm 2 1,16,128,512 nixl_ep,interface,checks
eager 2
((gpus == 1 || gpus > 3)) || mps
# half of the layers: four ranks with all of them need more than 80 GB
bench 240 ranks decode --ranks 1,2,4 --layers 24
((gpus > 3)) || no_mps
bench 240 decode decode
bench 120 latents decode --shape deepseek-v3 --batch 1,16,64 --context 4096
bench 240 decode_fp8 decode --layers 24 --quantization fp8
bench 240 layer layer --baselines grouped_mm
bench 240 layer_fp8 layer --baselines grouped_mm --quantization fp8
exit $status
