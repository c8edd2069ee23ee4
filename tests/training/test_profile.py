import gzip
import io
import json
import os
import signal
from dataclasses import replace

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.profile import profiled_steps
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.signals import StoppedBySignal
from tests.training import tiny_run
from tests.training.compared_runs import assert_same_run, quiet
from tests.training.tiny_run import OPTIONS, PATIENT, STEPS, Batches


def traced_steps(folder):
    """The steps that each trace of a run shows, by the time of the traces."""
    found = []
    for path in sorted((folder / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found.append([int(event["args"]["step_num"]) for event in events if event.get("name") == "train"])
        assert list(path.parent.glob("*.xplane.pb"))  # what TensorBoard reads
        assert any(event.get("name") == "input" for event in events)
    return found


def test_these_steps_are_traced_and_nothing_else_changes(whole, tmp_path):
    folder = tmp_path / "run"
    _, said = quiet(folder, options=replace(OPTIONS, profile="10:13"))
    assert traced_steps(folder) == [[10, 11, 12, 13]]
    assert "\nstep 13: profile saved\n" in said
    report = said[said.index("finished:") :]
    assert f"profile of steps 10 to 13: {folder}/profile" in report
    assert f"xprof --port 8791 {folder}/profile" in report and "ui.perfetto.dev" in report
    assert_same_run(whole, folder)
    assert "profile" not in quiet(folder)[1].replace("profile/", "")  # finished, and nothing was traced


def test_a_run_that_goes_on_traces_what_is_left_of_them(whole, tmp_path):
    folder = tmp_path / "run"
    for last, traced in ((6, [4, 5, 6]), (8, [7, 8])):  # closed where the run ended
        with pytest.raises(StoppedBySignal):
            stop = Batches(lambda step, last=last: os.kill(os.getpid(), signal.SIGTERM) if step == last else None)
            quiet(folder, stop, replace(OPTIONS, profile="4:10"))
        assert traced_steps(folder) == [traced]
        (folder / "profile").rename(tmp_path / f"profile-{last}")  # JAX names a trace by its second
    _, said = quiet(folder, options=replace(OPTIONS, profile="2:6"))
    assert "no profile: steps 2:6 were before the run was resumed" in said
    assert not (folder / "profile").exists()
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    ("asked", "traced", "said"),
    [
        ("13:18", [[13, 14]], "profile of steps 13 to 14: "),
        ("15:18", [], "\nno profile: the run stopped before step 15\n"),
    ],
)
def test_of_a_run_that_stops_early_the_steps_that_it_takes_are_traced(tmp_path, asked, traced, said):
    folder = tmp_path / "run"
    result, told = quiet(folder, options=replace(PATIENT, profile=asked), evaluate=tiny_run.turning)
    assert (result.step, traced_steps(folder)) == (14, traced)
    assert said in told


@pytest.mark.parametrize("text", ["5", "15:10", "0:3", "10:21", "a:b", "", "1:2:3", "-1:3", " 1:2"])
def test_steps_that_are_none_are_refused_in_a_line(text):
    with pytest.raises(BadInput, match="must be a first and a last step of 20, counted from 1, as 10:15") as error:
        RunOptions(steps=STEPS, profile=text)
    assert "\n" not in str(error.value)


def test_a_single_step_and_a_run_of_unknown_length():
    assert profiled_steps("3:3", 3) == (3, 3)
    assert profiled_steps("100:200", None) == (100, 200)
    with pytest.raises(BadInput, match="--profile is '2:1' and must be a first and a last step, counted"):
        profiled_steps("2:1", None, "--profile")


def test_a_profile_needs_a_folder():
    with pytest.raises(BadInput, match="profile is asked for, but the run has no folder"):
        tiny_run.run(None, options=RunOptions(steps=2, profile="1:2"), output=io.StringIO())
