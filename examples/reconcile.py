"""A controller that keeps a service at the number of ranks that a file names, whoever is killed.

    python reconcile.py http://127.0.0.1:8000 desired.txt state.json

What it must not forget lies in state.json before it asks for anything: which request of its own is
under way, and for what. So it may be killed at any moment and started again, and so may the head:
the same operation_id is the same operation, however often it is asked for.
"""

import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

url, wanted, memory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def ask(path, body=None):
    """(status, answer); raises OSError while nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("FLEXPERT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def remember(state):
    """All of it or what was there before, even if we are killed now."""
    draft = memory.with_suffix(".draft")
    draft.write_text(json.dumps(state))
    draft.replace(memory)
    return state


def reconcile(state):
    """One round: ask for what is wanted under the id that we have written down."""
    ranks = int(wanted.read_text())
    if ranks != state["ranks"] or state["over"]:
        state = remember({"number": state["number"] + 1, "ranks": ranks, "over": False})
    body = {"operation_id": f"reconcile-{state['number']}", "ranks": ranks}
    status, answer = ask("/cluster/operations", body)
    if status == 202 and answer["state"] in ("failed", "cancelled"):
        print(f"{answer['id']} {answer['state']}: {answer['error']}", flush=True)
        remember({**state, "over": True})  # the next round asks for another
    elif status == 202 and answer["state"] == "done":
        _, cluster = ask("/cluster")
        up = [rank["instance"] for rank in cluster["ranks"] if rank["state"] == "active"]
        gone = [rank["instance"] for rank in cluster["gone"]]
        print(f"{answer['id']} done, {len(up)} up; may be deleted: {gone}", flush=True)
        if len(cluster["desired"]) != ranks:  # somebody else has changed it since
            remember({**state, "over": True})
    elif status != 202:  # 409: another's change runs; 400: it does not fit, as the error says
        print(f"{status}: {answer['error']['message']}", flush=True)


while True:
    with contextlib.suppress(OSError):  # no head: it comes back, or another does
        nothing = {"number": 0, "ranks": None, "over": True}
        reconcile(json.loads(memory.read_text()) if memory.exists() else nothing)
    time.sleep(float(os.environ.get("RECONCILE_EVERY_S", "1")))
