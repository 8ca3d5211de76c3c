"""The processes of a run: who speaks, who waits, and how a refusal of one becomes everyone's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from distill.commit import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """The processes that run a model together, or one process alone (None)."""

    state: Accelerator | PartialState | None = None

    @property
    def writes(self) -> bool:
        return self.state is None or self.state.is_main_process

    def from_main(self, value: T) -> T:
        """The main process's value, in every process."""
        return self.from_process(0, value)

    def from_process(self, index: int, value: T) -> T:
        """Process ``index``'s value, in every process."""
        values = [value]
        if self.state is not None:
            broadcast_object_list(values, from_process=index)
        return values[0]


ALONE = Crew()


@contextmanager
def main_first(state: Accelerator | PartialState) -> Iterator[None]:
    """The main process, then all others together; what it refuses they refuse, rather than wait
    for a process that has given up."""
    with _turns(state, 0 if state.is_main_process else 1, 1):
        yield


@contextmanager
def one_by_one(state: Accelerator | PartialState) -> Iterator[None]:
    """The processes take turns, so that the host holds one whole copy of a model at a time; what
    one refuses all refuse."""
    with _turns(state, state.process_index, state.num_processes):
        yield


def made_once(state: Accelerator | PartialState, path: Path) -> AbstractContextManager[None]:
    """For what several runs share: the main process waits for another run that makes ``path``."""
    return sole_maker(path) if state.is_main_process else nullcontext()


@contextmanager
def sole_maker(path: Path) -> Iterator[None]:
    """Hold what several runs share while it is made or extended; wait for another that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another run that makes {path}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _turns(state: Accelerator | PartialState, mine: int, announced: int) -> Iterator[None]:
    """Process i announces the end of turn i to all, for the first ``announced`` turns; ``mine`` is
    the turn that this process acts in."""
    crew = Crew(state)
    for turn in range(min(mine, announced)):
        _heed(state, crew.from_process(turn, None))
    if mine >= announced:
        yield
        return
    try:
        yield
    except (UserError, OSError) as error:
        crew.from_process(mine, str(error))
        state.wait_for_everyone()
        raise
    for turn in range(mine, announced):
        _heed(state, crew.from_process(turn, None))


def _heed(state: Accelerator | PartialState, refusal: str | None) -> None:
    if refusal is not None:
        state.wait_for_everyone()  # the process that refused may not leave before all have heard
        raise UserError(refusal)
