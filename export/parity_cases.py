"""What the parity gate asks of a graph: sequences of calls over rows of real text.

Every case is built so that the right answer for row b at position p depends on the first p + 1
tokens of that row alone, whatever stands around them: padding, other rows, or how the tokens were
split over calls. So one plain pass of the PyTorch student over the bare row says what is right.

Shapes: B batch, S new tokens, P cached tokens, T = P + S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 256
DECODE_PROMPT, DECODE_STEPS = 32, 64
PADDED_LENGTHS = (40, 23, 7)
PADDED_STEPS = 3
SPLIT_LENGTH = 48


@dataclass(frozen=True)
class Call:
    """One step of a graph. `keep`: how many last positions get logits; None: all of them."""

    input_ids_BS: np.ndarray
    attention_mask_BT: np.ndarray
    position_ids_BS: np.ndarray
    keep: int | None = None

    @property
    def real_BS(self) -> np.ndarray:
        """True where a new token is no padding."""
        return self.attention_mask_BT[:, -self.input_ids_BS.shape[1] :] == 1


@dataclass(frozen=True)
class Case:
    """Calls that follow one another on one cache. `rows`: the bare tokens of every row; an empty
    row is padding throughout and only has to stay finite. `route`: also compare with the graph's
    own plain prefill of each row."""

    name: str
    rows: tuple[np.ndarray, ...]
    calls: tuple[Call, ...]
    route: bool = True


def text_windows(ids_N: np.ndarray, limit: int) -> list[np.ndarray]:
    """Up to `limit` consecutive windows of 256 tokens; a shorter text makes one window."""
    starts = range(0, max(1, len(ids_N) - WINDOW + 1), WINDOW)
    return [ids_N[start : start + WINDOW] for start in starts][:limit]


def prefill_case(name: str, row_T: np.ndarray, keep: int | None = None) -> Case:
    return Case(name, (row_T,), _calls([row_T], [len(row_T)], keep))


def routes(ids_N: np.ndarray, greedy_T: np.ndarray, sliding_window: int | None) -> list[Case]:
    """Every way of reaching the same positions that a runtime may take.

    Args:
        greedy_T: a prompt of DECODE_PROMPT tokens and what the student says next, greedily.
        sliding_window: the shortest window of the model's attention, if it has one.
    """
    row_T = _text(ids_N, SPLIT_LENGTH)
    half = SPLIT_LENGTH // 2
    prompt = len(greedy_T) - DECODE_STEPS
    cases = [
        Case("decode", (greedy_T,), _calls([greedy_T], [prompt, *[1] * DECODE_STEPS], 1)),
        Case("past of one token", (row_T,), _calls([row_T], [1, SPLIT_LENGTH - 1])),
        Case("prefill in two parts", (row_T,), _calls([row_T], [half, SPLIT_LENGTH - half])),
        prefill_case("logits of the last position", row_T, 1),
        _padded(ids_N, PADDED_LENGTHS),
        _padded(ids_N, (PADDED_LENGTHS[1], 0)),
    ]
    if sliding_window is None or sliding_window >= SPLIT_LENGTH:
        cases.append(_holes(row_T))
    return cases


def profile_end(ids_N: np.ndarray, max_seq: int, max_past: int) -> Case:
    """The longest call after the longest cache that still leaves room for one more token: chunks
    of `max_seq` up to `max_past` cached tokens, then one new token."""
    row_T = _text(ids_N, max_past + 1)
    lengths = [min(max_seq, max_past - start) for start in range(0, max_past, max_seq)]
    return Case("the profile's ends", (row_T,), _calls([row_T], [*lengths, 1], 8), False)


def _calls(
    rows: Sequence[np.ndarray], lengths: Sequence[int], keep: int | None = None
) -> tuple[Call, ...]:
    """Rows of one length, split into calls of these many tokens."""
    ids_BT = np.stack(rows)
    calls, start = [], 0
    for length in lengths:
        stop = start + length
        positions_BS = np.arange(start, stop)[None].repeat(len(rows), 0)
        mask_BT = np.ones((len(rows), stop), np.int64)
        calls.append(Call(ids_BT[:, start:stop], mask_BT, positions_BS, keep))
        start = stop
    return tuple(calls)


def _padded(ids_N: np.ndarray, lengths: Sequence[int]) -> Case:
    """A left-padded batch, then three decode steps; length 0 makes a fully masked row."""
    steps = PADDED_STEPS
    text = [_text(ids_N, 64 * b + n + steps)[64 * b :] for b, n in enumerate(lengths)]
    width = max(lengths) + steps
    ids_BT, mask_BT = (np.zeros((len(lengths), width), np.int64) for _ in range(2))
    for b, length in enumerate(lengths):
        if length:
            ids_BT[b, -length - steps :] = text[b]
            mask_BT[b, -length - steps :] = 1
    positions_BT = np.maximum(mask_BT.cumsum(1) - 1, 0)
    stops = [max(lengths) + n for n in range(steps + 1)]
    calls = tuple(
        Call(ids_BT[:, start:stop], mask_BT[:, :stop], positions_BT[:, start:stop])
        for start, stop in zip([0, *stops[:-1]], stops, strict=True)
    )
    rows = tuple(t if n else t[:0] for t, n in zip(text, lengths, strict=True))
    return Case("a fully masked row" if 0 in lengths else "left padding", rows, calls)


def _holes(row_T: np.ndarray) -> Case:
    """Right padding in the middle of a cache: what a batch of prompts leaves behind."""
    half, gap = len(row_T) // 2, 5
    ids_1T = np.concatenate([row_T[:half], np.zeros(gap, np.int64), row_T[half:]])[None]
    mask_1T = np.ones_like(ids_1T)
    mask_1T[:, half : half + gap] = 0
    positions_1T = np.maximum(mask_1T.cumsum(1) - 1, 0)
    cut = half + gap
    calls = (
        Call(ids_1T[:, :cut], mask_1T[:, :cut], positions_1T[:, :cut]),
        Call(ids_1T[:, cut:], mask_1T, positions_1T[:, cut:]),
    )
    return Case("padding inside the cache", (row_T,), calls)


def _text(ids_N: np.ndarray, count: int) -> np.ndarray:
    """The first `count` tokens, the text said again where it is too short."""
    return np.resize(ids_N, count).astype(np.int64)
