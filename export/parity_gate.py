"""One graph beside one student: cases run, compared and judged one after another.

Shapes: B batch, S new tokens, T cached and new tokens, K positions with logits, N positions of one
row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from export.parity_cases import Call, Case, prefill_case
from export.parity_figures import CaseFigures, Limits, Tally, failure_of
from export.parity_reference import Reference
from export.session import OrtModel

Checked = TypeVar("Checked")


class Refusal(Exception):
    """A case that breaks a limit, and the figure that does, in words. `ran`: it gave numbers."""

    def __init__(self, case: Case, figure: str, ran: bool = True) -> None:
        super().__init__(figure)
        self.case, self.figure, self.ran = case, figure, ran


class Gate:
    """Raises Refusal at the first figure that breaks a limit."""

    def __init__(self, precision: str, model: OrtModel, student: Reference, limits: Limits) -> None:
        self.precision, self.model = precision, model
        self.student, self.limits = student, limits
        self._plain: dict[bytes, Tensor] = {}
        self._kl, self._positions = 0.0, 0

    def check_text(self, windows: Sequence[np.ndarray]) -> Tally:
        """Logits and cross-entropy of one plain prefill of each window [T], judged together: shares
        and means of a single window would be a matter of luck."""
        return self._confirmed(lambda: self._check_text(windows))

    def check_case(self, case: Case) -> tuple[CaseFigures, list[bool]]:
        """Another route to the same positions, beside the student and the graph's own prefill.

        Returns: the figures, and position by position whether the first choice is the same.
        """
        return self._confirmed(lambda: self._check_case(case))

    def _confirmed(self, check: Callable[[], Checked]) -> Checked:
        """PyTorch's own float32 can be what errs (0.004 in a logit, one student at F = 0.5): a
        float32 graph is refused when the student in float64 says so too."""
        before = self._kl, self._positions
        try:
            return check()
        except Refusal as refusal:
            if not (refusal.ran and self.precision == "fp32" and self.student.sharpen()):
                raise
        self._kl, self._positions = before
        return check()

    def _check_text(self, windows: Sequence[np.ndarray]) -> Tally:
        text, worst, largest = Tally(), prefill_case("plain prefill", windows[0]), 0.0
        for window_T in windows:
            case = prefill_case("plain prefill", window_T)
            got_TV = torch.from_numpy(self._run(case)[0][0])
            expected_TV = self.student.logits(window_T, np.arange(len(window_T)))
            text.add(expected_TV[:-1], got_TV[:-1], torch.from_numpy(window_T[1:]))
            text.add(expected_TV[-1:], got_TV[-1:])
            if text.max_difference > largest:
                worst, largest = case, text.max_difference
        self._judge(worst, text, None)
        return text

    def _check_case(self, case: Case) -> tuple[CaseFigures, list[bool]]:
        logits = self._run(case)
        tally, route = Tally(), Tally()
        for b, row_T in enumerate(case.rows):
            if not len(row_T):
                continue
            positions_N, got_NV = _answers(case, logits, b)
            tally.add(self.student.logits(row_T, positions_N), got_NV)
            if case.route:
                route.add(self._plain_prefill(case, row_T)[positions_N], got_NV)
        route_kl = route.mean_kl if case.route else None
        self._judge(case, tally, route_kl)
        figures = CaseFigures(
            name=case.name,
            positions=tally.positions,
            max_logit_difference=tally.max_difference,
            kl=tally.mean_kl,
            top1_agreement=tally.agreement,
            route_kl=route_kl,
        )
        return figures, tally.same

    def _plain_prefill(self, case: Case, row_T: np.ndarray) -> Tensor:
        """The graph's own logits [T, V] of a bare row in one call."""
        key = row_T.tobytes()
        if key not in self._plain:
            self._plain[key] = torch.from_numpy(self._run(prefill_case(case.name, row_T))[0][0])
        return self._plain[key]

    def _judge(self, case: Case, tally: Tally, route_kl: float | None) -> None:
        self._kl += tally.kl
        self._positions += tally.positions
        mean_kl = max(0.0, self._kl / max(1, self._positions))
        if figure := failure_of(tally, self.limits, self.precision, mean_kl, route_kl):
            raise Refusal(case, figure)

    def _run(self, case: Case) -> list[np.ndarray]:
        """float32 logits_BKV of every call; shapes and finiteness are checked on the way."""
        past, logits = None, []
        for call in case.calls:
            try:
                logits_BKV, past = self.model.step(
                    call.input_ids_BS, call.attention_mask_BT, call.position_ids_BS, past, call.keep
                )
            except Exception as error:  # onnxruntime's exceptions share no base of their own
                reason = " ".join(str(error).split())[:300]
                raise Refusal(case, f"it does not run ({reason})", ran=False) from error
            self._check_outputs(case, call, logits_BKV, past)
            logits.append(logits_BKV.astype(np.float32))
        return logits

    def _check_outputs(
        self, case: Case, call: Call, logits_BKV: np.ndarray, present: list[np.ndarray]
    ) -> None:
        batch, new = call.input_ids_BS.shape
        kept = new if call.keep is None else min(new, call.keep)
        model, total = self.model, call.attention_mask_BT.shape[1]
        wanted = {
            "logits": (batch, kept, model.vocabulary),
            "present.N.key and .value": (batch, model.kv_heads, total, model.head_dim),
        }
        for (name, shape), arrays in zip(wanted.items(), ([logits_BKV], present), strict=True):
            for array in arrays:
                if array.shape != shape:
                    raise Refusal(case, f"{name} has shape {array.shape}, due is {shape}")
                if not _is_finite(array):
                    raise Refusal(case, f"{name} holds NaN or infinities, due are finite numbers")


def _is_finite(array: np.ndarray) -> bool:
    """bfloat16, carried as bits, is finite where its exponent has a zero."""
    if array.dtype == np.uint16:
        return bool(((array & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(array).all())


def _answers(case: Case, logits: list[np.ndarray], row: int) -> tuple[np.ndarray, Tensor]:
    """Every position of one row that got logits: (positions_N, logits_NV)."""
    positions, answers = [], []
    for call, logits_BKV in zip(case.calls, logits, strict=True):
        kept = logits_BKV.shape[1]
        real_K = call.real_BS[row, -kept:]
        positions.append(call.position_ids_BS[row, -kept:][real_K])
        answers.append(logits_BKV[row][real_K])
    return np.concatenate(positions), torch.from_numpy(np.concatenate(answers))
