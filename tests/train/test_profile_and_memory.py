"""Options of every recipe, and what every recipe says when memory runs out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from llmq_jax.errors import BadInput
from train.devices import less_memory, on_devices
from train.grpo import Options as GRPOOptions
from train.instruct import Options as InstructOptions
from train.options import RecipeOptions

ROOT = Path(__file__).parents[2]


def test_a_profiled_run_tells_where_its_time_went(pretrain):
    code, out, err = pretrain("--data", "TEXT", "--out", "run", "--profile", "4:5")
    assert (code, err) == (0, "")
    assert "step 5: profile saved" in out and "profile of steps 4 to 5: run/profile" in out
    time = json.loads(Path("run/finished.json").read_text())["time"]
    assert min(time[part] for part in ("compiling", "step", "evaluation", "samples", "checkpoints")) > 0
    (line,) = [line for line in out.splitlines() if line.startswith("time: ")]
    assert "compiling" in line and "% (" in line
    assert "profile" not in json.loads(Path("run/config.json").read_text())


@pytest.mark.parametrize("text", ["5", "5:4", "0:3", "4:7", "now"])
def test_steps_to_profile_are_checked_before_anything_is_read(pretrain, text):
    code, out, err = pretrain("--data", "missing.txt", "--profile", text)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --profile is '{text}' and must be a first and a last step of 6, counted from 1")
    assert err.count("\n") == 1


SCRIPT = """
import resource, sys
import jax.numpy as jnp
from llmq_jax.command_line import run
from llmq_jax.training import engine
from train.pretrain import main, starting_options

train = engine._Loop.train

def with_little_memory(loop, output):
    jnp.zeros(1).block_until_ready()
    size = 4096 * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
    return train(loop, output)

engine._Loop.train = with_little_memory
run(main, sys.argv[1:], program="python -m train.pretrain", defaults=starting_options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_batch_that_does_not_fit_is_one_line(text_file, tmp_path):
    sizes = "--num-hidden-layers 2 --hidden-size 512 --num-attention-heads 2 --context 64 --steps 6 --batch-size 8192"
    sizes += " --evaluate-every 0 --sample-every 0 --remat dots"
    command = [sys.executable, "-c", SCRIPT, *sizes.split(), "--data", str(text_file), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: out of memory in step 1 (Out of memory allocating ")
    assert done.stderr.count("\n") == 1
    for part in (
        "GiB): a device holds parameters of 2",
        "; no checkpoint was saved before it; to need less",
    ):
        assert part in done.stderr
    assert "GiB, gradients of 2" in done.stderr  # the compiler's figure
    assert done.stderr.endswith(
        "; to need less, change --batch-size 8192 -> 4096 or --accumulate 1 -> 2 (the same result), "
        "--remat dots -> full, --dtype float32 -> bfloat16\n"
    )


def test_what_a_recipe_makes_before_its_steps_may_not_fit_either():
    @on_devices
    def recipe(options):
        jnp.zeros((2**24, 2**24)).block_until_ready()

    match = r"out of memory outside the steps, .* \(Out of memory allocating 1,048,576.0 GiB\), beside .* of arrays; "
    match += "to need less, change --moments float32 -> bfloat16, --mesh none -> fsdp=2 on 2 devices, "
    match += "the model to a smaller one$"
    with pytest.raises(BadInput, match=match):
        recipe(RecipeOptions())


def test_devices_that_are_not_used_are_told(monkeypatch, capsys):
    monkeypatch.setattr("jax.device_count", lambda: 8)
    grpo = GRPOOptions("data", "model", "run")
    for options, rows in (
        (RecipeOptions(accumulate=2), "--batch-size must then be a multiple of 16"),
        (grpo, "--prompts-per-step times --group-size must then be a multiple of 8"),
    ):
        on_devices(lambda options: None)(options)
        assert capsys.readouterr().out == f"only 1 of 8 devices is used; add --mesh fsdp=8 ({rows})\n"


def test_only_what_can_still_be_changed_is_advised():
    used = {"batch_size": 1, "remat": "full", "dtype": "bfloat16", "moments": "bfloat16"}
    assert less_memory(RecipeOptions(**used)) == ["--mesh none -> fsdp=2 on 2 devices", "the model to a smaller one"]
    assert less_memory(RecipeOptions(**{**used, "batch_size": 6}, accumulate=3, mesh="fsdp=1")) == [
        "--batch-size 6 -> 3 or --accumulate 3 -> 6 (the same result)",
        "--mesh fsdp=1 -> fsdp=2 on 2 devices",
        "the model to a smaller one",
    ]
    grpo = GRPOOptions("data", "model", "run", prompts_per_step=3, group_size=4, accumulate=2)
    assert less_memory(grpo)[0] == "--accumulate 2 -> 3 (the same result)"
    judged = less_memory(replace(grpo, judge="my_rewards.py:solved"))
    of_both, *of_one = judged[1], judged[0], judged[2]
    assert of_both == "--remat none -> full" and all(change.endswith(" for the policy") for change in of_one)
    assert less_memory(RecipeOptions(), in_steps=False)[0] == "--moments float32 -> bfloat16"
    assert less_memory(RecipeOptions(betas=(0.9, 0.999)), in_steps=False)[0] == "--moments float32 -> first-bfloat16"
    assert less_memory(RecipeOptions(betas=(0.999, 0.9)), in_steps=False)[0].startswith("--mesh")
    assert less_memory(InstructOptions("data", "model", "run"), in_steps=False)[0] == "--base-dtype float32 -> bfloat16"
    adapted = GRPOOptions("data", "model", "run", train="lora")
    assert less_memory(adapted, in_steps=False)[0] == "--base-dtype float32 -> bfloat16"
    tuned = InstructOptions("data", "model", "run", train="all")
    assert less_memory(tuned, in_steps=False)[0] == "--train all -> lora"
