"""How ``python -m PACKAGE`` starts where nothing is installed; needs the standard library alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from distill import __version__

OURS = ("distill", "export", "deploy", "evaluate")


def start(main: Callable[[Sequence[str]], int]) -> int:
    """Exit status of ``main``; 2 with one line where a package that it needs is not installed.

    ``--version``, alone or after a subcommand, is answered here.
    """
    if sys.argv[-1] == "--version" and len(sys.argv) <= 3:
        print(f"budgeted-lora {__version__}")
        return 0
    try:
        return main(sys.argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        print(
            f"error: the package {error.name} is missing from {sys.executable}; needs this "
            "project's environment; make it with make install (./install.sh in a bundle) and run "
            ".venv/bin/python",
            file=sys.stderr,
        )
        return 2
