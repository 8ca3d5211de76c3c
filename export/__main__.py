"""``python -m export``: lower a student to ONNX, prove it equal, and build engines from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 the user's mistake or a full disk, 130 interrupted."""
    from distill.artifact import UserError
    from export.args import parse_args

    try:
        args = parse_args(argv)
        from export.pipeline import export

        export(args, ["python", "-m", "export", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is kept; go on with the same command", file=sys.stderr
        )
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file of this export'}; "
            "needs free disk and readable files; put that right and give the command again",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    from distill.entry import start

    sys.exit(start(main))
