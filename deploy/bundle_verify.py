"""``python -m deploy verify``: is a bundle whole, and is it the one that was sent?"""

from __future__ import annotations

import argparse
import hmac
import re
from pathlib import Path

from deploy.bundle_archive import KIND, REMEDY, Checked, check_archive, unpack_archive
from distill.artifact import MANIFEST, UserError, open_artifact, sha256_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle's archive, or its unpacked directory")
    parser.add_argument(
        "--identity",
        metavar="SHA256",
        help="the identity that `deploy bundle` printed: also says that nobody replaced the bundle",
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="DIR", help="unpack the archive into this new directory"
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 for a whole bundle; raises UserError naming what is wrong otherwise."""
    bundle: Path = args.bundle
    if bundle.is_dir():
        if args.unpack is not None:
            raise UserError(f"--unpack: {bundle} is unpacked already; leave the flag out")
        checked = check_directory(bundle)
    elif args.unpack is not None:
        if args.identity is not None:
            _require_identity(bundle, check_archive(bundle), args.identity)
        checked = unpack_archive(bundle, args.unpack)
    else:
        checked = check_archive(bundle)
    if args.identity is not None:
        _require_identity(bundle, checked, args.identity)
    measured = checked.manifest["measured"]
    print(
        f"{bundle}: {len(checked.manifest['files'])} files as sent; {measured['engine']} for "
        f"{measured['device']}; model licence: {measured['model_licence']['licence']}"
    )
    print(f"identity {checked.identity}")
    return 0


def check_directory(directory: Path) -> Checked:
    """Raises: UserError for a file that is missing or altered, and for one of the runtime that is
    not in the manifest: Python would import it."""
    manifest = open_artifact(directory, KIND)
    runtime = directory / "runtime"
    for path in sorted(runtime.rglob("*")):
        name = path.relative_to(directory).as_posix()
        is_cache = "__pycache__" in path.parts
        if path.is_symlink() or (path.is_file() and name not in manifest["files"] and not is_cache):
            raise UserError(f"{path} is not part of the bundle; {REMEDY}, or delete that file")
    return Checked(manifest, sha256_file(directory / MANIFEST))


def _require_identity(bundle: Path, checked: Checked, wanted: str) -> None:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted.strip()):
        raise UserError(f"--identity {wanted}: needs the 64 hex digits that deploy bundle printed")
    if not hmac.compare_digest(checked.identity.encode(), wanted.strip().lower().encode()):
        raise UserError(
            f"{bundle} has the identity {checked.identity}, asked for is {wanted}; it is another "
            f"bundle than the one meant; {REMEDY}"
        )
