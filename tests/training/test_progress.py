import io
import os
import pty
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llmq_jax.training.pace import Pace
from llmq_jax.training.progress import BarProgress, LineProgress, Status, clock, make_progress, short_count

STATUS = Status(step=7, loss=2.5, learning_rate=1e-3, tokens_per_second=12345.0, seconds_left=65.0)


def test_lines_are_aligned_and_only_for_logged_steps():
    output = io.StringIO()
    progress = make_progress(2000, output)
    assert isinstance(progress, LineProgress)
    progress.update(Status(step=1, loss=10.25), logged=True)
    progress.update(STATUS, logged=False)
    progress.message("step 5: saved")
    progress.update(Status(2000, 0.5, 1e-4, 999.0, 0.0), logged=True)
    progress.close()
    first, message, last = output.getvalue().splitlines()
    assert first == "step    1/2000    0%  loss 10.2500  lr        -      - tokens/s  ETA       -"
    assert last == "step 2000/2000  100%  loss  0.5000  lr 1.00e-04    999 tokens/s  ETA    0:00"
    assert message == "step 5: saved"


def test_a_loss_that_rounds_to_nothing_has_no_sign():
    """As GRPO's, which is 0 but for rounding."""
    output = io.StringIO()
    LineProgress(9, output).update(replace(STATUS, loss=-1e-8, shown=(("kl", -1e-9),)), logged=True)
    assert "loss  0.0000  kl  0.0000  lr" in output.getvalue()


def test_utilisation_stands_beside_the_speed():
    output = io.StringIO()
    make_progress(9, output).update(replace(STATUS, mfu=0.4125), logged=True)
    assert "12.3k tokens/s  MFU 41.2%  ETA" in output.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    """(a file that is a terminal of 80 columns, a function that reads what was written to it)"""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    controller, device = pty.openpty()
    os.set_blocking(controller, False)
    file = os.fdopen(device, "w")

    def read():
        file.flush()
        text = b""
        while True:
            try:
                text += os.read(controller, 65536)
            except BlockingIOError:
                return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode()).replace("\r", "\n")

    yield file, read
    file.close()
    os.close(controller)


def test_bar_on_a_terminal_shows_everything_in_80_columns_with_messages_above(terminal):
    file, read = terminal
    progress = make_progress(100_000, file, start=5)
    assert isinstance(progress, BarProgress)
    assert "step 5/100000" in read() and "compiling" not in read()
    progress.update(STATUS, logged=False)
    progress.message("[bold]step 7: sample :key:")
    shown = [line for line in read().split("\n") if line.strip()]
    assert shown[-2].startswith("[bold]step 7: sample :key:")  # no markup and no emoji taken from a sample
    bar = shown[-1]
    assert re.fullmatch(r"step 7/100000 +0% [━╸╺ ]+ loss 2.5000 lr 1.00e-03 12.3k tokens/s ETA +1:05 *", bar)
    assert len(bar) <= 80
    progress.update(Status(100_000, 1.25, 1e-5, 12345.0, 0.0, mfu=0.4125), logged=False)
    progress.close()
    last = [line for line in read().split("\n") if line.strip()][-1].strip()
    assert last.startswith("step 100000/100000 100%") and len(last) <= 80
    assert last.endswith("12.3k tokens/s MFU 41% ETA  0:00")


def test_many_steps_cost_few_refreshes(terminal, monkeypatch):
    """At a millisecond a step, whatever the machine takes for one."""
    file, read = terminal
    now = 100.0
    monkeypatch.setattr("llmq_jax.training.progress.time", SimpleNamespace(monotonic=lambda: now))
    progress = make_progress(1000, file)
    read()
    for step in range(1, 1001):
        now += 0.001
        progress.update(Status(step, 1.0), logged=False)
    assert 2 < read().count("loss") < 30
    progress.close()
    assert "step 1000/1000" in read()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_dumb_terminal_gets_lines(term, terminal, monkeypatch):
    monkeypatch.setenv("TERM", term)
    assert isinstance(make_progress(10, terminal[0]), LineProgress)


def test_numbers_in_few_characters():
    counts = [0.4, 987, 999.4, 999.6, 12345, 99_960, 999_499, 999_600, 1_200_000, 2.5e9]
    texts = ["0", "987", "999", "1.00k", "12.3k", "100k", "999k", "1.00M", "1.20M", "2.50G"]
    assert [short_count(count) for count in counts] == texts
    assert [clock(seconds) for seconds in (0, 59.6, 245, 3845)] == ["0:00", "1:00", "4:05", "1:04:05"]


def test_pace_leaves_out_compiling_and_pauses():
    time = 0.0
    pace = Pace(steps=10, now=lambda: time)
    assert (pace.tokens_per_second(), pace.since_mark(), pace.seconds_left(), pace.seconds()) == (None, None, None, 0.0)
    with pace.pause():  # as to start a profile
        time = 100.0  # compiling
    pace.finished(3, tokens=3000)  # a resumed run
    assert (pace.tokens_per_second(), pace.since_mark(), pace.seconds_left()) == (None, None, None)
    time = 102.0
    pace.finished(4, tokens=4000)
    assert (pace.tokens_per_second(), pace.since_mark(), pace.seconds_left()) == (500.0, 500.0, 12.0)
    with pace.pause():
        time = 110.0
    time = 111.0
    pace.finished(5, tokens=5000)
    assert pace.since_mark() == 1000.0
    assert pace.seconds() == 3.0
    assert pace.tokens_per_second() == 2000 / 3
    assert pace.seconds_left() == 11 / 2 * 5


def test_pace_leaves_out_a_step_that_is_compiled_later():
    """As of a batch of another shape."""
    time, compiled = 0.0, 7.0
    pace = Pace(steps=6, now=lambda: time, compiled=lambda: compiled)
    pace.finished(1, tokens=1000)
    with pace.handing_over():
        time, compiled = 51.0, 57.0
    time = 52.0
    pace.finished(2, tokens=2000)
    assert (pace.seconds(), pace.tokens_per_second(), pace.since_mark()) == (2.0, 500.0, 500.0)
    assert pace.seconds_left() == 8.0
    with pace.pause():  # the first evaluation, which is compiled once
        time, compiled = 83.0, 87.0
    time = 84.0
    pace.finished(3, tokens=3000)
    assert (pace.seconds(), pace.seconds_left()) == (3.0, 4 / 2 * 3)
