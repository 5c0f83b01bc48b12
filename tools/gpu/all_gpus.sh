#!/bin/bash
# What several GPUs of one host do together, one rank each, in at most nine minutes:
# the exchange beside nixl_ep and NCCL, a layer, a service through changes and kills, equal bits.
#
#     bash tools/gpu/all_gpus.sh          # on all GPUs that there are
#     MODEL=/tmp/m bash tools/gpu/all_gpus.sh   # a model of tools/gpu/random_model.py that is there
#
# LAYERS: of the model it makes in $OUT/model (default 48: 61 GB). PARTS: which of its parts. RANKS: how many at most, if not
# one a GPU; more than there are GPUs run under MPS, which tries the script and measures nothing, and none is killed
# then, since one that dies takes others of its GPU down. Figures go to $OUT (default build/gpus), a short table to the
# terminal. NVIDIA's nixl_ep takes part where PYTHONPATH finds it.
# Exit status 1 if anything computes something else, or an answer is lost.
cd "$(dirname "$0")/../.." || exit
out=${OUT:-build/gpus}
python=${PYTHON:-python3}
mkdir -p "$out"
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$gpus} kills=2 kill=1
((ranks > 1)) || { echo "this needs two GPUs or more, and there are $gpus: make bench-gpu is for one"; exit 2; }
if ((ranks > gpus)); then
    echo "$ranks ranks share $gpus GPUs under MPS: figures say nothing, and no rank is killed"
    kills=0 kill=0
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    nvidia-cuda-mps-control -d
    trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"' EXIT
fi
case $ranks in
    2) path=1,2,1,2 counts=1,2 ;;
    3) path=2,3,2,3 counts=1,2,3 ;;
    4 | 5 | 6 | 7) path=1,2,4,3,4 counts=1,2,4 ;;
    *) path=1,2,4,8,3,8 counts=1,2,4,8 ;;
esac
parts=${PARTS:-comm comm_large layer elastic deterministic}
status=0
part() {  # NAME SECONDS COMMAND...
    name=$1 limit=$2 begin=$SECONDS
    shift 2
    [[ " model $parts " == *" $name "* ]] || return
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || { echo "$name: exit status $?"; status=1; }
    echo "== $name, $((SECONDS - begin)) s"
    tail -n "${lines:-30}" "$out/$name.log"
}
bench() {  # NAME SECONDS BENCH...
    name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m flexpert bench "$@"
}
model=${MODEL:-$out/model}
if [ -z "$MODEL" ]; then
    part model 100 "$python" tools/gpu/random_model.py "$model" --layers "${LAYERS:-48}"
fi
bench comm 90 comm --device cuda --ranks "$ranks" --experts 256 --tokens 1,16,128,512 \
    --baselines nixl_ep,nccl --repeat 50 --output "$out/comm.json"
bench comm_large 40 comm --device cuda --ranks "$ranks" --experts 256 --tokens 4096 \
    --baselines nccl --repeat 20 --output "$out/comm_large.json"
bench layer 90 layer --shapes deepseek-v3 --tokens 64,512 --quantization fp8 --baselines "" --ranks "1,$ranks" \
    --output "$out/layer.json"
bench elastic 130 elastic --path "$path" --kills "$kills" --clients 128 --tokens 200 --undisturbed 3s \
    --settle 500ms --output "$out/elastic.json" -- --model "$model" --device cuda
lines=14 part deterministic 120 "$python" tools/gpu/deterministic.py "$model" --ranks "$counts" \
    --changes 2 --kills "$kill" --rounds 0 --limit 115
[ -n "$MODEL" ] || rm -rf "$model"
exit $status
