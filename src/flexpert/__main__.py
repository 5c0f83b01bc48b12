"""`python -m flexpert`, and the `flexpert` script: the command line.

Until a command runs, Ctrl-C ends the process at once, as it ends a program that takes no notice of
it: an interrupt in the middle of an import would show its traceback, or be lost.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from flexpert.cli.main import main

if __name__ == "__main__":
    main()
