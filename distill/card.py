"""The model card (README.md) of a student: what it is, what it lost, and how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from distill.artifact import atomic_write_text, read_json
from distill.licence import Origin, origin_of
from distill.units import duration, number

PLAIN_SNIPPET = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = "path/to/student"  # this directory
tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
```
"""
BUDGETED_SNIPPETS = """\
With this toolkit installed, importing one module registers the student's class:

```python
import distill.modeling_budgeted  # registers the student's class with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

student = "path/to/student"  # this directory
tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForCausalLM.from_pretrained(student, dtype="auto")
```

Without it, transformers runs `modeling_budgeted.py` from this directory. Read that file first;
`trust_remote_code=True` says that you trust it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

student = "path/to/student"  # this directory
tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(student, dtype="auto", trust_remote_code=True)
```

Harnesses, converters and servers that know only the plain architecture take a **dense copy**: the
same function in the base model's own architecture. It saves no compute. `--dense-copy` writes it
beside the student, and so does, at any later time:

```python
from pathlib import Path

from transformers import AutoTokenizer

from distill.student_format import load_student, save_dense_copy

student = Path("path/to/student")  # this directory
dense = student.with_name("student-dense")
save_dense_copy(dense, load_student(student), AutoTokenizer.from_pretrained(student))
```

It loads like any model:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

dense = "path/to/student-dense"
tokenizer = AutoTokenizer.from_pretrained(dense)
model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
```
"""
METHOD_NAMES = {
    "budgeted": "Budgeted LoRA (arXiv 2605.04341, as implemented by this toolkit)",
    "lora": "standard LoRA distillation, merged",
    "svd": "input-whitened SVD of uniform rank, then distillation",
}
STORED_AS = {
    "keep": "one dense matrix",
    "narrow": "one dense matrix of some of its MLP's neurons",
    "approximate": "two factors of low rank",
    "remove": "nothing but its bias",
}
LIMITATIONS = (
    "Perplexity alone hides the loss of behaviour. A student of SmolLM2-135M-Instruct at half the "
    "MACs of its target modules, with --mlp pair, that learned from plain text alone reached 1.83 "
    "times its teacher's perplexity and a 10-shot accuracy of 0.06 where the teacher has 0.52 "
    "(this toolkit's docs/distil.md, row text-only-f50). The figures above say nothing about "
    "few-shot use, instructions, facts, code or other languages: run `python -m evaluate`, and "
    "your own task, before relying on this student.",
    "The training text, together with synthetic few-shot lists, decides what survived. What it did "
    "not contain has probably suffered more than the figures show.",
    "MACs are not time. What a smaller count gains depends on the runtime, the machine, the batch "
    "and the sequence length; the output head and attention itself are not compressed.",
    "Whatever the base model gets wrong, biases and unsafe answers included, the student inherits. "
    "Its refusals and safety training were not tested after compression.",
)


def write_model_card(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md into a student directory, whose config.json must be there already.

    Args:
        facts: `plan`, a plan.json as a dict;
            `args`, the run's arguments by name; read are teacher, student (None: the teacher),
            revision, data, tokens, seq_len, fewshot_share, optimizer, learning_rate, seed;
            `measured`, the manifest's figures; read are teacher and student (each with
            parameters, target_macs, head_macs, total_macs), heldout (teacher_perplexity,
            student_perplexity, kl in nats per token, tokens; None: not measured), training
            (tokens), seconds and peak_memory_bytes. An argument or figure that is absent is left
            out of the card.

    Raises: KeyError without plan, args or args["teacher"]; UserError without config.json.
    """
    plan, args, measured = facts["plan"], facts["args"], facts.get("measured", {})
    base = args.get("student") or args["teacher"]
    origin = origin_of(base, args.get("revision") if base == args["teacher"] else None)
    config = read_json(directory / "config.json")
    ranks, widths = (config.get(field) or {} for field in ("ranks", "widths"))
    is_plain = not (ranks or widths)
    sections = [
        f"---\n{_front_matter(origin, is_plain, any(ranks.values()))}\n---",
        _introduction(plan, args, origin, config),
        "## Measured\n\n" + _measured(measured),
        "## Load it\n\n" + (PLAIN_SNIPPET if is_plain else BUDGETED_SNIPPETS).rstrip(),
        "## How it was made\n\n" + _training(plan, args, measured),
        "## Limitations\n\n" + "\n".join(f"- {text}" for text in LIMITATIONS),
        "## Licence\n\n" + _licence(origin, base),
    ]
    atomic_write_text(directory / "README.md", "\n\n".join(sections) + "\n")


def _front_matter(origin: Origin, is_plain: bool, is_low_rank: bool) -> str:
    tags = ["distillation", "budgeted-lora"]
    tags += ["low-rank"] if is_low_rank else []
    tags += [] if is_plain else ["custom_code"]
    data = ModelCardData(
        base_model=origin.hub_id,
        license=origin.licence or "unknown",
        license_name=origin.licence_name,
        license_link=origin.licence_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return data.to_yaml()


def _introduction(
    plan: Mapping[str, Any],
    args: Mapping[str, Any],
    origin: Origin,
    config: Mapping[str, Any],
) -> str:
    base, teacher = args.get("student") or args["teacher"], args["teacher"]
    name = _name(base)
    architecture = (config.get("architectures") or ["causal LM"])[0]
    counts = Counter(d["action"] for d in plan["decisions"])
    rows = [[action, stored, counts[action]] for action, stored in STORED_AS.items()]
    share = plan["macs"] / plan["dense_macs"]
    hub = f" ([{origin.hub_id}](https://huggingface.co/{origin.hub_id}))" if origin.hub_id else ""
    taught = "" if teacher == base else f", taught by {_name(teacher)}"
    return (
        f"# {name}, distilled at budget F = {plan['budget']:g}\n\n"
        f"A student of {name}{hub}{taught}, made by {METHOD_NAMES[plan['method']]}. "
        f"Per token, the linear layers of its decoder blocks (the target modules) take "
        f"**{share:.2%}** of the multiply-accumulates (MACs) of the dense original: "
        f"{number(plan['macs'])} of {number(plan['dense_macs'])}. Embedding, attention itself and "
        f"output head are not compressed. Architecture: `{architecture}`.\n\n"
        f"{_table(['what became of a module', 'stored as', 'modules'], rows)}\n\n"
        f"`plan.json` names every module's decision, and its rank or neurons."
    )


def _measured(measured: Mapping[str, Any]) -> str:
    """Teacher against student; then on what the figures were taken."""
    teacher, student = measured.get("teacher", {}), measured.get("student", {})
    heldout = measured.get("heldout") or {}
    pairs = [
        (label, teacher.get(key), student.get(key))
        for label, key in (
            ("parameters", "parameters"),
            ("MACs per token, target modules", "target_macs"),
            ("MACs per token, output head", "head_macs"),
            ("MACs per token, both", "total_macs"),
        )
    ]
    teacher_perplexity, student_perplexity = (
        heldout.get(f"{side}_perplexity") for side in ("teacher", "student")
    )
    pairs += [("perplexity, held-out text", teacher_perplexity, student_perplexity)]
    pairs += [
        ("KL to the teacher, nats per token", 0 if "kl" in heldout else None, heldout.get("kl"))
    ]
    rows = [[*pair, _ratio(*pair[1:])] for pair in pairs if pair[2] is not None]
    note = (
        f"Perplexity and KL: {number(heldout['tokens'])} predicted tokens of documents held out "
        "from the training text named below; teacher and student read the same windows."
        if "tokens" in heldout
        else "Perplexity was not measured."
    )
    return f"{_table(['', 'teacher', 'student', 'student ÷ teacher'], rows)}\n\n{note}"


def _training(plan: Mapping[str, Any], args: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    data = args.get("data")
    if isinstance(data, Sequence) and not isinstance(data, str):
        data = ", ".join("written by the teacher itself" if d == "self" else _name(d) for d in data)
    share, memory = args.get("fewshot_share"), measured.get("peak_memory_bytes")
    seconds = measured.get("seconds")
    facts = [
        ("training text", data),
        ("share of synthetic few-shot sequences", None if share is None else f"{share:.0%}"),
        ("training tokens", measured.get("training", {}).get("tokens", args.get("tokens"))),
        ("tokens per sequence", args.get("seq_len")),
        ("choice of ranks, neurons, keeps and removals", plan.get("allocation")),
        ("ranks and numbers of neurons are multiples of", plan.get("rank_multiple")),
        ("optimiser", args.get("optimizer")),
        ("peak learning rate", args.get("learning_rate")),
        ("seed", args.get("seed")),
        ("time, all stages", None if seconds is None else duration(seconds)),
        ("peak memory", None if memory is None else f"{memory / 2**30:.1f} GiB"),
    ]
    listed = "\n".join(f"- {key}: {number(value)}" for key, value in facts if value is not None)
    return f"{listed}\n\n`manifest.json` holds the exact command, library versions and file hashes."


def _licence(origin: Origin, base: str) -> str:
    if origin.licence is None:
        return (
            f"{_name(base)} states no licence that could be read. The student's weights derive "
            "from it: find out its terms before you pass them on."
        )
    link = f" ({origin.licence_link})" if origin.licence_link else ""
    return (
        f"The weights derive from {_name(base)} and stay under its licence: "
        f"{origin.licence_name or origin.licence}{link}."
    )


def _ratio(teacher: float | None, student: float | None) -> str:
    return f"{student / teacher:.3f}" if teacher and student is not None else ""


def _name(source: str) -> str:
    """A hub id or built-in name as it is; of a local path only its last part."""
    path = Path(source).expanduser()
    is_local = path.is_absolute() or path.exists() or source.startswith((".", "~"))
    return path.name or source if is_local else source


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    cells = [[number(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
