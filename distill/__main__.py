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
    try:
        args = parse_args(argv)
        from distill.pipeline import distil

        distil(args, ["python", "-m", "distill", *argv])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is kept; go on with the same command and --resume",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file of this run'}; "
            "needs free disk and readable files; put that right and go on with --resume",
            file=sys.stderr,
        )
        return 2
    except SafetensorError as error:
        print(
            f"error: tensors cannot be written or read ({error}); needs free disk and undamaged "
            "files; put that right and go on with --resume, or start again with --overwrite",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    from distill.entry import start

    sys.exit(start(main))
