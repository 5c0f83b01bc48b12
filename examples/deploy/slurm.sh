#!/bin/bash
# flexpert on Slurm: the head with a rank on the job's first node, a rank on each of the others.
#
#   sbatch --nodes=4 slurm.sh                 # MODEL, PORT, JOIN_PORT, INTERFACE: see below
#   scancel JOB                               # requests that run may finish, then all ends
#
# The folder that it is submitted from must be on a file system that all nodes share: the keys of the
# job lie there while it runs, and what clients need to know.
#SBATCH --job-name=flexpert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120

set -euo pipefail
umask 077

model=${MODEL:-tiny}
port=${PORT:-8000}
join_port=${JOIN_PORT:-7000}
interface=${INTERFACE:-} # of the network between the nodes, ib0 say; none: UCX chooses

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
others=("${nodes[@]:1}")

folder=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/flexpert-$SLURM_JOB_ID.XXXXXX")
token=$folder/cluster.token
key=$folder/api.key
openssl rand -base64 32 >"$token"
openssl rand -base64 32 >"$key"

serve='' join=''
# Ends both, the head first: it waits for the requests that run, and for that it needs the ranks.
end() {
    trap '' EXIT TERM INT
    for process in "$serve" "$join"; do
        if [[ -n $process ]]; then
            kill -TERM "$process" 2>/dev/null || true
            while kill -0 "$process" 2>/dev/null; do wait "$process" || true; done
        fi
    done
    rm -rf "$folder"
}
trap end EXIT
trap 'exit 0' TERM INT

flexpert serve --model "$model" --ranks 1 --max-ranks "${#nodes[@]}" \
    --host 0.0.0.0 --port "$port" --api-key-file "$key" \
    --join-listen "tcp://0.0.0.0:$join_port" --cluster-token-file "$token" \
    --shutdown-timeout 20s ${interface:+--interface "$interface"} &
serve=$!

if ((${#others[@]})); then
    srun --nodes="${#others[@]}" --ntasks="${#others[@]}" --ntasks-per-node=1 \
        --nodelist="$(IFS=,; echo "${others[*]}")" --kill-on-bad-exit=0 --wait=0 \
        flexpert join "tcp://$head:$join_port" --cluster-token-file "$token" \
        ${interface:+--interface "$interface"} &
    join=$!
fi

echo "flexpert: http://$head:$port, key in $key"
wait "$serve"
