"""The command ``memtrack``, also as ``python -m memtrack``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line in ``sys.argv`` and exit with its status."""
    try:
        from memtrack.cli.app import app
    except ImportError as exc:
        # a module of ours that is missing is a broken installation, not a missing extra
        if exc.name is not None and exc.name.partition(".")[0] == "memtrack":
            raise
        sys.stderr.write(
            f"memtrack: the command line needs {exc.name}, which is not installed: pip install 'memtrack[cli]'\n"
        )
        sys.exit(1)
    app(prog_name="memtrack")


if __name__ == "__main__":
    main()
