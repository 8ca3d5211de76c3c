"""Shared fixtures: tiny random models of every family, a tiny real tokenizer, and the shared data.

The tiny models are built to notice mistakes: norms and biases are random rather than one and zero,
heads are grouped, and the sliding windows are shorter than a test's sequence.
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, on import

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

VOCABULARY = 384
HIDDEN = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2_SPLIT = (  # transformers 5 uses it for every qwen2 directory, whatever tokenizer.json says
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINING_TEXT = """\
The river rises in the hills above the old town and runs south past the mill to the sea.
In the spring the farmers open the gates, and the water covers the low fields for a week.
Every morning a boy walks along the bank with a dog, counting the boats that pass the bridge.
One boat carries stone, another carries wood, and the third is always empty when it returns.
The price of bread was set by the council, which met on the first Monday of every month.
When the winter was hard the council gave flour away, and nobody in the town went hungry.
A teacher wrote down what the people said, and her notes are the best record that we have.
She wrote that the mill had two wheels, that it worked at night, and that it burned in 1874.
Q: hot\nA: cold\n\nQ: big\nA: small\n\nfirst -> last\nopen -> closed\n12 + 3 = 15\n"""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "sliding_window": 24},
    "qwen2": {"tie_word_embeddings": False, "vocab_size": VOCABULARY + 16},
    "qwen3": {"tie_word_embeddings": True, "attention_bias": False},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "real: uses the real SmolLM2-135M from the user's cache")


@pytest.fixture(autouse=True)
def _surroundings(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One torch thread for tiny models, all for real ones, which alone may use the user's cache."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    real = request.node.get_closest_marker("real") is not None
    wanted = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    torch.set_num_threads(int(wanted) if real else 1)
    torch.manual_seed(0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if not real:
        monkeypatch.setenv("BUDGETED_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The texts shared between sessions; tests that read them skip where they are absent."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not here: this test reads the shared WikiText file")
    return directory


@pytest.fixture(scope="session", params=sorted(_OWN))
def family(request: pytest.FixtureRequest) -> str:
    """Every supported model_type in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens: pad 0 `<|endoftext|>`, bos 1, eos 2, a ChatML template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TRAINING_TEXT.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=specials[0],
        bos_token=specials[1],
        eos_token=specials[2],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Configuration of one tiny model: 3 layers, hidden 64, 4 heads over 2 key/value heads."""
    return AutoConfig.for_model(family, **{**_COMMON, **_OWN[family], **overrides})


def build_tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Random fp32 model in eval mode; norms and biases are random too, so losing one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    assert any(isinstance(module, nn.Linear) for module in model.modules())
    return model.float().eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("qwen3", seed=0, tie_word_embeddings=False, ...)`: a fresh model every call."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[..., Path]]:
    """`tiny_dir("llama", **config overrides)`: saved once, for reading only."""
    saved: dict[str, Path] = {}

    def directory_of(family: str, seed: int = 0, **overrides: Any) -> Path:
        key = repr((family, seed, sorted(overrides.items())))
        if key not in saved:
            directory = tmp_path_factory.mktemp(f"tiny-{family}")
            build_tiny_model(family, seed, **overrides).save_pretrained(directory)
            tiny_tokenizer.save_pretrained(directory)
            saved[key] = directory
        return saved[key]

    yield directory_of
