"""A Ray cluster of several nodes on this machine, as a process of its own.

Told on its standard input: "remove N" takes node N away by force, "free" asks for the CPUs of each
node that lives which nobody has taken. Each is answered with a line of JSON. The end of the input
ends the cluster, and whatever its nodes have left behind.

    python ray_nodes.py FOLDER CPUS...
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def main(folder: str, cpus: list[int]) -> None:
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    # a node that is removed by force leaves agents of Ray behind, which become ours
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    try:
        _serve(answers, cpus)
    finally:
        left = psutil.Process().children(recursive=True)
        for process in left:
            process.kill()
        psutil.wait_procs(left, 10)


def _serve(answers, cpus: list[int]) -> None:
    import ray
    from ray._private import state
    from ray.cluster_utils import Cluster

    def answer(what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    cluster = Cluster()
    nodes = [
        cluster.add_node(num_cpus=count, object_store_memory=80 * 2**20, include_dashboard=False)
        for count in cpus
    ]
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    answer({"address": cluster.address, "nodes": [node.node_id for node in nodes]})
    for line in sys.stdin:
        match line.split():
            case ["remove", number]:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                answer(None)
            case ["free"]:
                free = state.available_resources_per_node()
                answer({node: has.get("CPU", 0.0) for node, has in free.items()})
    ray.shutdown()
    for node in cluster.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


if __name__ == "__main__":
    main(sys.argv[1], list(map(int, sys.argv[2:])))
