"""Rows of one cache that grow together: a prompt in chunks, then one token a step.

Rows of different length share columns: the shorter ones have padding on their left, which the
attention mask hides. Shapes: B rows, S new columns, T all columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from deploy.runner import Runner, positions_of

Row = TypeVar("Row")


class Batch(Generic[Row]):
    """Rows, their cache and their mask. `rows[i]` is whoever owns row i, None if nobody does.

    A row that ends stays as a dead one until `compact`, because dropping it copies the cache.
    """

    def __init__(self, runner: Runner, rows: Sequence[Row], cache: Any, mask_BT: np.ndarray):
        self.runner = runner
        self.rows: list[Row | None] = list(rows)
        self.cache = cache
        self.mask_BT = mask_BT

    @property
    def alive(self) -> list[int]:
        """Indices of the rows that somebody owns."""
        return [index for index, row in enumerate(self.rows) if row is not None]

    @property
    def columns(self) -> int:
        return int(self.mask_BT.shape[1])

    def remove(self, index: int) -> None:
        self.rows[index] = None

    def step(self, tokens_B: Sequence[int]) -> np.ndarray:
        """Append one token to every row (dead rows: any); returns logits [B, V]."""
        new_BS = np.asarray(tokens_B, dtype=np.int64)[:, None]
        alive_BS = np.array([[row is not None] for row in self.rows], dtype=np.int64)
        mask_BT = np.concatenate([self.mask_BT, alive_BS], axis=1)
        logits_BV = forward(self.runner, new_BS, self.cache, mask_BT)
        self.mask_BT = mask_BT
        return logits_BV

    def compact(self) -> None:
        """Drop dead rows and the columns that are padding in every row left."""
        alive, spare = self.alive, self.spare_columns()
        if spare or len(alive) < len(self.rows):
            self.cache = self.cache.compact(alive, spare)
            self.mask_BT = self.mask_BT[alive, spare:]
            self.rows = [self.rows[index] for index in alive]

    def spare_columns(self) -> int:
        """Columns on the left that are padding in every living row."""
        used_T = self.mask_BT[self.alive].any(axis=0)
        return int(used_T.argmax()) if used_T.any() else 0

    def join(self, other: Batch[Row]) -> None:
        """Take over the rows of `other`, which is used up: into the places of dead rows, which
        copies only those, and the rest behind, which copies the cache."""
        self._widen(other.columns)
        dead = [index for index, row in enumerate(self.rows) if row is None]
        places = dead[: len(other.rows)]
        behind = list(range(len(places), len(other.rows)))
        if places:
            inside = other.cache.select(list(range(len(places)))) if behind else other.cache
            self.cache.replace(places, inside)
            self.mask_BT[places] = _padded(other.mask_BT[: len(places)], self.columns)
            for place, row in zip(places, other.rows, strict=False):
                self.rows[place] = row
        if behind:
            rest = other.cache.select(behind) if places else other.cache
            self.cache = self.cache.extend(rest)
            mask_BT = _padded(other.mask_BT[behind], self.columns)
            self.mask_BT = np.concatenate([self.mask_BT, mask_BT])
            self.rows += [other.rows[index] for index in behind]

    def _widen(self, columns: int) -> None:
        """Padding on the left up to `columns`."""
        missing = columns - self.columns
        if missing > 0:
            self.cache = self.cache.shift(missing)
            self.mask_BT = _padded(self.mask_BT, columns)


class Prefill(Generic[Row]):
    """Prompts on their way into a new cache, some columns at a time."""

    def __init__(self, runner: Runner, rows: Sequence[Row], prompts: Sequence[Sequence[int]]):
        columns = max(map(len, prompts))
        self.ids_BS = np.zeros((len(prompts), columns), dtype=np.int64)
        mask_BS = np.zeros_like(self.ids_BS)
        for index, prompt in enumerate(prompts):
            self.ids_BS[index, columns - len(prompt) :] = prompt
            mask_BS[index, columns - len(prompt) :] = 1
        self.mask_BS = mask_BS
        self.batch = Batch(runner, rows, runner.new_cache(len(prompts)), mask_BS[:, :0])

    @property
    def columns_left(self) -> int:
        return int(self.ids_BS.shape[1]) - self.batch.columns

    def advance(self, columns: int) -> np.ndarray | None:
        """Process some more columns; returns the prompts' last logits [B, V] at the end."""
        done = self.batch.columns
        until = min(done + columns, self.ids_BS.shape[1])
        mask_BT = self.mask_BS[:, :until]
        logits_BV = forward(
            self.batch.runner, self.ids_BS[:, done:until], self.batch.cache, mask_BT
        )
        self.batch.mask_BT = mask_BT
        return None if self.columns_left else logits_BV

    def drop_dead(self) -> None:
        """Drop the rows that nobody owns any more."""
        alive = self.batch.alive
        if len(alive) < len(self.batch.rows):
            self.ids_BS, self.mask_BS = self.ids_BS[alive], self.mask_BS[alive]
            self.batch.cache = self.batch.cache.compact(alive, 0)
            self.batch.mask_BT = self.batch.mask_BT[alive]
            self.batch.rows = [self.batch.rows[index] for index in alive]


def forward(runner: Runner, ids_BS: np.ndarray, cache: Any, mask_BT: np.ndarray) -> np.ndarray:
    """One engine call; returns the last position's logits [B, V]."""
    logits_B1V = runner.forward(
        ids_BS,
        cache,
        attention_mask_BT=mask_BT,
        position_ids_BS=positions_of(mask_BT, ids_BS.shape[1]),
        logits_to_keep=1,
    )
    return logits_B1V[:, -1]


def _padded(mask_BT: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(mask_BT, ((0, 0), (columns - mask_BT.shape[1], 0)))
