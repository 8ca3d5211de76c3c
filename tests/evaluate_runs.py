"""Finished run folders of tiny models, as distill leaves them, for tests of evaluate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deploy.ceilings import MeasuredCeilings
from distill.args import DistilArgs, request_json
from distill.artifact import staged, write_json, write_manifest
from distill.modeling_budgeted import FactoredLinear, apply_structure
from distill.plan import Decision, Plan
from distill.student_format import count_macs, dense_macs_from_config, save_student
from distill.teacher import load_teacher
from evaluate.contenders import Contender

TEXT = (
    "The river rises in the hills above the old town and runs south past the mill to the sea. "
    "Every morning a boy walks along the bank with a dog, counting the boats.\n\n"
) * 40


def write_run(
    run: Path,
    teacher_dir: Path,
    *,
    method: str = "budgeted",
    ranks: Mapping[str, int] | None = None,
    fingerprint: str | None = None,
    data: str = "text.txt",
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A run folder whose student has `ranks` (best approximations of the teacher's weights), with
    `noise` added to every weight."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    ranks = dict(ranks or {})
    apply_structure(student, ranks)
    _fill(teacher, student)
    student.to(dtype)
    plan = plan_of(teacher, ranks, method)
    with staged(run / "student") as partial:
        save_student(partial, student, tokenizer, ranks)
        plan.save(partial / "plan.json")
        write_manifest(
            partial, kind="student", parent=None, seed=0,
            argv=["python", "-m", "distill", "--run", str(run)],
            measured=_measured(partial, teacher_dir, teacher, plan, fingerprint),
        )  # fmt: skip
    args = DistilArgs(teacher=str(teacher_dir), data=(data,), seq_len=64, run=str(run))
    write_json(run / "request.json", request_json(args))
    return run


def export_run(run: Path, precision: str = "fp32") -> Path:
    """The engine of a run's student for ONNX Runtime on the CPU."""
    from export.__main__ import main

    assert main(["--run", str(run), "--engine", "ort", "--precision", precision]) == 0
    return run / "engine-ort" / f"{precision}-cpu"


def brief_footprint(contender: Contender, threads: int) -> dict[str, float]:
    """Stands in for a process of its own, which takes seconds."""
    return {
        "load_s": 0.125, "first_answer_s": 0.25, "peak_memory_bytes": 400_000_000,
        "model_memory_bytes": 1_000_000, "prompt_tokens": 256,
    }  # fmt: skip


def brief_ceilings(threads: int) -> dict[str, MeasuredCeilings]:
    return {"cpu": MeasuredCeilings(threads, 2e10, {"fp32": 1e11, "int8": 4e11})}


def all_ranks(teacher_dir: Path, rank: int) -> dict[str, int]:
    """The same rank for every target module."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    return {n: rank for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}


def plan_of(teacher: PreTrainedModel, ranks: Mapping[str, int], method: str) -> Plan:
    decisions = []
    for name, module in teacher.named_modules():
        if not isinstance(module, nn.Linear) or ".layers." not in name:
            continue
        out, into = module.out_features, module.in_features
        rank = ranks.get(name, min(out, into))
        action = "keep" if name not in ranks else "approximate" if rank else "remove"
        macs = out * into if action == "keep" else rank * (out + into)
        decisions.append(Decision(name, action, rank, macs, out, into, "test"))
    dense = sum(d.dense_macs for d in decisions)
    budget = round(sum(d.macs for d in decisions) / dense + 0.005, 2) if ranks else 1.0
    return Plan(budget, method, "spectral", 8, tuple(decisions))


def _fill(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    for name, module in student.named_modules():
        if isinstance(module, FactoredLinear):
            weight = teacher.get_submodule(name).weight.data
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = values[: module.rank].sqrt()
            module.up.weight.data = left[:, : module.rank] * root
            module.down.weight.data = root[:, None] * right[: module.rank]


def _measured(
    directory: Path,
    teacher_dir: Path,
    teacher: PreTrainedModel,
    plan: Plan,
    fingerprint: str | None,
) -> dict[str, object]:
    cost, dense = count_macs(directory), dense_macs_from_config(teacher.config)
    source = load_teacher(str(teacher_dir), dtype=torch.float32)

    def figures(macs: object) -> dict[str, int]:
        names = {"target_macs": "target", "head_macs": "head", "total_macs": "total"}
        return {
            "parameters": getattr(macs, "parameters"),  # noqa: B009
            **{k: getattr(macs, v) for k, v in names.items()},
        }

    return {
        "budget": plan.budget,
        "macs_fraction": cost.target / dense.target,
        "teacher": figures(dense),
        "student": figures(cost),
        "heldout": None,
        "teacher_source": str(teacher_dir),
        "teacher_fingerprint": fingerprint or source.fingerprint,
    }
