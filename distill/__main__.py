"""``python -m distill``: distil a causal language model into a student that keeps a budget."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 the user's mistake or a full disk, 130 interrupted."""
    from safetensors import SafetensorError

    from distill.args import parse_args
    from distill.artifact import UserError
    from distill.resources import keep_freed_memory

    keep_freed_memory()
    go_on = "give the same command again"
    try:
        args = parse_args(argv)
        from distill.pipeline import distil
        from distill.rundir import how_to_go_on

        try:
            distil(args, ["python", "-m", "distill", *argv])
        finally:
            go_on = how_to_go_on(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: what was finished is kept; {go_on}", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file of this run'}; "
            f"needs free disk and readable files; put that right and {go_on}",
            file=sys.stderr,
        )
        return 2
    except SafetensorError as error:
        print(
            f"error: tensors cannot be written or read ({error}); needs free disk and undamaged "
            f"files; put that right and {go_on}, or start again with --overwrite",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    from distill.entry import start

    sys.exit(start(main))
