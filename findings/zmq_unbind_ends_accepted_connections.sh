#!/usr/bin/env bash
# Unbinding a ZeroMQ socket ends the connections that were accepted at that address.
#
# Versions    pyzmq 27.1.0 (libzmq 4.3.5), Python 3.11; TCP on loopback.
# Expected    as with a listening socket of the system, which can be closed to take nobody in for a
#             while: peers that are connected already stay connected, and what is sent to one of them
#             arrives.
# Seen        their connections end with the unbinding. What the ROUTER sends to one of them then is
#             dropped without an error, because it does not know the peer any more (with
#             ROUTER_MANDATORY: "Host unreachable"). After binding again the peer connects anew and is
#             another one to the ROUTER, and the first message it sends is lost without an error. So a
#             server cannot pause taking peers in without losing those
#             that it has (libzmq issue 3317 tells of it for SERVER and CLIENT).
#
# Runs in a temporary folder. Exits with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyzmq==27.1.0
cat > "$folder/run.py" <<'PY'
import sys
import time

import zmq

print("pyzmq", zmq.__version__, "libzmq", zmq.zmq_version())
context = zmq.Context()
server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
server.bind("tcp://127.0.0.1:*")
address = server.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
client.connect(address)
client.send(b"hello")
peer, _ = server.recv_multipart()
server.send_multipart([peer, b"before"])
print("before unbinding:", client.recv().decode())
server.unbind(address)
time.sleep(0.5)
server.send_multipart([peer, b"after"])
arrived = bool(client.poll(2000))
print("after unbinding:", client.recv().decode() if arrived else "nothing arrives, and no error")
server.setsockopt(zmq.ROUTER_MANDATORY, 1)
try:
    server.send_multipart([peer, b"mandatory"])
    told = ""
except zmq.ZMQError as error:
    told = error.strerror
print("with ROUTER_MANDATORY:", told or "sent")
server.bind(address)
came = []
for number in range(10):
    client.send(b"again %d" % number)
    if server.poll(1000):
        came = server.recv_multipart()
        break
other = came[0] if came else peer
print("bound again:", (came[1].decode() if came else "nothing"), "is the first that comes, from", end=" ")
print("the same peer" if other == peer else "a peer with another identity")
context.destroy(linger=0)
sys.exit(0 if not arrived and told and other != peer and came[1] != b"again 0" else 1)
PY
"$folder/venv/bin/python" "$folder/run.py"
