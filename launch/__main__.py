"""`python -m launch` is `pairloop`."""

import atexit
import os
import sys
from contextlib import suppress

status = 1
"""What this process ends with; an error that nobody expected leaves it so."""


def leave() -> None:
    """End a rank, once all has been done that was to be done at its end.

    Threads of gloo's groups live on after them. Where one comes back into an interpreter that is
    half gone, it aborts the process, and a launcher takes a run that is done for a failed one.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        # Before all others, to come after them.
        atexit.register(leave)
    from launch.cli import main

    status = main()
    sys.exit(status)
