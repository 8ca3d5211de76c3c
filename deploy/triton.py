"""``python -m deploy triton``: a model repository for Triton Inference Server, and for KServe.

Checked against Triton's own schema; no Triton server was run on it by us.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from deploy.args import number, whole
from deploy.engine_files import engine_precision
from deploy.engines import engine_name, find_engine
from deploy.triton_config import (
    Settings,
    Tensor,
    appends_in_place,
    engine_config,
    onnx_config,
    tensors_of_engine,
    tensors_of_onnx,
    written,
)
from distill.artifact import UserError, open_artifact, read_json, require_disk, staged

TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json",
    "generation_config.json", "special_tokens_map.json",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
README = """\
# {name} in Triton Inference Server

`repository/` is a model repository; `text/` holds the tokenizer, chat template and configuration,
which the client needs, not Triton.

```
tritonserver --model-repository=$PWD/repository
```

The model is one step of a decoder, made from {engine} ({precision}). A client keeps the cache and
sends it back with every call:

| tensor | shape | type |
|---|---|---|
{rows}

- First call: the whole prompt, `position_ids` 0, 1, 2, …, `attention_mask` of ones. The
  empty cache has length 0; where such tensors are refused, send one column of zeros instead and a
  0 in the mask for it.
- Next calls: the token that was chosen, its position, a mask that is one longer, and every
  `present.N.*` as `past_key_values.N.*`. Choose from the logits of the last position.
- CUDA shared memory keeps the cache on the GPU between calls; without it every call carries the
  cache over the network, which soon costs more than the model.

{batching}

Where one machine is enough, `python -m deploy serve` is simpler: it keeps the caches itself, and
batches requests of different lengths.

## KServe
Put `repository/` where the cluster reads it and set `storageUri` in `kserve.yaml`, then
`kubectl apply -f kserve.yaml`. It asks for the runtime `kserve-tritonserver` and the v2 protocol.
Never applied to a cluster by us.
"""
BATCHING = """\
Dynamic batching joins up to {max_batch} requests whose tensors have the same shapes, waiting at
most {delay} µs: clients that decode in step with one another gain from it, others do not. Pad
prompts on the left (mask 0) to common lengths for that."""
NO_BATCHING = """\
Dynamic batching is off: this engine reads `logits_to_keep` on the host, a shape tensor without a
batch dimension, which Triton cannot batch. Clients send batches of up to {limit} rows
themselves."""
KSERVE = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {dns_name}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: pvc://models/repository
      resources:
        limits:
          {resource}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="directory to write")
    add("--run", help="run folder, its name, or an engine directory")
    add("--engine", help="engine of that run (default: the fastest kind)")
    add("--name", help="the model's name in Triton (default: student)", default="student")
    add("--max-batch", type=whole(1, 4096), default=8, help="largest batch (default 8)")
    add(
        "--max-delay-ms",
        type=number(0, 10_000),
        default=1.0,
        help="longest wait for a fuller batch (default 1)",
    )
    add("--instances", type=whole(1, 64), default=1, help="copies of the model (default 1)")
    add("--kind", choices=("cpu", "gpu"), help="where it runs (default: as the engine was built)")
    add("--threads", type=whole(1, 1024), help="threads of an instance on the CPU")
    add(
        "--accelerate",
        action="store_true",
        help="run an ONNX through ONNX Runtime's TensorRT provider on the GPU",
    )
    add("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Write OUT. Raises: UserError for an engine or flags that do not fit."""
    out: Path = args.out
    if NAME.fullmatch(args.name) is None:
        raise UserError(f"--name {args.name}: allowed are letters, digits, _ . and -; choose such")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists already; name another directory, or give --overwrite")
    directory = _portable(find_engine(args.run, args.engine))
    open_artifact(directory)
    size_bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    require_disk(out.parent, 2 * size_bytes, "a model repository")
    with staged(out) as staging:
        _fill(staging, directory, args)
    print(f"{out}: {engine_name(directory)} as {args.name}")
    print(f"there: tritonserver --model-repository={out / 'repository'}")
    return 0


def _portable(directory: Path) -> Path:
    """The engine, or the graph that it was made from where it is for one release of ONNX Runtime.

    Raises: UserError when that graph is missing.
    """
    path = directory / "model.onnx"
    if not path.is_file() or not appends_in_place(path):
        return directory
    precision = engine_precision(directory)
    exported = directory.absolute().parent.parent / "onnx" / f"ort-{precision}"
    if not (exported / path.name).is_file():
        raise UserError(
            f"{directory} appends to its cache in place, which Triton's ONNX Runtime does not know "
            f"how to do; needs the graph that it was made from, {exported}; write it with: python "
            f"-m export --precision {precision}"
        )
    return exported


def _fill(staging: Path, directory: Path, args: argparse.Namespace) -> None:
    version = staging / "repository" / args.name / "1"
    version.mkdir(parents=True)
    if (directory / "model.engine").is_file():
        config, inputs, outputs = _engine(directory, version, args)
    else:
        config, inputs, outputs = _onnx(directory, version, args)
    (version.parent / "config.pbtxt").write_text(written(config), encoding="utf-8")
    (staging / "text").mkdir()
    for name in TEXT_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, staging / "text" / name)
    page = README.format(
        name=args.name,
        engine=engine_name(directory),
        precision=engine_precision(directory),
        rows=_rows(inputs, outputs),
        batching=_batching(config, directory),
    )
    (staging / "README.md").write_text(page, encoding="utf-8")
    on_gpu = config["instance_group"][0]["kind"] == "KIND_GPU"
    manifest = KSERVE.format(
        dns_name=re.sub(r"[^a-z0-9-]", "-", args.name.lower()).strip("-"),
        resource="nvidia.com/gpu: 1" if on_gpu else 'cpu: "2"',
    )
    (staging / "kserve.yaml").write_text(manifest, encoding="utf-8")


def _onnx(
    directory: Path, version: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """A folder model.onnx with graph and weights, as Triton wants external data."""
    if (directory / "kit.json").is_file():
        raise UserError(
            f"{directory} is a build kit without an engine; needs a finished one; build it on the "
            "device with: python3 build.py"
        )
    on_gpu = bool({"cuda", "tensorrt"} & set(directory.name.split("-"))) or args.accelerate
    kind = args.kind or ("gpu" if on_gpu else "cpu")
    if args.accelerate and kind == "cpu":
        raise UserError("--accelerate and --kind cpu exclude one another; give one of them")
    (version / "model.onnx").mkdir()
    for path in sorted(directory.glob("model.onnx*")):
        shutil.copyfile(path, version / "model.onnx" / path.name)
    inputs, outputs = tensors_of_onnx(directory / "model.onnx")
    settings = _settings(args, kind, args.max_batch)
    return onnx_config(inputs, outputs, settings), inputs, outputs


def _engine(
    directory: Path, version: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """model.plan. A shape tensor among the inputs rules Triton's batching out."""
    record = read_json(directory / "build.json")
    if record.get("flavour") != "tensorrt":
        raise UserError(
            f"{directory} is an engine of {record.get('flavour')}; Triton's backend runs TensorRT "
            "itself; build one there with: python -m export --run RUN --engine trt"
        )
    if args.kind == "cpu" or args.accelerate or args.threads:
        raise UserError(
            "--kind cpu, --accelerate and --threads belong to ONNX Runtime; a TensorRT engine runs "
            "on a GPU; leave them out or choose another --engine"
        )
    shutil.copyfile(directory / "model.engine", version / "model.plan")
    inputs, outputs = tensors_of_engine(directory)
    limit = int(record["limits"]["max_batch"])
    has_shapes = any(tensor.is_shape for tensor in inputs)
    settings = _settings(args, "gpu", 0 if has_shapes else min(args.max_batch, limit))
    return engine_config(inputs, outputs, list(record["profiles"]), settings), inputs, outputs


def _settings(args: argparse.Namespace, kind: str, max_batch: int) -> Settings:
    return Settings(
        name=args.name,
        max_batch=max_batch,
        max_delay_us=round(1000 * args.max_delay_ms),
        instances=args.instances,
        kind=kind,
        accelerate=args.accelerate,
        threads=args.threads,
    )


def _rows(inputs: list[Tensor], outputs: list[Tensor]) -> str:
    rows = []
    for word, tensors in (("in", inputs), ("out", outputs)):
        for tensor in tensors:
            number_of_layer = re.search(r"\.(\d+)\.", tensor.name)
            if number_of_layer and number_of_layer[1] != "0":
                continue
            name = tensor.name.replace(".0.", ".N.")
            rows.append(f"| {word}: `{name}` | {list(tensor.dims)} | {tensor.data_type} |")
    return "\n".join(rows)


def _batching(config: dict[str, Any], directory: Path) -> str:
    if config["max_batch_size"]:
        delay = config["dynamic_batching"]["max_queue_delay_microseconds"]
        return BATCHING.format(max_batch=config["max_batch_size"], delay=delay)
    return NO_BATCHING.format(limit=read_json(directory / "build.json")["limits"]["max_batch"])
