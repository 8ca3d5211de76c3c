"""What is compared: every artefact of the runs, each with what is known of it before it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.artifact import UserError, open_artifact, read_json, sha256_file
from distill.plan import Plan
from distill.runs import find_run

MODEL_FILES = ("model.safetensors", "model-*.safetensors", "model.onnx*", "*.engine", "*.gguf")
PRECISION_ORDER = ("fp32", "bf16", "fp16", "int8", "int4")
GROUP_NAMES = {
    "dense": "dense original",
    "lora": "standard LoRA",
    "budgeted": "budgeted",
    "svd": "whitened SVD",
    "peer": "outside yardstick",
}
ENGINE_NAMES = {
    "pytorch": "PyTorch",
    "ort": "ONNX Runtime",
    "trt": "TensorRT",
    "llama.cpp": "llama.cpp",
}


@dataclass(frozen=True)
class Contender:
    """One thing to measure. ``macs`` of a token: target modules and head.

    ``directory`` is None for an outside runtime, which loads ``source``.
    """

    id: str
    group: str
    run: str
    engine: str
    precision: str
    provider: str
    directory: Path | None
    source: str
    target_macs: int
    head_macs: int
    budget: float
    macs_fraction: float
    plan: Plan | None

    @property
    def label(self) -> str:
        """For example "budgeted F = 0.25 · ONNX Runtime int4"."""
        where = "" if self.provider in ("cpu", "") else f" ({self.provider})"
        return f"{self.group_label} · {ENGINE_NAMES[self.engine]} {self.precision}{where}"

    @property
    def group_label(self) -> str:
        """For example "budgeted F = 0.25"."""
        budget = f" F = {self.budget:g}" if self.group in ("budgeted", "svd") else ""
        return f"{GROUP_NAMES[self.group]}{budget}"

    @property
    def model_bytes(self) -> int | None:
        """Bytes of graph and weights on disk."""
        if self.directory is not None:
            return model_bytes(self.directory)
        path = Path(self.source)
        return path.stat().st_size if path.is_file() else None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "label": self.label,
            "group_label": self.group_label,
            "group": self.group,
            "run": self.run,
            "engine": self.engine,
            "precision": self.precision,
            "provider": self.provider,
            "directory": None if self.directory is None else str(self.directory),
            "budget": self.budget,
            "macs_fraction": self.macs_fraction,
            "target_macs_per_token": self.target_macs,
            "head_macs_per_token": self.head_macs,
            "model_bytes": self.model_bytes,
        }


@dataclass(frozen=True)
class Failure:
    """A contender that could not be measured, or not in one stage."""

    id: str
    stage: str
    message: str

    def to_json(self) -> dict[str, str]:
        return {"id": self.id, "stage": self.stage, "message": self.message}


@dataclass(frozen=True)
class Lineup:
    """All contenders of a comparison and the teacher that they share."""

    contenders: tuple[Contender, ...]
    failures: tuple[Failure, ...]
    runs: tuple[Path, ...]
    teacher_source: str
    teacher_fingerprint: str
    parents: tuple[str, ...]


def find_contenders(names: Sequence[str]) -> Lineup:
    """Every finished artefact of the named runs (none named: the newest run).

    An artefact that is damaged becomes a failure. Of each precision, an engine replaces the ONNX
    directory it was made from, and the ORT flavour the standard one.

    Raises: UserError when a run has no finished student, or when the runs' students cannot be
        compared: different teachers, tokenizers or vocabularies.
    """
    runs = [find_run(name) for name in names] if names else [find_run(None)]
    runs = list(dict.fromkeys(runs))
    labels = _run_labels(runs)
    contenders: list[Contender] = []
    failures: list[Failure] = []
    manifests = []
    for run in runs:
        manifests.append(open_artifact(run / "student", "student"))
        for kind, directory in _artefacts(run):
            try:
                contenders.append(_contender(labels[run], kind, directory))
            except (UserError, KeyError, TypeError) as error:
                place = directory.relative_to(run).as_posix()
                failures.append(Failure(f"{labels[run]}/{place}", "open", _line(error)))
    _require_comparable(runs, manifests)
    measured = manifests[0]["measured"]
    return Lineup(
        tuple(contenders),
        tuple(failures),
        tuple(runs),
        measured["teacher_source"],
        measured["teacher_fingerprint"],
        tuple(sha256_file(run / "student" / "manifest.json") for run in runs),
    )


def model_bytes(directory: Path) -> int:
    """Bytes of graph and weights on disk; tokenizer, pictures and manifest do not count."""
    files = {path for pattern in MODEL_FILES for path in directory.glob(pattern)}
    return sum(path.stat().st_size for path in files)


def _run_labels(runs: Sequence[Path]) -> dict[Path, str]:
    """Folder names, with the parent's in front where two are alike."""
    names = [run.resolve().name for run in runs]
    return {
        run: name if names.count(name) == 1 else f"{run.resolve().parent.name}-{name}"
        for run, name in zip(runs, names, strict=True)
    }


def _artefacts(run: Path) -> Iterator[tuple[str, Path]]:
    yield "student", run / "student"
    have: set[str] = set()
    for kind, pattern in (("engine-ort", "*"), ("onnx", "ort-*"), ("onnx", "standard-*")):
        for directory in sorted((run / kind).glob(pattern), key=_by_precision):
            precision = _precision(kind, directory)
            if not (directory / "manifest.json").is_file() or directory.name.startswith("."):
                continue
            if kind == "onnx" and precision in have:
                continue
            have.add(precision)
            yield kind, directory
    for directory in sorted((run / "engine-trt").glob("[!.]*")):
        if (directory / "manifest.json").is_file():
            yield "engine-trt", directory


def _by_precision(directory: Path) -> tuple[int, str]:
    words = directory.name.split("-")
    return next((i for i, p in enumerate(PRECISION_ORDER) if p in words), 9), directory.name


def _precision(kind: str, directory: Path) -> str:
    """engine-ort/PRECISION-PROVIDER, onnx/FLAVOUR-PRECISION, engine-trt/PRECISION."""
    first, _, last = directory.name.partition("-")
    return last if kind == "onnx" else first


def _contender(run: str, kind: str, directory: Path) -> Contender:
    manifest = open_artifact(directory, kind)
    measured = manifest["measured"]
    if kind != "student":
        own = directory / "student.json"
        student = directory.parents[1] / "student" / "manifest.json"
        measured = read_json(own) if own.is_file() else read_json(student)["measured"]
    plan = Plan.load(directory / "plan.json")
    fraction = measured["student"]["target_macs"] / plan.dense_macs
    if kind == "student":
        engine, precision, provider, name = "pytorch", "fp32", "cpu", "pytorch-fp32"
    else:
        engine = "trt" if kind == "engine-trt" else "ort"
        precision = _precision(kind, directory)
        provider = directory.name.partition("-")[2] if kind == "engine-ort" else "cpu"
        provider = "cuda" if kind == "engine-trt" else provider
        name = directory.relative_to(directory.parents[1]).as_posix().replace("/", "-")
    return Contender(
        id=f"{run}/{name}",
        group=_group(plan, fraction),
        run=run,
        engine=engine,
        precision=precision,
        provider=provider,
        directory=directory,
        source=str(directory),
        target_macs=measured["student"]["target_macs"],
        head_macs=measured["student"]["head_macs"],
        budget=plan.budget,
        macs_fraction=fraction,
        plan=plan,
    )


def _group(plan: Plan, fraction: float) -> str:
    if plan.method in ("lora", "svd"):
        return plan.method
    return "dense" if fraction >= 1 else "budgeted"


def _require_comparable(runs: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """One teacher, one vocabulary, one tokenizer; raises UserError naming the first difference."""
    first, first_run = manifests[0], runs[0]
    for run, manifest in zip(runs[1:], manifests[1:], strict=True):
        a, b = first["measured"], manifest["measured"]
        if a["teacher_fingerprint"] != b["teacher_fingerprint"]:
            raise UserError(
                f"{first_run} was distilled from {a['teacher_source']} "
                f"({a['teacher_fingerprint'][:12]}), {run} from {b['teacher_source']} "
                f"({b['teacher_fingerprint'][:12]}); one comparison needs one teacher; "
                "evaluate them apart"
            )
        sizes = [
            read_json(r / "student" / "config.json").get("vocab_size") for r in (first_run, run)
        ]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{first_run} has a vocabulary of {sizes[0]}, {run} of {sizes[1]}; one comparison "
                "needs one vocabulary; evaluate them apart"
            )
        digests = [_tokenizer_digest(m) for m in (first, manifest)]
        if digests[0] != digests[1]:
            raise UserError(
                f"{first_run} and {run} have different tokenizers (tokenizer.json "
                f"{digests[0][:12]} and {digests[1][:12]}); perplexity per token and probes need "
                "the same one; evaluate them apart"
            )


def _tokenizer_digest(manifest: dict[str, Any]) -> str:
    files = manifest["files"]
    name = next((n for n in ("tokenizer.json", "tokenizer.model") if n in files), None)
    return str(files[name]["sha256"]) if name else "none"


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
