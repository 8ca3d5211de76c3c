"""``python -m deploy COMMAND``: run, serve, measure and package an exported engine."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": ("deploy.generate", "continue prompts, answer chat messages"),
    "serve": ("deploy.server", "an OpenAI-compatible HTTP server"),
    "bench": ("deploy.bench", "prompt processing and generation speed, with ceilings"),
    "bundle": ("deploy.bundle", "one archive for the device: engine, tokenizer, runtime"),
    "verify": ("deploy.bundle_verify", "check a bundle on arrival"),
    "triton": ("deploy.triton", "a model repository for Triton Inference Server"),
}


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 done with failures, 2 the user's mistake, 130 interrupted."""
    from distill.commit import UserError

    try:
        return _run(list(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(
            f"error: {error.strerror or error}: {error.filename or 'a file or port'}; needs free "
            "disk, readable files and free ports; put that right and give the command again",
            file=sys.stderr,
        )
        return 2


def _run(argv: list[str]) -> int:
    from distill.commit import UserError

    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(
            f"{argv[0]}: no such command; allowed are {', '.join(COMMANDS)}; "
            "see python -m deploy --help"
        )
    from deploy.args import Parser, parse

    module_name, summary = COMMANDS[argv[0]]
    module = importlib.import_module(module_name)
    parser = Parser(
        prog=f"python -m deploy {argv[0]}", description=summary + ".", allow_abbrev=False
    )
    module.add_arguments(parser)
    return int(module.run(parse(parser, argv[1:])))


def _usage() -> str:
    lines = ["usage: python -m deploy COMMAND [FLAGS]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "python -m deploy COMMAND --help has each command's flags."])


if __name__ == "__main__":
    from distill.entry import start

    sys.exit(start(main))
