"""Multiply-accumulates (MACs) per token, from stored tensors or from a dense config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from distill.artifact import UserError, read_json
from distill.student_config import plain_config


@dataclass(frozen=True)
class Macs:
    """What one token costs and what is stored.

    ``target``: MACs of the Linears in the decoder blocks; ``head``: MACs of the output head;
    ``embedding_parameters``: entries of the embedding table (a look-up: no MACs);
    ``parameters``: all parameters, a tied head counted once.
    """

    target: int
    head: int
    embedding_parameters: int
    parameters: int

    @property
    def total(self) -> int:
        """MACs per token of target modules and head."""
        return self.target + self.head


def count_macs(directory: Path) -> Macs:
    """What the checkpoint in ``directory`` costs, from its safetensors headers and nothing else.

    Every matrix below ``.layers.`` is a Linear and costs one MAC an entry. Without a stored head
    the embedding serves as head.

    Raises:
        UserError: no checkpoint, a missing or unreadable shard, or a tensor it cannot account for.
    """
    shapes = stored_shapes(directory)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    target = 0
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2:
            target += sizes[name]
        elif len(shape) > 1 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            raise UserError(
                f"{directory} stores {name} of shape {shape}; only matrices in the layers, the "
                "embedding and the head can be counted; pass a student directory"
            )
    embedding = sum(size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    head = sizes.get("lm_head.weight", embedding)
    return Macs(target, head, embedding, sum(sizes.values()))


def dense_macs_from_config(config: PretrainedConfig) -> Macs:
    """What the plain architecture of ``config`` costs: nothing narrowed, factored or removed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain_config(config), trust_remote_code=False)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    target = sum(m.weight.numel() for name, m in linears.items() if ".layers." in name)
    return Macs(
        target=target,
        head=linears["lm_head"].weight.numel(),
        embedding_parameters=model.get_input_embeddings().weight.numel(),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, over every shard that the checkpoint's index names.

    Raises:
        UserError: a file or a tensor of the index is missing, or a file is unreadable.
    """
    index = directory / "model.safetensors.index.json"
    file_of = read_json(index)["weight_map"] if index.exists() else {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(set(file_of.values())) or ["model.safetensors"]:
        try:
            with safe_open(directory / file, framework="pt") as stored:
                for name in stored.keys():
                    shapes[name] = list(stored.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{directory / file} cannot be read ({error}); expected a complete safetensors "
                "checkpoint; distil it again with `python -m distill`"
            ) from error
    if absent := sorted(file_of.keys() - shapes.keys()):
        raise UserError(
            f"{index} names {absent[0]}, which no shard holds; expected a complete safetensors "
            "checkpoint; distil it again with `python -m distill`"
        )
    return shapes
