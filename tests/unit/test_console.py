"""Progress and tables: on a terminal, in a log, interrupted, resumed."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.console import progress, table
from distill.progress import Speed
from distill.units import duration, number, rate

ROOT = Path(__file__).resolve().parents[2]
STAGE = """\
import sys, time
from distill.console import progress, table
with progress(100, "training [x]") as bar:
    for step in range({steps}):
        bar.update(10, step=step, loss=2.5)
        time.sleep(0.05)
table("", ["a"], [[1]])
"""


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def plain_lines(step_s: float, steps: int, advance: int = 100) -> list[str]:
    clock, stream = FakeClock(), io.StringIO()
    total = steps * advance
    with progress(total, "training", stream=stream, clock=clock) as bar:
        for step in range(steps):
            clock.now_s += step_s
            bar.update(advance, step=step, loss=2.3146, kl=1.25)
    return stream.getvalue().splitlines()


def test_a_log_gets_one_line_every_ten_seconds_plus_start_and_end() -> None:
    lines = plain_lines(step_s=1.0, steps=60)
    assert len(lines) == 1 + 6 + 1
    assert lines[0] == "training:  6,000 tokens to do"
    assert lines[1] == (
        "training:  17%  1,000 of 6,000 tokens  100 tokens/s  ETA 50s  step 9  loss 2.315  KL 1.25"
    )
    assert (
        lines[-1] == "training:  6,000 tokens in 1m 00s  100 tokens/s  step 59  loss 2.315  KL 1.25"
    )


def test_slow_steps_get_a_line_each() -> None:
    assert len(plain_lines(step_s=25.0, steps=4)) == 1 + 4 + 1


def test_nothing_but_text_reaches_a_stream_that_is_no_terminal() -> None:
    assert "\x1b" not in "".join(plain_lines(step_s=7.0, steps=20))


def test_eta_follows_the_recent_speed_not_the_mean() -> None:
    clock = FakeClock()
    with progress(10_000, "t", stream=io.StringIO(), clock=clock) as bar:
        for _ in range(100):
            clock.now_s += 10.0
            bar.update(10)
        for _ in range(20):
            clock.now_s += 10.0
            bar.update(100)
        eta_s = bar.eta_s()
    assert eta_s == pytest.approx((10_000 - 3000) / 10.0)


def test_work_found_done_on_resuming_is_not_speed() -> None:
    clock = FakeClock()
    with progress(100_000, "t", stream=io.StringIO(), clock=clock) as bar:
        clock.now_s += 1.0
        bar.update(90_000)
        assert bar.eta_s() is None
        clock.now_s += 10.0
        bar.update(1000)
        assert bar.eta_s() == pytest.approx(90.0)


def test_speed_forgets_what_is_older_than_its_window_and_keeps_four_rare_updates() -> None:
    speed = Speed()
    assert speed.recent() is None
    for i in range(10):
        speed.add(1000.0 * i, 5.0 * i if i < 6 else 30.0 + 50.0 * (i - 6))
    assert speed.recent() == pytest.approx(0.05)
    assert speed.mean() == pytest.approx(180.0 / 9000.0)


def test_unknown_total_and_overshoot() -> None:
    clock, stream = FakeClock(), io.StringIO()
    with progress(None, "sampling", unit="rows", stream=stream, clock=clock) as bar:
        for _ in range(2):
            clock.now_s += 20.0
            bar.update(5)
    assert stream.getvalue().splitlines()[2] == "sampling:  10 rows  0.25 rows/s"
    with progress(10, "t", stream=stream, clock=clock) as bar:
        for _ in range(2):
            clock.now_s += 1.0
            bar.update(10)
        assert (bar.fraction, bar.eta_s()) == (1.0, 0.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_a_last_line_and_goes_on(error: type[BaseException]) -> None:
    stream = io.StringIO()
    with pytest.raises(error), progress(100, "training", stream=stream) as bar:
        bar.update(30, loss=1.5)
        raise error
    assert stream.getvalue().splitlines()[-1] == (
        "training:  stopped at 30 of 100 tokens after 0s  loss 1.5"
    )


def test_a_process_that_is_not_the_main_one_counts_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress(100, "training", enabled=False) as bar:
        bar.update(30)
    assert bar.done == 30
    assert capsys.readouterr() == ("", "")


def test_a_stream_that_is_gone_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with progress(2, "training", stream=Gone()) as bar:
        bar.update(2)
    assert bar.done == 2


def on_terminal(source: str, interrupt_after_s: float | None = None) -> tuple[int, str, str]:
    """Exit status, what the terminal on stderr received, and stdout (a pipe)."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(slave)
    received, stop_s = b"", None
    try:
        while piece := os.read(master, 4096):
            received += piece
            if interrupt_after_s is not None and stop_s is None and b"training" in received:
                time.sleep(interrupt_after_s)
                stop_s = time.monotonic()
                process.send_signal(signal.SIGINT)
    except OSError:
        pass  # Linux reports the closed other end of a pty as EIO
    finally:
        os.close(master)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, received.decode(), stdout.decode()


def test_a_terminal_gets_a_bar_and_its_cursor_back() -> None:
    status, terminal, stdout = on_terminal(STAGE.format(steps=10))
    assert status == 0
    assert "\x1b[?25l" in terminal
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("\x1b[?25l")
    assert "training [x]" in terminal
    assert "\r\ntraining [x]:  100 tokens in" in terminal.replace("\x1b[2K", "\r\n")
    assert stdout.splitlines() == ["a", "-", "1"]


def test_ctrl_c_on_a_terminal_restores_the_cursor_and_says_where_it_stopped() -> None:
    status, terminal, stdout = on_terminal(STAGE.format(steps=10_000), interrupt_after_s=0.3)
    assert status in (130, -signal.SIGINT)
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("\x1b[?25l")
    assert "stopped at" in terminal
    assert stdout == ""


def test_a_table_is_aligned_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["teacher", 134515008, 35.2, "100 %"], ["東京 b25", 61000000, None, "25 %"]]
    table("Summary", ["model", "parameters", "perplexity", "MACs"], rows)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "Summary",
        "model      parameters  perplexity   MACs",
        "--------  -----------  ----------  -----",
        "teacher   134,515,008        35.2  100 %",
        "東京 b25   61,000,000           -   25 %",
    ]


def test_a_table_without_rows_and_a_ragged_one(capsys: pytest.CaptureFixture[str]) -> None:
    table("", ["a", "bb"], [])
    assert capsys.readouterr().out.splitlines() == ["a  bb", "-  --"]
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table("", ["a", "bb"], [["only"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (True, "yes"), (102400, "102,400"), (2.3146, "2.315"), (0.25, "0.25"),
        (0.0, "0"), (5e-5, "5e-05"), (158.26, "158.3"), (56612.0, "56,612"), (2e9, "2e+09"),
        (float("nan"), "nan"), (float("inf"), "inf"), ("word", "word"), (-3.25, "-3.25"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_durations_and_rates() -> None:
    shown = [duration(s) for s in (-1, 42.4, 59.6, 332, 7500, 97_200)]
    assert shown == ["0s", "42s", "1m 00s", "5m 32s", "2h 05m", "1d 03h"]
    assert (rate(154.3, "tokens"), rate(0.312, "modules")) == ("154 tokens/s", "0.31 modules/s")
