"""The command on models of a size that plans in a moment, and on those that need a thousand devices."""

import re
from functools import partial

import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import PRESETS
from llmq_jax.training.plan import Run
from llmq_jax.training.sharding import mesh_sizes
from tests.models.test_own_model import SIZES, shown  # noqa: F401  a fixture


@pytest.fixture
def planned(program):
    """`planned(*words)` -> (exit code, stdout, stderr)."""
    return partial(program, "train.plan")


def test_a_plan_without_devices(planned):
    code, out, err = planned("--preset", "llama-10m", "--mesh", "data=2,fsdp=4", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[-4:] == ["forward", "loss", "backward", "update"]
    *rows, total = ([float(word) for word in line.split()[-4:]] for line in lines[1 : lines.index("")])
    for column in range(4):  # what is shown adds up, but for rounding
        assert sum(row[column] for row in rows) == pytest.approx(total[column], abs=0.1)
    assert any(line.startswith("all-gather of weights, forward") and " fsdp " in line for line in lines)
    sent = [float(line.split()[-1]) for line in lines[lines.index("") + 2 : -3]]
    assert len(sent) > 2 and sent == sorted(sent, reverse=True)
    assert lines[-1].endswith("on each of 8 devices: fits 80 GiB")


def test_every_option_reaches_the_plan(planned, monkeypatch):
    given = []

    def only_noted(run):
        given.append(run)
        raise BadInput("noted")

    monkeypatch.setattr("llmq_jax.training.plan.plan", only_noted)
    words = "--preset llama-10m --config num_hidden_layers=1 --mesh fsdp=2 --batch-size 8 --context 128 --accumulate 2"
    words += " --dtype bfloat16 --remat dots --optimizer muon --moments first-bfloat16 --attention blocked"
    assert planned(*words.split())[2] == "error: noted\n"
    config = lq.preset("llama-10m", num_hidden_layers=1)
    how = (2, "bfloat16", "dots", "muon", "first-bfloat16", "blocked")
    assert given == [Run(config, mesh_sizes("fsdp=2"), 8, 128, *how)]
    planned("--preset", "gemma3-1b", "--mesh", "data=2", "--accumulate", 3)
    assert (given[1].batch_size, given[1].attention) == (2 * 3, "blocked")


def test_a_complete_run_of_pretraining_names_its_model(planned):
    code, out, _ = planned("--preset", "demo", "--config", "num_hidden_layers=1")
    assert code == 0 and "\nparameters  " in out


def test_a_window_is_as_long_as_the_recipe_makes_it(planned):
    code, out, _ = planned("--preset", "llama3.2-1b")  # which takes 131,072 tokens
    assert code == 0
    assert planned("--preset", "llama3.2-1b", "--context", 1024)[1] == out


def test_attention_block_by_block_is_among_what_makes_a_run_fit(planned):
    words = ("--preset", "llama3.2-1b", "--mesh", "fsdp=8", "--context", 8192, "--dtype", "bfloat16", "--remat", "full")
    code, out, _ = planned(*words, "--device-memory", 10)
    assert code == 1
    assert "\n  --attention blocked: 7." in out


def test_what_to_change(planned):
    code, out, _ = planned("--preset", "llama-10m", "--batch-size", 4, "--device-memory", 0.28)
    assert code == 1
    assert "on the device: does not fit 286.72 MiB" in out
    assert re.search(r"\nwhat makes it fit, each alone:\n  --remat dots: 2\d\d\.\d\d MiB\n", out)
    assert "\n  --accumulate " in out
    assert planned("--preset", "llama-10m", "--batch-size", 4, "--device-memory", 0.32)[0] == 0


@pytest.mark.parametrize(("size", "size_shown"), [(20480, "20480 GiB"), (141.37, "141.37 GiB"), (0.5, "512 MiB")])
def test_the_memory_of_a_device_as_it_was_given(planned, size, size_shown):
    _, out, _ = planned("--preset", "llama-10m", "--batch-size", 1, "--device-memory", size)
    assert f"fits {size_shown}\n" in out


def test_thousands_of_devices(planned):
    code, out, _ = planned("--preset", "mixtral-8x7b", "--mesh", "fsdp=32,tensor=8,expert=8", "--context", 1024)
    assert code == 0
    assert "all-to-all of tokens" in out and "on each of 2,048 devices: fits 80 GiB" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--preset", "llama-10n"), "unknown preset 'llama-10n': did you mean llama-10m"),
        (("--preset", "unknown"), "unknown preset 'unknown': choose from demo, nanogpt-shakespeare-cpu, "),
        (("--preset", "llama-10m", "--mesh", "fsdb=2"), "unknown axis 'fsdb': did you mean fsdp"),
        (("--preset", "llama-10m", "--mesh", "tensor=7"), "tensor=7 divides no parameter"),
        (("--preset", "llama-10m", "--mesh", "data=8", "--batch-size", 12), "12 rows cannot be divided among 8"),
        (("--preset", "llama-10m", "--batch-size", 2, "--accumulate", 4), "a batch of 2 rows in 4 parts"),
        (("--preset", "llama-10m", "--context", 0), "--context is 0 and must be positive"),
        (("--preset", "llama-10m", "--device-memory", "inf"), "--device-memory is inf and must be positive"),
        (("--preset", "llama-10m", "--config", "hidden=3"), "Llama3Config has no field 'hidden'"),
        ((), "missing --preset"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(planned, words, why):
    code, out, err = planned(*words)
    assert (code, out) == (2, "") and why in err and len(err.splitlines()) == 1


def test_a_model_with_a_formula_of_its_own_is_planned_with_plain_attention(planned, shown, monkeypatch):  # noqa: F811
    monkeypatch.setitem(PRESETS, "top_keys", shown["TopKeysConfig"](**SIZES))
    code, out, err = planned("--preset", "top_keys")
    assert (code, out) == (2, "") and err.startswith("error: --attention masked does not compute with formula; take 'p")
    assert planned("--preset", "top_keys", "--attention", "plain")[0] == 0
