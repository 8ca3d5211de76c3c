"""Build kits: everything a device needs to build its own engine, with TensorRT and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.artifact import sha256_file, write_json
from export.trt_builder import allows_tf32, first_release
from export.trt_device import KIT
from export.trt_onnx import KEEP, MODEL, Prepared, Shapes
from export.trt_targets import KNOWN, PARSER

HERE = Path(__file__).parent
CARRIED = ("trt_api", "trt_builder", "trt_progress", "trt_record", "trt_targets")

README = """\
# Build kit for {gpus}

Only the device itself can build a TensorRT engine for {targets}. On the device, in this directory:

```
python3 build.py
```

It needs Python 3.10 or newer and the module `tensorrt` ({source}), no torch and no
numpy. It checks these files against their sha256, refuses another GPU, builds, and writes
`model.engine` and `build.json` here. `python3 build.py --help` names the few options.

{release}

## Without Python
TensorRT's own command builds the same engine, without build.json:

```
{trtexec}
```

TensorRT 11 is always strongly typed: leave `--stronglyTyped` out there.
"""


def write_build_kit(
    onnx_directory: Path,
    directory: Path,
    *,
    prepared: Prepared,
    targets: Sequence[str],
    profiles: Mapping[str, Shapes],
    workspace_bytes: int,
    made_from: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill `directory` with the typed ONNX, its profiles and a builder that needs only TensorRT.

    Args:
        made_from: precision, logits, limits and source hashes, copied into the later build.json.

    Returns: what kit.json holds.
    """
    (directory / "export").mkdir(parents=True)
    (directory / "export" / "__init__.py").touch()
    for name in CARRIED:
        shutil.copyfile(HERE / f"{name}.py", directory / "export" / f"{name}.py")
    shutil.copyfile(HERE / "trt_device.py", directory / "build.py")
    (directory / MODEL).write_bytes(prepared.onnx_bytes)
    for name in prepared.data_files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx_directory / name, directory / name)
    kit = {
        "targets": list(targets),
        "files": {
            name: {
                "bytes": (directory / name).stat().st_size,
                "sha256": sha256_file(directory / name),
            }
            for name in (MODEL, *prepared.data_files)
        },
        "profiles": dict(profiles),
        "workspace_bytes": workspace_bytes,
        "first_release": list(first_release(prepared.operators)),
        "made_from": dict(made_from),
    }
    write_json(directory / KIT, kit)
    (directory / "README.md").write_text(readme(kit), encoding="utf-8")
    return kit


def readme(kit: Mapping[str, Any]) -> str:
    targets = kit["targets"]
    jetson = any(KNOWN[target].startswith("Jetson") for target in targets)
    return README.format(
        gpus=", ".join(f"{KNOWN[target]} ({target})" for target in targets),
        targets=", ".join(targets),
        source="part of JetPack" if jetson else "`pip install tensorrt`",
        release=_release_line(kit),
        trtexec=trtexec_command(
            kit["profiles"], kit["workspace_bytes"], tf32=allows_tf32(kit["made_from"]["precision"])
        ),
    )


def trtexec_command(
    profiles: Mapping[str, Shapes], workspace_bytes: int, *, tf32: bool = False
) -> str:
    """The command line of trtexec that builds what build.py builds."""
    parts = [
        "trtexec --stronglyTyped" + ("" if tf32 else " --noTF32"),
        f"--onnx={MODEL}",
        "--saveEngine=model.engine",
    ]
    parts.append(f"--memPoolSize=workspace:{workspace_bytes >> 20}M")
    for index, shapes in enumerate(profiles.values()):
        parts.append(f"--profile={index}")
        for end in ("min", "opt", "max"):
            sizes = ",".join(f"{name}:{_joined(name, of[end])}" for name, of in shapes.items())
            parts.append(f"--{end}Shapes={sizes}")
    return " \\\n  ".join(parts)


def _joined(name: str, sizes: Sequence[int]) -> str:
    """Dimensions as 1x2x3; the values of a shape tensor look the same for one of them."""
    assert name != KEEP or len(sizes) == 1
    return "x".join(map(str, sizes))


def _release_line(kit: Mapping[str, Any]) -> str:
    """Which TensorRT the kit is for, and what the devices bring."""
    first = ".".join(map(str, kit["first_release"]))
    brought = [
        f"{KNOWN[target]}'s JetPack brings {'.'.join(map(str, PARSER[target]))}"
        for target in kit["targets"]
        if target in PARSER
    ]
    return (
        "; ".join([f"For TensorRT {first} or newer, by the documentation of its parser", *brought])
        + "."
    )
