"""Memory that peers read: only the right one, as long as they like, and they cannot harm it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import msgspec
import pytest
import torch

from flexpert.comm import PeerUnreachable
from flexpert.comm.peer_memory import ImportedPages, export_memory
from flexpert.comm.shared_pages import PagesAddress

OWNER = """
import sys, torch
from flexpert.comm.peer_memory import export_memory
exported = export_memory(8192)
exported.bytes[:] = 7
sys.stdout.buffer.write(exported.address.hex().encode() + b"\\n")
sys.stdout.flush()
sys.stdin.readline()
exported.bytes[100] = 9
print("changed", flush=True)
sys.stdin.readline()
"""


def test_a_peer_reads_what_the_owner_writes_also_after_its_death() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdin
        assert owner.stdout
        address = bytes.fromhex(owner.stdout.readline().decode().strip())
        there = ImportedPages(address)
        view = there.read(100, (2, 3), torch.uint8)
        assert view.tolist() == [[7, 7, 7], [7, 7, 7]]
        owner.stdin.write(b"\n")
        owner.stdin.flush()
        owner.stdout.readline()
        assert view[0, 0] == 9
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert there.bytes.sum() == 7 * 8192 + 2
        with pytest.raises(PeerUnreachable):
            ImportedPages(address)
    finally:
        owner.kill()
        owner.wait()
        for pipe in (owner.stdin, owner.stdout):
            if pipe:
                pipe.close()


WRITER = """
import sys
from flexpert.comm.peer_memory import ImportedPages
ImportedPages(bytes.fromhex(sys.argv[1])).bytes[0] = 5
"""


def test_a_peer_that_writes_ends_and_the_memory_is_as_it_was() -> None:
    exported = export_memory(4096)
    writer = subprocess.run([sys.executable, "-c", WRITER, exported.address.hex()], check=False)
    assert writer.returncode == -signal.SIGSEGV
    assert exported.bytes[0] == 0
    exported.close()


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another"},
        {"started": 1},
        {"nonce": b"x" * 16},
        {"size": 1 << 40},
        {"fd": 0},
        {"pid": 2**22 - 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_address_that_is_not_right_is_refused(change: dict[str, object]) -> None:
    exported = export_memory(4096)
    address = msgspec.structs.replace(
        msgspec.msgpack.decode(exported.address, type=PagesAddress), **change
    )
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerUnreachable):
        ImportedPages(msgspec.msgpack.encode(address))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    exported.close()


def test_nonsense_and_places_beyond_the_end_are_refused() -> None:
    exported = export_memory(4096)
    with pytest.raises(ValueError, match="not an address"):
        ImportedPages(b"nonsense")
    with pytest.raises(ValueError, match="8 bytes at 4092 of 4096 exported ones"):
        ImportedPages(exported.address).read(4092, (2,), torch.float32)
    exported.close()


def test_memory_is_taken_on_use_and_given_back() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    exported = export_memory(64 << 20)
    assert exported.resident < 1 << 20
    exported.bytes[: 8 << 20] = 1
    assert exported.resident >= 8 << 20
    exported.bytes[8 << 20] = 2
    exported.release(0, 8 << 20)
    assert exported.resident < 1 << 20
    assert exported.bytes[:4096].sum() == 0
    assert exported.bytes[8 << 20] == 2
    with pytest.raises(ValueError, match="not whole pages"):
        exported.release(100, 4096)
    exported.close()
    del exported
    assert len(os.listdir("/proc/self/fd")) == descriptors
