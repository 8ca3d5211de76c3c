"""Whether what an earlier export left can stay: finished, whole, and made from the same things."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.artifact import MANIFEST, open_artifact
from export.say import say


def can_stay(directory: Path, kind: str, parent: str, settings: Mapping[str, Any]) -> bool:
    """Is `directory` finished and made from `parent` with these settings?

    Args:
        parent: sha256 of the manifest that it must have been made from.
        settings: figures of its manifest, all of which must be the same.
    Raises: UserError when it is damaged: that is not built again in silence.
    """
    if not (directory / MANIFEST).is_file():
        return False
    manifest = open_artifact(directory, kind)
    if manifest["parent"] != parent:
        say(f"{directory} was made from an earlier parent and is built again")
        return False
    measured = manifest["measured"]
    for name, wanted in settings.items():
        if measured.get(name) != wanted:
            found = measured.get(name)
            say(f"{directory} was built with {name} {found}, now {wanted}: it is built again")
            return False
    say(f"{directory} is finished and is used as it is")
    return True
