"""Where the command `qrun` begins, and is still being read from the disk: until `main` has its own handler, Ctrl-C ends
the process without a word."""

import signal
import sys


def main() -> int:
    """What `main.main` does for the command itself."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qrun.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
