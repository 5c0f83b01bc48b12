#!/bin/bash
# NVIDIA's compute-sanitizer over the exchange's kernels: bash tools/gpu/sanitize.sh
# In one process: flags between processes are no race to racecheck. Exit status 1 if it finds one.
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
status=0
for tool in memcheck racecheck; do
    timeout 240 compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
        "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider -k "not processes" \
        tests/comm/test_cuda_exchange.py tests/comm/test_cuda_expert_major.py || status=1
done
exit $status
