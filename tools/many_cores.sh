#!/bin/bash
# What ranks show only where each has a core of its own, in at most eight and a half minutes: a day of the
# autoscaler beside a fixed number of ranks and an oracle, a rebalance, and what it costs to be watched.
#
#     bash tools/many_cores.sh                  # on all cores that there are: 24 are enough
#     CORES=0-23 bash tools/many_cores.sh       # on these, others are free for something else
#     PARTS="rebalance observers" bash tools/many_cores.sh
#
# Text and JSON of a part are in $OUT (default build/cores) as soon as it is done. The services of the day are there
# at once; the other parts come one after the other, since what one reads from memory the other waits for. With
# fewer than 24 cores the day is one without kills, and with fewer than 12 it is short and its services come one by
# one. DAY, SECONDS_EACH, ROUNDS: of the day, of a measurement of the rebalance, of the observers. No GPU is used.
# Exit status 1 if a part fails, or an answer is lost or altered.
cd "$(dirname "$0")/.." || exit
out=${OUT:-build/cores}
python=${PYTHON:-python3}
parts=${PARTS:-autoscale rebalance observers}
mkdir -p "$out"
export CUDA_VISIBLE_DEVICES= COLUMNS=120
# run a command on these cores
pin='import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execvp(sys.argv[2], sys.argv[2:])'
list='import sys
from flexpert.bench.machine import usable_cores
ends = [part.split("-") for part in sys.argv[1].split(",") if part]
said = {n for end in ends for n in range(int(end[0]), int(end[-1]) + 1)}
print(*(n for n in usable_cores() if n in said or not said))'
read -r -a cores < <("$python" -c "$list" "${CORES:-}")
count=${#cores[@]}
((count > 0)) || { echo "flexpert is not to be had with $python (set PYTHON and PYTHONPATH)"; exit 2; }
{
    date -u
    echo "cores: ${cores[*]}"
    uptime
    lscpu | grep -E "Model name|^CPU\(s\)|Thread|Core|Socket|L2|L3|NUMA"
    echo "quota: $(cat /sys/fs/cgroup/cpu.max 2>/dev/null)"
} > "$out/machine.txt" 2>&1
join() { local IFS=,; echo "$*"; }
part() {  # NAME SECONDS FLAGS...
    local name=$1 limit=$2 begin=$SECONDS end
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    timeout -k 10 "$limit" "$python" -c "$pin" "$(join "${cores[@]}")" "$python" -m flexpert bench "$name" \
        --output "$out/$name.json" "$@" > "$out/$name.txt" 2>&1
    end=$?
    ((end == 0)) || status=1
    echo "== $name, $((SECONDS - begin)) s, exit status $end"
    tail -n 30 "$out/$name.txt"
}
if ((count >= 24)); then
    day=(--at-once --max 4 --kills 2)
elif ((count >= 18)); then
    day=(--at-once --max 4)
elif ((count >= 12)); then
    day=(--at-once --max 2)
else
    day=(--quick --max 2)
fi
status=0
part autoscale 275 "${day[@]}" --duration "${DAY:-3m}" --larger-model --output-len 128 \
    -- --device cpu
part rebalance 125 --rounds 3 --seconds "${SECONDS_EACH:-8s}" --settle 40s --clients 32 \
    -- --threads 1 --device cpu
part observers 115 --rounds "${ROUNDS:-18}" --answers 3 -- --device cpu
exit $status
