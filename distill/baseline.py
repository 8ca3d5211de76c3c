"""The standard-LoRA baseline: PEFT's LoRA on every target module, merged into dense weights."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from distill.teacher import target_modules


def attach_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """LoRA (arXiv 2106.09685) with alpha = 2·rank on all target modules; only adapters train."""
    names = sorted({name.rpartition(".")[2] for name in target_modules(model)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def merge_lora(adapted: PeftModel) -> PreTrainedModel:
    """The plain model with every adapter added to its dense weight."""
    return adapted.merge_and_unload()
