"""A service in a network namespace, asked from within without what a command takes to begin."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_ASK = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
connection.request("GET", "/cluster")
print(connection.getresponse().read().decode())
"""


def cluster_in(namespace: str, port: int) -> Any:
    """What `flexpert status --json` shows there. Raises: CalledProcessError: nobody answers."""
    told = subprocess.run(
        ["ip", "netns", "exec", namespace, sys.executable, "-S", "-c", _ASK, str(port)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return json.loads(told.stdout)
