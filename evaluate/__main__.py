"""``python -m evaluate``: measure runs against their baselines and write one report."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 done but a contender failed (the report says which), 2 the user's
    mistake or a full disk, 130 interrupted."""
    from distill.artifact import UserError

    try:
        if argv and argv[0] == "sweep":
            from evaluate.sweep.command import sweep

            return sweep(argv[1:], ["python", "-m", "evaluate", *argv])
        from evaluate.args import parse_evaluate

        args = parse_evaluate(argv)
        from evaluate.run import evaluate

        return evaluate(args, ["python", "-m", "evaluate", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: scores of finished contenders are kept; go on with the same command",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file of this report'}; "
            "needs free disk and readable files; put that right and give the command again",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    from distill.entry import start

    sys.exit(start(main))
