import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training.metrics import (
    MetricsFile,
    SamplesFile,
    drop_metrics_after,
    drop_samples_after,
    printable,
    read_metrics,
    read_samples,
    shown_loss,
)


def write(path, *steps):
    file = MetricsFile(path)
    for step in steps:
        file.write({"step": step, "loss": step / 3})
    file.close()


def test_records_come_back_exactly_and_each_is_on_file_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    record = {
        "step": 1,
        "loss": np.float32(0.1),
        "accuracy": jnp.float32(1 / 3),
        "count": np.int64(7),
        "of_one": np.full(1, 0.5, np.float32),
        "several": np.arange(2),
        "bad": float("nan"),
    }
    file.write({**record, "worse": np.float32(np.inf), "none": None})
    assert read_metrics(path) == [
        {
            "step": 1,
            "loss": float(np.float32(0.1)),
            "accuracy": float(np.float32(1 / 3)),
            "count": 7,
            "of_one": 0.5,
            "several": [0, 1],
            "bad": None,
            "worse": None,
            "none": None,
        }
    ]
    file.write({"step": 2})
    file.sync()
    assert len(path.read_text().splitlines()) == 2
    file.close()


def test_torn_last_line_is_left_out_and_cut_off_before_writing_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:length])
        assert [record["step"] for record in read_metrics(path)] == [1]
        write(path, 2)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"loss": 1}', ""])
def test_broken_line_before_the_last_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl line 2 is not a metrics record"):
        read_metrics(path)


def test_dropping_keeps_the_bytes_of_what_stays(tmp_path):
    path, cut = tmp_path / "metrics.jsonl", tmp_path / "cut.jsonl"
    write(path, 1, 2, 2, 3, 4)
    write(cut, 1, 2, 2)
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')
    drop_metrics_after(path, 2)
    assert path.read_bytes() == cut.read_bytes()
    drop_metrics_after(path, 0)
    assert path.read_bytes() == b""
    drop_metrics_after(tmp_path / "none.jsonl", 0)
    assert sorted(os.listdir(tmp_path)) == ["cut.jsonl", "metrics.jsonl"]


def test_dropping_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    before = path.read_bytes()
    replaced = []
    monkeypatch.setattr(os, "replace", lambda source, target: replaced.append((source.read_bytes(), target)))
    drop_metrics_after(path, 1)
    assert path.read_bytes() == before
    assert replaced == [(before.splitlines(keepends=True)[0], path)]


TEXTS = ["first\nsecond", "step 9\n\nstep 1", "", " \n", "tab\tbell\a\x1b[31mred\r\n"]


def write_samples(path, steps):
    file = SamplesFile(path)
    for step in steps:
        file.write(step, TEXTS[step % len(TEXTS)])
    file.sync()
    file.close()


def test_samples_are_cut_back_to_a_step_wherever_a_kill_tore_them(tmp_path):
    path, expected = tmp_path / "samples.txt", tmp_path / "expected.txt"
    write_samples(expected, range(100, 105))
    kept = expected.read_bytes()
    write_samples(path, range(100, 107))
    whole = path.read_bytes()
    for length in range(len(kept), len(whole) + 1):
        path.write_bytes(whole[:length])
        drop_samples_after(path, 104)
        assert path.read_bytes() == kept
    drop_samples_after(path, 99)
    assert path.read_bytes() == b""


def test_samples_are_readable(tmp_path):
    path = tmp_path / "samples.txt"
    write_samples(path, [100, 104])
    assert path.read_text() == "step 100\n  first\n  second\n\nstep 104\n  tab\tbell\ufffd\ufffd[31mred\ufffd\n  \n\n"
    assert read_samples(path) == [(100, TEXTS[0]), (104, printable(TEXTS[4]))]


def test_printable_keeps_text_and_replaces_what_a_terminal_obeys():
    text = "naïve Ω 漢字\n\t می\u200cروم \u3000 «\u00a0oui\u202f!» \U0001f469\u200d\U0001f680 Sil\u00adben"
    assert printable(text) == text
    assert printable("\x1b\x00\r\x9b\ud800\u202e\u2066\u2028") == "\ufffd" * 8
    json.dumps(printable("\ud800")).encode()


@pytest.mark.parametrize("objective", ["next_token", "classification", "reward", "preference", "policy"])
def test_the_loss_that_is_shown_is_the_plain_one(objective):
    """Where training adds to it, as the balance losses of experts."""
    assert shown_loss({"step": 1, "loss": 2.5, f"{objective}_loss": 2.0, "sequence_loss": 0.5}) == 2.0
    assert shown_loss({"step": 1, "loss": 2.5}) == 2.5
