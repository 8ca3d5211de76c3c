"""The licence of the model in a bundle, as far as its model card states one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from deploy.bundle_engine import copy_file


def licence_of(engine: Path, given: str | None) -> dict[str, str | None]:
    """The model's licence as the student's model card states it; "not stated" where it does not."""
    if given is not None:
        return {"licence": given, "base_model": None, "link": None}
    stated: dict[str, str] = {}
    for card in (engine / "README.md", engine.absolute().parents[1] / "student" / "README.md"):
        if card.is_file() and not stated:
            stated = _front_matter(card)
    licence = stated.get("license_name") or stated.get("license") or "unknown"
    return {
        "licence": "not stated" if licence == "unknown" else licence,
        "base_model": stated.get("base_model"),
        "link": stated.get("license_link"),
    }


def copy_licences(engine: Path, directory: Path, project: Path) -> None:
    own = project / "LICENSE"
    if own.is_file():
        copy_file(own, directory / "LICENSE")
    student = engine.absolute().parents[1] / "student"
    for pattern in ("LICEN[CS]E*", "NOTICE*"):
        for path in sorted(student.glob(pattern)):
            copy_file(path, directory / "model-licence" / path.name)


def _front_matter(card: Path) -> dict[str, str]:
    """The plain `key: value` lines between the first two `---` of a model card."""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    pairs = re.findall(r"^(\w+):[ \t]+(\S.*)$", parts[1], flags=re.MULTILINE)
    return {key: value.strip().strip("'\"") for key, value in pairs}


def licence_line(licence: Mapping[str, str | None]) -> str:
    base = f", derived from {licence['base_model']}" if licence["base_model"] else ""
    link = f" ({licence['link']})" if licence["link"] else ""
    return f"{licence['licence']}{link}{base}."
