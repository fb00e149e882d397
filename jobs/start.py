"""The entry point of `diffsmooth`: Ctrl-C ends it in one line, also while modules are imported or threads wait."""

import os
import sys
from contextlib import suppress


def main() -> None:
    """Run the command line. Exit status 130 after Ctrl-C."""
    try:
        from diffsmooth.jobs.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("diffsmooth: stopped\n")
        _leave(130)
    except SystemExit as ended:
        if ended.code in (130, 143):
            _leave(ended.code)
        raise


def _leave(status: int) -> None:
    """End the process without waiting for threads: one may wait for a server that never answers."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)
