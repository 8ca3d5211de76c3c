"""The texts of a bundle: how to install it, with and without a container, and how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bundle_runtime import IN_PLACE_ONNXRUNTIME, IN_PLACE_PYTHON

BASES = {
    "jetson": "nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel",
    "gpu": "nvcr.io/nvidia/tensorrt:26.05-py3",
    "cpu": "python:3.11-slim-bookworm",
}
RUN = """\
#!/bin/sh
# ./run.sh generate 'Once upon a time'      ./run.sh serve --port 8000      ./run.sh bench
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
export PYTHONPATH="$here/runtime"
command=${1:---help}
[ $# -gt 0 ] && shift
case $command in
  generate | serve | bench) exec "$python" -m deploy "$command" --run "$here/engine" "$@" ;;
  *) exec "$python" -m deploy "$command" "$@" ;;
esac
"""
INSTALL = """\
#!/bin/sh
# Checks the files, makes .venv here{builds}. PYTHON chooses the interpreter; arguments go to pip.
set -eu
cd "$(dirname "$0")"
sha256sum --quiet --check SHA256SUMS
${{PYTHON:-python3}} -m venv {venv_flags}.venv
.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt "$@"
./run.sh verify .
{build}echo "ready: ./run.sh generate 'Once upon a time'"
"""
DOCKERIGNORE = ".venv\n**/__pycache__\n"
BUILD = "[ -f engine/model.engine ] || .venv/bin/python engine/build.py\n"
DOCKERFILE = """\
# docker build -t {tag} .
# docker run --rm {flags}-p 127.0.0.1:8000:8000 -e BUDGETED_LORA_API_KEY {tag}
ARG BASE={base}
FROM ${{BASE}}
RUN apt-get update \\
 && apt-get install -y --no-install-recommends python3-venv \\
 && rm -rf /var/lib/apt/lists/* \\
 && useradd --create-home --uid 10001 app
USER 10001
WORKDIR /home/app/bundle
COPY --chown=10001 . .
RUN ./install.sh
EXPOSE 8000
CMD ["./run.sh", "serve", "--host", "0.0.0.0", "--port", "8000"]
"""
README = """\
# {model} for {device}

{what}

## Install and run
```
./install.sh
./run.sh generate 'Once upon a time'
./run.sh serve --port 8000
```
`install.sh` needs Python {python} or newer with venv{needs}. It compares every file with
`SHA256SUMS`, makes `.venv` in this directory and installs these packages into it, nothing else:

```
{requirements}
```

Without network: `pip download -r requirements.txt -d wheels` on a machine of the same kind, then
`./install.sh --no-index --find-links wheels`.

{container}

## Is it the bundle that was sent?
`./run.sh verify . --identity SHA256` compares every file, and the whole with the identity that
`python -m deploy bundle` printed where it was made. `sha256sum --check SHA256SUMS` does the first
half without Python.

## Licences
The model: {licence}
The files in `runtime/` are budgeted-lora's, under the Apache License 2.0 (`LICENSE`).
{prediction}"""


@dataclass(frozen=True)
class Facts:
    """What the texts say. `kind`: jetson | gpu | cpu. `is_kit`: the device builds the engine.
    `in_place`: it appends to its cache in place."""

    model: str
    device: str
    kind: str
    engine: str
    is_kit: bool
    uses_tensorrt: bool
    in_place: bool
    licence: str
    requirements: Sequence[str]
    prediction: str


def install_script(facts: Facts) -> str:
    return INSTALL.format(
        builds=", builds the engine for the GPU here" if facts.is_kit else "",
        venv_flags="--system-site-packages " if facts.uses_tensorrt else "",
        build=BUILD if facts.is_kit else "",
    )


def dockerfile(facts: Facts) -> str:
    """An engine that the device built beforehand is copied in: see the README."""
    flags = {"jetson": "--runtime nvidia ", "gpu": "--gpus all ", "cpu": ""}[facts.kind]
    return DOCKERFILE.format(
        tag="student",
        flags=flags,
        base=BASES[facts.kind],
    )


def readme(facts: Facts) -> str:
    return README.format(
        model=facts.model,
        device=facts.device,
        what=_what(facts),
        python=IN_PLACE_PYTHON if facts.in_place else "3.10",
        needs=f" and {_tensorrt(facts)}" if facts.uses_tensorrt else "",
        requirements="\n".join(facts.requirements),
        container=_container(facts),
        licence=facts.licence,
        prediction=f"\n## Speed\n{facts.prediction}\n" if facts.prediction else "",
    )


def _what(facts: Facts) -> str:
    if facts.is_kit:
        return (
            f"A build kit ({facts.engine}): a TensorRT engine for this device can be built on it "
            "alone, which `install.sh` does once, in some minutes."
        )
    ready = f"An engine that is ready to run ({facts.engine})."
    if facts.in_place:
        return (
            f"{ready} It appends to its cache in place, which ONNX Runtime does from "
            f"{IN_PLACE_ONNXRUNTIME} on, whose packages start at Python {IN_PLACE_PYTHON}."
        )
    return ready


def _tensorrt(facts: Facts) -> str:
    return "JetPack's TensorRT" if facts.kind == "jetson" else "the module tensorrt"


def _container(facts: Facts) -> str:
    lines = ["Or in a container: the first lines of `Dockerfile` are the commands."]
    if facts.kind == "jetson":
        lines.append("Its base is NVIDIA's L4T image with TensorRT; it needs the runtime `nvidia`.")
    if facts.is_kit:
        lines.append(
            "Build the engine first, on the device, with `./install.sh`: it is copied into the "
            "image, for no GPU answers while an image is made."
        )
    lines.append("The image was never built on such a device." if facts.kind != "cpu" else "")
    return "\n".join(line for line in lines if line)
