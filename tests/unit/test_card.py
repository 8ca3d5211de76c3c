"""The model card: valid front matter, true figures, and snippets that run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.artifact import UserError
from distill.card import write_model_card
from distill.licence import Origin, origin_of
from distill.modeling_budgeted import apply_structure
from distill.student_format import save_student

ROOT = Path(__file__).resolve().parents[2]
RANKS = {"model.layers.0.self_attn.q_proj": 8, "model.layers.1.mlp.down_proj": 0}
WIDTHS = {"model.layers.2.mlp": 40}


def facts(**changes: Any) -> dict[str, Any]:
    """What `distill.finish` passes, for a tiny model of three modules."""
    decisions = [
        {"module": "model.layers.0.self_attn.q_proj", "action": "approximate", "macs": 1024},
        {"module": "model.layers.0.self_attn.v_proj", "action": "keep", "macs": 2048},
        {"module": "model.layers.1.mlp.down_proj", "action": "remove", "macs": 0},
    ]
    macs = {
        "parameters": 134_515_008,
        "target_macs": 14336,
        "head_macs": 24576,
        "total_macs": 38912,
    }
    made: dict[str, Any] = {
        "plan": {
            "budget": 0.25, "method": "budgeted", "allocation": "spectral", "rank_multiple": 8,
            "dense_macs": 14336, "macs": 3072, "decisions": decisions,
        },
        "args": {
            "teacher": "smollm2-135m", "student": None, "revision": None, "data": ("self",),
            "tokens": 81920, "seq_len": 512, "fewshot_share": 0.5, "optimizer": "muon",
            "learning_rate": 1e-3, "seed": 0,
        },
        "measured": {
            "teacher": macs,
            "student": {**macs, "parameters": 61_000_000, "target_macs": 3072},
            "heldout": {
                "teacher_perplexity": 35.2, "student_perplexity": 88.0, "kl": 0.912, "tokens": 8176
            },
            "training": {"tokens": 81920}, "seconds": 812.3, "peak_memory_bytes": 6 * 2**30,
        },
    }  # fmt: skip
    for path, value in changes.items():
        section, _, key = path.partition("__")
        made[section] = {**made[section], key: value}
    return made


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A directory with only the config.json of a budgeted student."""
    config = {"architectures": ["BudgetedLlamaForCausalLM"], "ranks": RANKS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def card_text(directory: Path, **changes: Any) -> str:
    write_model_card(directory, facts(**changes))
    return (directory / "README.md").read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_front_matter_is_what_the_hub_expects(bare: Path) -> None:
    data = ModelCard(card_text(bare)).data
    assert data.license == "apache-2.0"
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"budgeted-lora", "low-rank", "custom_code"} <= set(data.tags or [])


def test_the_figures_are_those_measured(bare: Path) -> None:
    text = card_text(bare)
    for expected in (
        "# smollm2-135m, distilled at budget F = 0.25",
        "**21.43%**",
        "| keep | one dense matrix | 1 |",
        "| approximate | two factors of low rank | 1 |",
        "| remove | nothing but its bias | 1 |",
        "| parameters | 134,515,008 | 61,000,000 | 0.453 |",
        "| MACs per token, target modules | 14,336 | 3,072 | 0.214 |",
        "| perplexity, held-out text | 35.2 | 88 | 2.500 |",
        "| KL to the teacher, nats per token | 0 | 0.912 |  |",
        "8,176 predicted tokens",
        "- training text: written by the teacher itself",
        "- time, all stages: 13m 32s",
        "- peak memory: 6.0 GiB",
        "Perplexity alone hides the loss of behaviour",
    ):
        assert expected in text


def test_narrow_modules_are_counted_by_themselves(bare: Path) -> None:
    mlp = [
        {"action": "narrow", "macs": 512, "module": f"model.layers.0.mlp.{leaf}_proj"}
        for leaf in ("gate", "up", "down")
    ]
    text = card_text(bare, plan__decisions=[*facts()["plan"]["decisions"], *mlp])
    assert "| narrow | one dense matrix of some of its MLP's neurons | 3 |" in text
    assert "| approximate | two factors of low rank | 1 |" in text
    assert "| narrow | one dense matrix of some of its MLP's neurons | 0 |" in card_text(bare)


@pytest.mark.parametrize("field", ["ranks", "widths"])
def test_a_student_of_either_kind_needs_its_own_code(field: str, tmp_path: Path) -> None:
    config = {"architectures": ["BudgetedLlamaForCausalLM"], "ranks": {}, "widths": {}}
    for parts, is_plain in (({"model.layers.0.mlp": 8}, False), ({}, True)):
        (tmp_path / "config.json").write_text(json.dumps({**config, field: parts}))
        text = card_text(tmp_path)
        assert ("custom_code" in (ModelCard(text).data.tags or [])) != is_plain
        assert ("trust_remote_code" in text) != is_plain


@pytest.mark.parametrize(
    ("field", "size", "is_low_rank"),
    [("ranks", 8, True), ("ranks", 0, False), ("widths", 8, False)],
)
def test_only_a_student_with_factors_is_called_low_rank(
    field: str, size: int, is_low_rank: bool, bare: Path
) -> None:
    config = {"architectures": ["BudgetedLlamaForCausalLM"], field: {"model.layers.0.mlp": size}}
    (bare / "config.json").write_text(json.dumps(config))
    tags = ModelCard(card_text(bare)).data.tags or []
    assert ("low-rank" in tags) == is_low_rank and "custom_code" in tags


def test_what_was_not_measured_is_not_claimed(bare: Path) -> None:
    text = card_text(bare, measured__heldout=None)
    assert "Perplexity was not measured." in text
    assert "| perplexity" not in text
    assert "| KL" not in text
    write_model_card(bare, {"plan": facts()["plan"], "args": {"teacher": "smollm2-135m"}})
    assert "None" not in (bare / "README.md").read_text(encoding="utf-8")


def test_local_paths_stay_private_and_other_teachers_are_named(bare: Path) -> None:
    text = card_text(
        bare,
        args__teacher="someone/Big-1B",
        args__student="/home/me/secret/my-llama",
        args__data=("/home/me/secret/notes.txt", "hub:wikitext:wikitext-2-v1"),
    )
    assert "secret" not in text
    assert "my-llama" in text and "taught by someone/Big-1B" in text
    assert "notes.txt, hub:wikitext:wikitext-2-v1" in text
    assert "find out its terms" in text
    assert ModelCard(text).data.license == "unknown"
    assert ModelCard(text).data.base_model is None


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        write_model_card(tmp_path, facts())
    assert list(tmp_path.iterdir()) == []


def test_origins(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert origin_of(str(model)) == Origin()
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.y/z\nbase_model: a/b\n"
        "---\n# Model\n"
    )
    assert origin_of(str(model)) == Origin(None, "other", "mine", "https://x.y/z")
    (model / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert origin_of(str(model)) == Origin()
    assert origin_of("someone/not-in-the-cache") == Origin("someone/not-in-the-cache")
    assert origin_of(str(tmp_path / "missing")) == Origin()


def test_the_licence_of_a_gguf_comes_from_its_header(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert origin_of(str(file)) == Origin(None, "mit")
    file.write_bytes(file.read_bytes()[:40])
    assert origin_of(str(file)) == Origin()


@pytest.fixture
def student(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[tuple[Path, PreTrainedModel]]:
    """A tiny student with its card, at "path/to/student" below `tmp_path`."""
    model = tiny_model("llama")
    apply_structure(model, RANKS, WIDTHS)
    directory = tmp_path / "path" / "to" / "student"
    save_student(directory, model, tiny_tokenizer, RANKS, WIDTHS)
    write_model_card(directory, facts())
    yield directory, model.eval()


def run_snippet(source: str, cwd: Path, with_package: bool) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own; prints the logits of four tokens when there is a model."""
    report = (
        "\nif 'model' in dir():\n    import torch\n    with torch.no_grad():\n"
        "        print(model(input_ids=torch.tensor([[5, 9, 33, 70]])).logits.sum().item())\n"
        "    print(len(tokenizer))\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
        "PYTHONPATH": str(ROOT) if with_package else "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", source + report],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five fresh interpreters
def test_every_loading_snippet_runs(student: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    directory, model = student
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 9, 33, 70]])).logits.sum().item()
    sources = snippets((directory / "README.md").read_text(encoding="utf-8"))
    assert len(sources) == 4
    for number, source in enumerate(sources):
        done = run_snippet(source, tmp_path, with_package="distill" in source)
        assert done.returncode == 0, done.stderr
        if "model =" in source:
            assert len(done.stdout.split()) == 2, f"asked the user: {done.stdout}"
            logits, size = done.stdout.split()
            assert float(logits) == pytest.approx(expected, abs=1e-3), number
            assert int(size) == 384
    untrusting = sources[1].replace(", trust_remote_code=True", "")
    assert run_snippet(untrusting, tmp_path, with_package=False).returncode != 0


def test_a_plain_student_needs_one_snippet_and_no_code(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "path" / "to" / "student"
    save_student(directory, tiny_model("llama"), tiny_tokenizer, {})
    text = card_text(directory, plan__method="lora", plan__budget=1.0)
    sources = snippets(text)
    assert len(sources) == 1
    assert "trust_remote_code" not in text
    assert "custom_code" not in (ModelCard(text).data.tags or [])
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(sources[0], namespace)
    assert type(namespace["model"]).__name__ == "LlamaForCausalLM"
