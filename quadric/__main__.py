"""Where the command ``quadric`` and ``python -m quadric`` begin.

Every process that a command starts imports this module again. It must stay as light as it is: the command line with
all of torch takes seconds to load.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Loads the command line and runs it; returns the exit status."""
    try:
        from quadric import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
