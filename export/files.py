"""What lies beside a graph so that other tools run it: tokenizer, configs, plan, genai_config.json.

config.json is that of the plain architecture: optimum, tokenizers and onnxruntime-genai know
nothing of budgets. Ranks and widths stay in plan.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distill.artifact import MANIFEST, UserError, read_json, write_json

CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "plan.json",
)
REQUIRED = ("tokenizer.json", "tokenizer_config.json", "plan.json")
OURS = (
    "ranks",
    "widths",
    "auto_map",
    "base_model_type",
    "_model_name_or_path",
    "_name_or_path",
)
MODEL = "model.onnx"
GENAI_CONFIG = "genai_config.json"
SEARCHED = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "num_beams")


def copy_companions(student_directory: Path, directory: Path) -> None:
    """Copy tokenizer, chat template, generation config and plan; write config.json, student.json.

    Raises: UserError when the student lacks a file that every reader needs.
    """
    student, directory = Path(student_directory), Path(directory)
    for name in CARRIED:
        if (student / name).is_file():
            shutil.copyfile(student / name, directory / name)
        elif name in REQUIRED:
            raise UserError(
                f"{student / name} is missing; needs a complete student; write it again with: "
                "python -m distill --budget F"
            )
    _name_tokenizer_outputs(directory / "tokenizer_config.json")
    write_json(directory / "config.json", plain_values(student))
    manifest = student / MANIFEST
    if manifest.is_file():
        write_json(directory / "student.json", read_json(manifest)["measured"])


def plain_values(student_directory: Path) -> dict[str, Any]:
    """config.json of the plain architecture of a student, RoPE's keys at top level too."""
    from distill.modeling_budgeted import MODEL_CLASSES
    from distill.student_config import readable_config, supported_family

    values = read_json(Path(student_directory) / "config.json")
    family = supported_family(values.get("base_model_type", values.get("model_type")))
    values = {key: value for key, value in values.items() if key not in OURS}
    plain_class = MODEL_CLASSES[family].__mro__[1].__name__
    return readable_config({**values, "model_type": family, "architectures": [plain_class]})


def _name_tokenizer_outputs(path: Path) -> None:
    """Say what the tokenizer returns: unless told, transformers 4 adds token_type_ids, which no
    model of these families takes."""
    values = read_json(path)
    if "model_input_names" not in values:
        write_json(path, {**values, "model_input_names": ["input_ids", "attention_mask"]})


def write_genai_config(directory: Path) -> None:
    """Describe the graph in `directory` to onnxruntime-genai (0.18), from its config.json.

    past_present_share_buffer is false: the graph's cache grows by concatenation.
    """
    config = read_json(directory / "config.json")
    generation_file = directory / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    heads = config["num_attention_heads"]
    ids = {
        key: generation.get(key, config.get(key))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    first_eos = ids["eos_token_id"]
    first_eos = first_eos[0] if isinstance(first_eos, list) else first_eos
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = first_eos
    model = {
        **{key: value for key, value in ids.items() if value is not None},
        "context_length": config["max_position_embeddings"],
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL,
            "head_size": config.get("head_dim") or config["hidden_size"] // heads,
            "hidden_size": config["hidden_size"],
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "num_attention_heads": heads,
            "num_hidden_layers": config["num_hidden_layers"],
            "num_key_value_heads": config["num_key_value_heads"],
        },
        "type": config["model_type"],
        "vocab_size": config["vocab_size"],
    }
    search = {
        "max_length": config["max_position_embeddings"],
        "min_length": 0,
        **{key: generation[key] for key in SEARCHED if generation.get(key) is not None},
        "past_present_share_buffer": False,
    }
    write_json(directory / GENAI_CONFIG, {"model": model, "search": search})
