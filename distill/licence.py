"""What a base model is called on the hub and under which licence it stands, as far as it says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader
from huggingface_hub import ModelCard, hf_hub_download

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Origin:
    """`hub_id` and `licence` (a hub licence identifier) are None where nothing states them.

    `licence_name` and `licence_link` go with the identifier "other".
    """

    hub_id: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None


BUILTIN_ORIGINS = {"smollm2-135m": Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def origin_of(source: str, revision: str | None = None) -> Origin:
    """The origin of a built-in name, directory, .gguf file or hub id.

    Read from the model card of a directory or hub model (from the cache when offline) and from
    the header of a GGUF. What cannot be read counts as not stated; nothing is raised, because a
    finished student must not be lost over its licence line.
    """
    if source in BUILTIN_ORIGINS:
        return BUILTIN_ORIGINS[source]
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _from_card(path / "README.md", None)
        if path.is_file():
            return _from_gguf(path)
        if HUB_ID.fullmatch(source):
            return _from_card(Path(hf_hub_download(source, "README.md", revision=revision)), source)
    except Exception:
        return Origin(source if HUB_ID.fullmatch(source) and not path.exists() else None)
    return Origin()


def _from_card(card: Path, hub_id: str | None) -> Origin:
    """A directory's card gives the licence; its own base model is not what is distilled here."""
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return Origin(hub_id, data.get("license"), data.get("license_name"), data.get("license_link"))


def _from_gguf(path: Path) -> Origin:
    fields = GGUFReader(path).fields
    stated = {
        key: str(fields[f"general.{key}"].contents())
        for key in ("license", "license.name", "license.link")
        if f"general.{key}" in fields
    }
    return Origin(
        None, stated.get("license"), stated.get("license.name"), stated.get("license.link")
    )
