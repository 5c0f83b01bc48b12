"""`flexpert serve --device cuda` as a user runs it: changes under load, Ctrl-C, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

URL = "http://127.0.0.1:8123"


def flexpert(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "flexpert", *arguments])


def done(*arguments: str) -> bool:
    return flexpert(*arguments, "--url", URL).wait(300) == 0


@pytest.mark.usefixtures("shared_gpu")
def test_ranks_come_and_go_under_load() -> None:
    before = set(os.listdir("/dev/shm"))
    service = flexpert(
        *("serve", "--device", "cuda", "--ranks", "2", "--max-ranks", "4", "--port", "8123")
    )
    try:
        while not done("status"):
            assert service.poll() is None, "the service has ended"
            time.sleep(0.5)
        load = flexpert(
            *("bench", "serve", "--url", URL, "--num-prompts", "2048", "--concurrency", "64")
        )
        assert done("scale", "4")
        assert done("scale", "2")
        assert load.wait(300) == 0
        assert done("status")
        service.send_signal(signal.SIGINT)
        assert service.wait(60) == 0
    finally:
        service.kill()
    assert set(os.listdir("/dev/shm")) == before
