#!/bin/bash
# `flexpert serve --device cuda` over HTTP on this machine's GPUs, as a user runs it: two ranks,
# four, two while requests run, then Ctrl-C. Start NVIDIA's MPS before, if there is one GPU.
#     bash tools/gpu/serve_http.sh
# Exit status 1 if a request failed, a change failed, or something is left behind.
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
url=http://127.0.0.1:8123
before=$(ls /dev/shm)
python3 -m flexpert serve --device cuda --ranks 2 --max-ranks 4 --port 8123 &
service=$!
status=0
must() { "$@" || { echo "failed: $*"; status=1; }; }
until python3 -m flexpert status --url $url > /dev/null 2>&1; do
    kill -0 $service 2> /dev/null || { echo "the service has ended"; exit 1; }
    sleep 0.5
done
must python3 -m flexpert bench serve --url $url --num-prompts 256 --concurrency 64
python3 -m flexpert bench serve --url $url --num-prompts 2048 --concurrency 64 &
load=$!
sleep 3
must python3 -m flexpert scale 4 --url $url
must python3 -m flexpert scale 2 --url $url
kill -0 $load 2> /dev/null || echo "the load ended before the changes did"
must wait $load
must python3 -m flexpert status --url $url
kill -INT $service
must wait $service
must test "$(ls /dev/shm)" = "$before"
exit $status
