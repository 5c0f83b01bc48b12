"""`python -m flexpert`, and the `flexpert` script: the command line.

Until a command runs, Ctrl-C ends the process at once, as it ends a program that takes no notice of
it: an interrupt in the middle of an import would show its traceback, or be lost.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)

_NEED_NO_FORK_SERVER = ("-h", "--help", "--resume", "--takeover")


def main() -> NoReturn:
    """Run the command line, and end this process."""
    if sys.argv[1:2] == ["serve"] and not set(sys.argv).intersection(_NEED_NO_FORK_SERVER):
        from flexpert.cluster.processes import fork_server_process

        fork_server_process.begin()  # before what takes the command line a third of a second
    from flexpert.cli.main import main as run

    try:
        run()
    except SystemExit as ended:
        if "torch" in sys.modules and isinstance(ended.code, int | None):
            _end(ended.code or 0)
        raise


def _end(status: int) -> NoReturn:
    """What Python does at its end, but that it takes the modules apart: with torch and transformers
    among them that is two seconds of a processor."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # `printing` has said what there is to say
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
