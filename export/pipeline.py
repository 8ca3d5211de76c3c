"""One export: student → ONNX graph → proof → engines, each a committed directory of its own."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from distill.artifact import (
    MANIFEST,
    UserError,
    open_artifact,
    read_json,
    require_disk,
    sha256_file,
    staged,
    write_manifest,
)
from distill.plan import Plan
from distill.runs import find_run
from export.args import ExportArgs
from export.closing import print_closing_table
from export.engine_ort import build_ort_engine, ort_settings
from export.engine_trt import build_engine, trt_settings
from export.files import copy_companions, write_genai_config
from export.lower import Flavour, Precision, check_lowered, lower, save_onnx
from export.parity import TEXT, check_parity
from export.parity_reference import Reference
from export.preflight import require_buildable
from export.quantize import quantize
from export.reuse import can_stay
from export.say import say
from export.trt_onnx import Limits
from export.trt_place import Graph, Place, graph_here, graph_of_kit
from export.trt_plain import write_plain

GIB = 2**30
QUANTISED = ("int8", "int4")


def export(args: ExportArgs, argv: Sequence[str]) -> list[Path]:
    """Build every engine that ``args`` asks for; what is there already is kept.

    Returns the engine directories. Raises UserError for everything that the user can put right.
    """
    run = find_run(args.run, "student")
    job = Job(run, args, argv, require_buildable(args))
    exported = []
    for engine, precision in args.wanted():
        onnx = job.onnx(job.flavour(engine, precision), precision)
        exported.append((onnx, job.engine(engine, precision, onnx)))
    print_closing_table(run, exported)
    return [engine for _, engine in exported]


class Job:
    """The export of one student. `places`: where the TensorRT engine of a precision is built."""

    def __init__(
        self, run: Path, args: ExportArgs, argv: Sequence[str], places: Mapping[str, Place]
    ) -> None:
        self.run, self.args, self.argv, self.places = run, args, list(argv), places
        self.student = run / "student"
        self.manifest = open_artifact(self.student, "student")
        self.student_sha256 = sha256_file(self.student / MANIFEST)
        self.text = _parity_text(args)
        self._done: set[Path] = set()

    def flavour(self, engine: str, precision: str) -> Flavour | Graph:
        """Which graph an engine, or where only a device can build it its kit, is made of."""
        if engine == "ort":
            return "ort"
        place = self.places[precision]
        return graph_here(place, precision) if place.here else graph_of_kit(place.kit, precision)

    def onnx(self, flavour: Flavour | Graph, precision: str) -> Path:
        """The proven graph of one flavour and precision, written unless it is there."""
        final = self.run / "onnx" / f"{flavour}-{precision}"
        wanted = {**self._proof(flavour), "shares_inputs": flavour == "ort"}
        if self._is_there(final, "onnx", self.student_sha256, wanted):
            return final
        sources = self._sources(flavour, precision)
        require_disk(final, self._float_bytes(), f"the {flavour} {precision} graph")
        began = time.monotonic()
        with staged(final) as partial:
            say(f"lowering {self.student} to {flavour} {precision}")
            if flavour == "plain":
                figures = _plain(sources, partial, precision)
            elif sources:
                figures = _quantise(sources, partial, precision)
            else:
                figures = self._lower(partial, flavour, cast(Precision, precision))
            lowered_s = time.monotonic() - began
            say(f"parity of {flavour} {precision} with the PyTorch student")
            max_seq, max_past = self._profile(flavour)
            parity = check_parity(
                self.student,
                partial,
                precision=precision,
                text=self.text,
                max_seq=max_seq,
                max_past=max_past,
                reference=self._reference,
                name=f"the {flavour} {precision} graph",
            )
            measured = {
                **figures,
                "flavour": flavour,
                "precision": precision,
                "weight_bytes": sum(p.stat().st_size for p in partial.glob("model.onnx*")),
                **wanted,
                "parity": parity.to_json(),
                "lowering_s": lowered_s,
                "seconds": time.monotonic() - began,
            }
            self._seal(partial, "onnx", self.student_sha256, measured)
        self._done.add(final)
        return final

    def engine(self, engine: str, precision: str, onnx: Path) -> Path:
        """The engine of one graph, built unless it is there."""
        if engine == "ort":
            return self._ort_engine(precision, onnx)
        return self._trt_engine(precision, onnx)

    def _ort_engine(self, precision: str, onnx: Path) -> Path:
        provider = self.args.provider
        final = self.run / "engine-ort" / f"{precision}-{provider}"
        parent = sha256_file(onnx / MANIFEST)
        if not self._is_there(final, "engine-ort", parent, ort_settings(provider)):
            say(f"building {final}")
            require_disk(final, 2 * _bytes_of(onnx), f"the engine {final.name}")
            build_ort_engine(onnx, final, provider=provider, argv=self.argv)
            self._done.add(final)
        return final

    def _trt_engine(self, precision: str, onnx: Path) -> Path:
        args, place = self.args, self.places[precision]
        final = self.run / "engine-trt" / precision
        limits = Limits(args.max_batch, args.max_seq, args.max_past)
        workspace_bytes = int(args.workspace_gib * GIB)
        wanted = trt_settings(place, onnx, limits, workspace_bytes)
        if not self._is_there(final, "engine-trt", sha256_file(onnx / MANIFEST), wanted):
            say(f"building {final}")
            build_engine(
                onnx,
                final,
                targets=args.target or None,
                max_batch=args.max_batch,
                max_seq=args.max_seq,
                max_past=args.max_past,
                workspace_bytes=workspace_bytes,
                argv=self.argv,
                device_onnx=self._device_onnx(place, precision),
            )
            self._done.add(final)
        return final

    def _device_onnx(self, place: Place, precision: str) -> Path | None:
        """What the kit is made of, where there is one."""
        return self.onnx(graph_of_kit(place.kit, precision), precision) if place.kit else None

    def _sources(self, flavour: Flavour | Graph, precision: str) -> list[Path]:
        """The graphs that another is made from, none where it is lowered from the student."""
        if flavour == "plain":
            wanted = ["fp32", "fp16"] if precision in QUANTISED else [precision]
            return [self.onnx("standard", each) for each in wanted]
        return [self.onnx(flavour, "fp32")] if precision in QUANTISED else []

    def _is_there(self, final: Path, kind: str, parent: str, settings: Mapping[str, Any]) -> bool:
        """Written by this very command, or by an earlier one that asked for the same."""
        if final not in self._done and not self.args.overwrite:
            if can_stay(final, kind, parent, settings):
                self._done.add(final)
        return final in self._done

    def _lower(self, directory: Path, flavour: Flavour, precision: Precision) -> dict[str, Any]:
        """Emit, check and save the graph with everything that a runtime needs beside it."""
        shares = flavour == "ort"
        model = lower(self.student, flavour=flavour, precision=precision, share_inputs=shares)
        counts = check_lowered(model, Plan.load(self.student / "plan.json"))
        save_onnx(model, directory)
        copy_companions(self.student, directory)
        if flavour == "ort":
            write_genai_config(directory)
        return counts.to_json()

    def _profile(self, flavour: Flavour | Graph) -> tuple[int, int]:
        """The longest call and cache of the proof: of TensorRT's profiles, or the usual ones."""
        sizes = self.args if flavour != "ort" else ExportArgs()
        return sizes.max_seq, sizes.max_past

    def _proof(self, flavour: Flavour | Graph) -> dict[str, Any]:
        """What the parity gate was shown: a proof of something else does not count."""
        text = self.text if self.text is not None else TEXT.read_text(encoding="utf-8")
        return {
            "parity_text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "parity_limits": list(self._profile(flavour)),
        }

    @cached_property
    def _reference(self) -> Reference:
        """Opened once for all graphs, which are compared with the same answers."""
        return Reference(self.student)

    def _float_bytes(self) -> int:
        """Most bytes that the student's weights take in float32."""
        return 2 * sum(
            recorded["size_bytes"]
            for name, recorded in self.manifest["files"].items()
            if name.endswith(".safetensors")
        )

    def _seal(self, directory: Path, kind: str, parent: str, measured: dict[str, Any]) -> None:
        seed = int(self.manifest["seed"])
        write_manifest(
            directory, kind=kind, parent=parent, argv=self.argv, seed=seed, measured=measured
        )


def _plain(sources: Sequence[Path], directory: Path, precision: str) -> dict[str, Any]:
    """The standard graph in plain operators, its weights copied or quantised."""
    if precision in QUANTISED:
        figures, source = _quantise(sources, directory, precision), directory
    else:
        source = sources[0]
        figures = dict(read_json(source / MANIFEST)["measured"])
        for path in source.iterdir():
            if path.name != MANIFEST:
                shutil.copyfile(path, directory / path.name)
    return {**figures, "nodes": write_plain(source, directory)}


def _quantise(sources: Sequence[Path], directory: Path, precision: str) -> dict[str, Any]:
    """The float32 graph in integers, put into the second of the sources where there is one."""
    source, *into = sources
    quantised = quantize(source, directory, precision, into=into[0] if into else None)
    counts = read_json(source / MANIFEST)["measured"]
    kept = (
        "dense_matmuls",
        "factored_matmuls",
        "removed",
        "dead",
        "matmul_nodes",
        "macs_per_token",
    )
    return {**{key: counts[key] for key in kept}, **quantised.to_json()}


def _bytes_of(onnx: Path) -> int:
    return sum(path.stat().st_size for path in onnx.glob("model.onnx*"))


def _parity_text(args: ExportArgs) -> str | None:
    if args.parity_text is None:
        return None
    try:
        text = Path(args.parity_text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--parity-text {args.parity_text}: cannot be read ({error}); "
            "needs a UTF-8 text file; name another or leave it out"
        ) from None
    if not text.strip():
        raise UserError(
            f"--parity-text {args.parity_text}: is empty; needs a few pages of text; "
            "name another or leave it out"
        )
    return text
