"""What the tests of runs ask of them: the tiny run, quietly, and whether two runs are the same."""

import io
import json
import signal

from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.metrics import TIME_FIELDS, read_metrics
from tests.forks import Forks
from tests.training import tiny_run
from tests.weights import assert_equal_trees


def timeless(folder):
    """The records of a run without what may differ between equal runs."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIME_FIELDS} for record in records]


def state_at(folder, step):
    return Checkpoints(folder / "checkpoints").restore(tiny_run.new_state(), step).state


def final_state(folder):
    return state_at(folder, json.loads((folder / "finished.json").read_text())["step"])


def figures(folder):
    """What a finished run tells of itself, without what may differ between equal runs."""
    told = json.loads((folder / "finished.json").read_text())
    of_the_process = {*TIME_FIELDS, "seconds", "time", "peak_memory_bytes"}
    return {name: value for name, value in told.items() if name not in of_the_process}


def assert_same_run(one, other):
    assert timeless(one) == timeless(other)
    assert figures(one) == figures(other)
    assert (one / "samples.txt").read_bytes() == (other / "samples.txt").read_bytes()
    assert_equal_trees(final_state(one), final_state(other))
    assert Checkpoints(one / "checkpoints").steps() == Checkpoints(other / "checkpoints").steps()


def quiet(folder, *arguments, **named):
    output = io.StringIO()
    result = tiny_run.run(folder, *arguments, output=output, **named)
    return result, output.getvalue()


def flip_a_bit(checkpoint):
    largest = max((path for path in checkpoint.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def broken_at(bad):
    """For Batches: an error in the place of this batch."""

    def before(step):
        if step == bad:
            raise RuntimeError(f"no batch {bad}")

    return before


def killed(folder, kills, *words):
    """(exit code, stdout, stderr) of the tiny run, which goes on to its end after a process that was killed at each of
    these points."""
    out, errors = folder.parent / "out", folder.parent / "errors"
    with Forks("llmq_jax.training.engine") as forks:
        for kill in (*kills, None):
            assert not (folder / "finished.json").exists()
            out.write_text("")
            errors.write_text("")
            arguments = tiny_run.__file__, folder, *words, *([kill] if kill else [])
            code = forks.wait(forks.begin(*arguments, output=out, errors=errors))
            if kill:
                assert code == -signal.SIGKILL, (kill, out.read_text(), errors.read_text())
    return code, out.read_text(), errors.read_text()
