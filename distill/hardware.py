"""The machine's own matmul rate, measured, and the work a training token costs."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedModel

from distill.artifact import UserError
from distill.attention import CAUSAL_BLOCKS
from distill.plan import Decision, Plan

MATMUL_SIZE = 1536
REPEATS = 5
PLAIN_ATTENTION_TOKENS = 1024


@dataclass(frozen=True)
class Compute:
    """What runs: the device, the compute precision and its measured matmul rate (FLOP/s)."""

    device: torch.device
    dtype: torch.dtype
    matmul_flops_per_s: float


def choose_compute(device: str, dtype: str) -> Compute:
    """Resolve "auto"; raises UserError when the device asked for is not there.

    Precision "auto" is bfloat16 where its matmul is at least 1.3 times as fast as float32's.
    """
    chosen = choose_device(device)
    if dtype != "auto":
        precision = getattr(torch, dtype)
        return Compute(chosen, precision, matmul_rate(chosen, precision))
    single = matmul_rate(chosen, torch.float32)
    half = matmul_rate(chosen, torch.bfloat16)
    if half >= 1.3 * single:
        return Compute(chosen, torch.bfloat16, half)
    return Compute(chosen, torch.float32, single)


def choose_device(device: str) -> torch.device:
    """Resolve "auto"; raises UserError when the device asked for is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is usable here; use --device cpu or auto")
    heed_launcher = parse_flag_from_env("ACCELERATE_USE_CPU")
    found = "cuda" if torch.cuda.is_available() and not heed_launcher else "cpu"
    return torch.device(found if device == "auto" else device)


def choose_attention(model: PreTrainedModel, compute: Compute, seq_len: int) -> None:
    """Blocks of plain matmuls instead of torch's fused kernel where that one is the slower: in
    bfloat16 on a CPU, by a factor of 3 to 4 forward and backward at 512 tokens. They hold their
    scores, T² a head, so longer sequences keep the fused kernel."""
    if compute.device.type == "cpu" and compute.dtype == torch.bfloat16:
        is_causal = not getattr(model.config, "use_bidirectional_attention", False)
        if seq_len <= PLAIN_ATTENTION_TOKENS and is_causal:
            model.set_attn_implementation(CAUSAL_BLOCKS)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul, the best of five: utilisation is quoted against it."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    b = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
    best = float("inf")
    for _ in range(REPEATS):
        _synchronise(device)
        began = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * MATMUL_SIZE**3 / best


@functools.cache
def rate_by_now(compute: Compute) -> float:
    """The matmul rate, measured again and the better of the two: work beside the measurement that
    was taken as the run began would flatter the utilisation."""
    return max(compute.matmul_flops_per_s, matmul_rate(compute.device, compute.dtype))


def training_flops_per_token(
    plan: Plan, model: PreTrainedModel, lora_rank: int, seq_len: int, *, live_teacher: bool
) -> float:
    """Model FLOPs of one training token: matmuls and causal attention, no recomputation.

    A trained matmul counts forward, input gradient and weight gradient; a frozen one the first two;
    the teacher its forward pass (only the head when its outputs come from disk).
    """
    frozen = sum(d.macs for d in plan.decisions if d.action in ("keep", "narrow"))
    trained = sum(_trained_macs(d, lora_rank) for d in plan.decisions)
    head = model.get_output_embeddings().weight.numel()
    attention = _attention_macs(model, seq_len)
    student = 2 * frozen + 3 * trained + 2 * head + 3 * attention
    teacher = head + (plan.dense_macs + attention if live_teacher else 0)
    return 2.0 * (student + teacher)


def _trained_macs(decision: Decision, lora_rank: int) -> int:
    """MACs of a module's factored pair, or of the adapter beside its frozen weight."""
    if decision.action == "remove":
        return 0
    if decision.action == "approximate":
        return decision.macs
    if decision.action == "narrow":
        return lora_rank * (decision.rank + decision.macs // decision.rank)
    return lora_rank * (decision.out_features + decision.in_features)


def _attention_macs(model: PreTrainedModel, seq_len: int) -> float:
    """Scores and values of one token against half the sequence (causal), all layers."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    return config.num_hidden_layers * width * seq_len


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
