"""A TensorRT build as one share of the whole, in a thread that an interrupt can cancel.

Standard library only: a build kit carries this file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

OnProgress = Callable[[float, str], None]  # share done (0 to 1), name of the phase


Result = TypeVar("Result")
CANCEL_POLL_S = 0.1
START_S = 1.0


def in_worker(work: Callable[[threading.Event], Result]) -> Result:
    """Call `work` in a thread of its own, and set its event when this thread is interrupted.

    TensorRT calls back into Python, for its log and its progress, and aborts the process when such
    a call raises. KeyboardInterrupt rises in the main thread only, so none of them may run there.

    Raises: what `work` raises; after an interrupt, the KeyboardInterrupt, once `work` has ended.
    """
    cancelled, begun, ended = threading.Event(), threading.Event(), threading.Event()
    results: list[Result] = []
    errors: list[Exception] = []

    def run() -> None:
        begun.set()
        try:
            results.append(work(cancelled))
        except Exception as error:
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name="TensorRT build", daemon=True).start()
        while not ended.wait(CANCEL_POLL_S):  # an interrupted Thread.join forgets its thread
            pass
    except BaseException:
        cancelled.set()
        if begun.wait(START_S):  # the interrupt may have come before the thread did
            ended.wait()
        raise
    if errors:
        raise errors[0]
    return results[0]


class PhaseTree:
    """Nested phases of a build as one share of the whole that never falls."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps done, steps
        self._highest = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent, 0, max(steps, 1))
        self._report(phase)

    def step(self, phase: str, step: int) -> None:
        """Step number `step`, counted from 0, is done."""
        if phase in self._phases:
            parent, _, steps = self._phases[phase]
            self._phases[phase] = (parent, min(step + 1, steps), steps)
            self._report(phase)

    def finish(self, phase: str) -> None:
        parent, _, _ = self._phases.pop(phase, (None, 0, 1))
        if not self._phases:
            self._highest = 1.0
        self._report(parent or phase)

    def share(self, phase: str) -> float:
        """Share of `phase` that is done, its open sub-phases included."""
        _, done, steps = self._phases[phase]
        inside = sum(self.share(p) for p, (parent, _, _) in self._phases.items() if parent == phase)
        return min((done + inside) / steps, 1.0)

    def _report(self, phase: str) -> None:
        roots = [p for p, (parent, _, _) in self._phases.items() if parent not in self._phases]
        self._highest = max([self._highest, *(self.share(root) for root in roots)])
        with suppress(OSError, ValueError):  # a closed stderr ends the display, not the build
            self._on_progress(self._highest, phase)


def progress_monitor(trt: Any, on_progress: OnProgress, cancelled: threading.Event) -> Any:
    """A TensorRT progress monitor that reports, and stops the build once `cancelled` is set."""
    phases = PhaseTree(on_progress)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            phases.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            phases.step(phase, step)
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            phases.finish(phase)

    return Monitor()
