"""Archives that come out byte for byte the same, and that are trusted only after a look inside.

An archive holds one folder with regular files: no links, no devices, no paths that lead out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from distill.artifact import MANIFEST, SCHEMA_VERSION, UserError, require_disk, staged

KIND = "bundle"
COMPRESSION = 1  # weights hardly shrink, whatever the effort
PIECE_BYTES = 2**20
MANIFEST_LIMIT_BYTES = 64 * 2**20
REMEDY = "copy it again from the machine that made it"


@dataclass(frozen=True)
class Checked:
    """A bundle whose files are all as its manifest says. `identity`: sha256 of the manifest."""

    manifest: dict[str, Any]
    identity: str


def write_archive(directory: Path, archive: Path, top: str) -> None:
    """Pack every file below `directory` under the folder `top`, the manifest first, then sorted.

    Owners, times and the order of the file system leave no trace: equal files, equal bytes.
    """
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    names.sort(key=lambda name: name != MANIFEST)
    partial = archive.with_name(f".{archive.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as raw:
            with gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as packed:
                with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for name in names:
                        _add(tar, directory / name, f"{top}/{name}")
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)


def check_archive(archive: Path) -> Checked:
    """Read the whole archive and compare every file with the manifest; nothing is written.

    Raises: UserError for what is damaged, altered, missing, added, or unsafe to unpack.
    """
    with _members(archive) as members:
        return _checked(archive, members, lambda name, pieces: None)


def unpack_archive(archive: Path, directory: Path) -> Checked:
    """Check the archive while it is unpacked into `directory`, which must not exist yet.

    Nothing stays behind when a check fails. Raises: UserError as `check_archive`.
    """
    if os.path.lexists(directory):
        raise UserError(
            f"{directory} exists already; needs a new directory to unpack into; name another"
        )
    with _members(archive) as members, staged(directory) as staging:

        def write(name: str, pieces: Iterator[bytes]) -> None:
            path = staging.joinpath(*name.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                for piece in pieces:
                    file.write(piece)
            if name.endswith(".sh"):
                path.chmod(0o755)

        return _checked(archive, members, write, directory)


def _checked(
    archive: Path,
    members: Iterator[tuple[str, int, IO[bytes]]],
    use: Any,
    directory: Path | None = None,
) -> Checked:
    """Go through the members once: the manifest, then every file it names, nothing else."""
    first = next(members, None)
    if first is None or first[0] != MANIFEST or first[1] > MANIFEST_LIMIT_BYTES:
        raise UserError(f"{archive} does not begin with a {MANIFEST}; needs a bundle; {REMEDY}")
    content = first[2].read()
    manifest = _manifest_of(content, archive)
    if directory is not None:
        need = sum(int(entry["size_bytes"]) for entry in manifest["files"].values())
        require_disk(directory, need, f"unpacking {archive.name}")
    use(MANIFEST, iter([content]))
    missing = dict(manifest["files"])
    for name, size_bytes, file in members:
        entry = missing.pop(name, None)
        if entry is None:
            raise UserError(
                f"{archive} holds {name!r} twice or without an entry in its manifest; {REMEDY}"
            )
        digest = hashlib.sha256()
        if size_bytes == entry["size_bytes"]:
            use(name, _hashed(file, digest))
            for piece in iter(lambda: file.read(PIECE_BYTES), b""):  # noqa: B023
                digest.update(piece)
        if size_bytes != entry["size_bytes"] or digest.hexdigest() != entry["sha256"]:
            raise UserError(f"{archive}: {name} differs from its manifest; {REMEDY}")
    if missing:
        raise UserError(f"{archive} lacks {min(missing)}; {REMEDY}")
    return Checked(manifest, hashlib.sha256(content).hexdigest())


def _hashed(file: IO[bytes], digest: Any) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        digest.update(piece)
        yield piece


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    """(name inside the top folder, bytes, content) of each member, in order, each checked."""
    if not archive.is_file():
        raise UserError(f"{archive} is no file; needs a bundle's archive or directory; {REMEDY}")
    try:
        with tarfile.open(archive, mode="r|gz") as tar:
            yield _safe_members(tar, archive)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{archive} is truncated or damaged ({error}); {REMEDY}") from None


def _safe_members(tar: tarfile.TarFile, archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    top = None
    for member in tar:
        path = PurePosixPath(member.name)
        is_inside = not path.is_absolute() and ".." not in path.parts and len(path.parts) > 1
        top = top or path.parts[0]
        file = tar.extractfile(member) if member.isreg() else None
        if not is_inside or path.parts[0] != top or "\\" in member.name or file is None:
            raise UserError(
                f"{archive} holds {member.name!r}, which is no plain file inside its folder; a "
                f"bundle never does, so do not unpack it; {REMEDY}"
            )
        yield "/".join(path.parts[1:]), member.size, file


def _manifest_of(content: bytes, archive: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        assert manifest["kind"] == KIND and manifest["schema"] == SCHEMA_VERSION
        files: Mapping[str, Any] = manifest["files"]
        assert all(
            isinstance(entry["size_bytes"], int) and isinstance(entry["sha256"], str)
            for entry in files.values()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"{archive} has no manifest of a bundle that this version reads; {REMEDY}, or "
            "upgrade budgeted-lora"
        ) from None
    return dict(manifest)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = path.stat().st_size
    member.mode = 0o755 if name.endswith(".sh") else 0o644
    with open(path, "rb") as file:
        tar.addfile(member, file)
