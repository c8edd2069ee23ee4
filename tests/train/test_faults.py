"""Recipes as a user runs them, under what can happen to a run: kills, damaged checkpoints, a full disk, other data."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.language_model import LanguageModel
from llmq_jax.training.checkpoint_arrays import read_arrays
from llmq_jax.training.checkpoints import Checkpoints
from llmq_jax.training.metrics import TIME_FIELDS
from llmq_jax.training.time_spent import TimeSpent
from tests.forks import Forks
from tests.programs import ended

pytestmark = pytest.mark.exhaustive

RECIPES = ("pretrain", "instruct", "grpo")
REWARD = """
def small(completions, **_):
    return [sum(byte < 128 for byte in text.encode()) / max(len(text.encode()), 1) for text in completions]
"""


def save_model(folder, seed):
    config = lq.Llama3Config(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.1,
    )
    ends = lq.GenerationConfig(eos_token_id=(256, *range(0, 128, 16)))
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=seed), ByteTokenizer(), ends), folder)


class Recipe:
    """A recipe with tiny options and files of its own in `folder`; its runs go to folders there, and copies of them to
    `whole_runs`, for other tests."""

    def __init__(self, name, folder, whole_runs):
        self.name, self.folder, self.whole_runs = name, folder, whole_runs
        getattr(self, name)()

    def pretrain(self):
        self.data = self.folder / "text.txt"
        words = random.Random(0)
        self.data.write_text("\n".join(" ".join(words.choices(["ab", "abba", "baab"], k=8)) for _ in range(60)))
        self.options = {"num-hidden-layers": 1, "hidden-size": 16, "num-attention-heads": 2, "context": 16}
        self.options |= {"batch-size": 4, "dropout": 0.1}

    def instruct(self):
        self.data = self.folder / "data.jsonl"
        rows = [{"prompt": f"say {i}:", "completion": f" {i * i}"} for i in range(20)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_model(self.folder / "model", seed=1)
        self.options = {"init-from": self.folder / "model", "context": 32, "batch-size": 2}
        self.options |= {"lora-rank": 2, "lora-dropout": 0.1, "learning-rate": 1e-2}

    def grpo(self):
        self.data = self.folder / "data.jsonl"
        rows = [{"prompt": f"say {i}:", "answer": str(i)} for i in range(10)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "reward.py").write_text(REWARD)
        save_model(self.folder / "model", seed=1)
        self.options = {"init-from": self.folder / "model", "reward": f"{self.folder / 'reward.py'}:small"}
        self.options |= {"train": "all", "learning-rate": 1e-2, "prompts-per-step": 2, "group-size": 4}
        self.options |= {"max-new-tokens": 4, "beta": 0.04, "reference": "start", "iterations": 2}

    def arguments(self, out, **others):
        often = {"steps": 6, "log-every": 1, "evaluate-every": 3, "sample-every": 3, "checkpoint-every": 2}
        options = {"data": self.data, "out": self.folder / out, "device": "cpu", **often, **self.options}
        options |= {name.replace("_", "-"): value for name, value in others.items()}
        return [f"--{name}={value}" for name, value in options.items()]

    def call(self, out, capsys, **others):
        """(exit code, stdout, stderr) of a run in this process."""
        return ended(f"train.{self.name}", *self.arguments(out, **others)), *capsys.readouterr()

    def finish(self, out, capsys, **others):
        """What an uninterrupted run leaves."""
        code, said, errors = self.call(out, capsys, **others)
        assert (code, errors) == (0, ""), (said, errors)
        return self.left_by(out)

    def finished(self, out, capsys, **others):
        """The same, of one run for all tests that ask for it with these options: `out` gets a copy, as if it had been
        trained here."""
        whole = self.whole_runs / " ".join([self.name, *(f"{name}={value}" for name, value in others.items())])
        if not whole.exists():
            self.finish(out, capsys, **others)
            moved(self.folder / out, whole, self.folder, "FOLDER")
        else:
            moved(whole, self.folder / out, "FOLDER", self.folder)
        return self.left_by(out)

    def left_by(self, out):
        """All that a run leaves and that equal runs have equal."""
        folder = self.folder / out
        checkpoints = Checkpoints(folder / "checkpoints")
        return {
            "records": [{k: v for k, v in record.items() if k not in TIME_FIELDS} for record in records(folder)],
            "samples": (folder / "samples.txt").read_text(),
            "checkpoints": checkpoints.steps(),
            "state": arrays(checkpoints.path(checkpoints.latest_step())),
            "report": json.loads((folder / "finished.json").read_text())["validation_loss"],
        }


def moved(run, to, before, after):
    """A copy, whose files were in the folder `before` and are in `after`."""
    config = shutil.copytree(run, to) / "config.json"
    config.write_text(config.read_text().replace(str(before), str(after)))


def records(folder):
    """Those of metrics.jsonl; every line must be whole."""
    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def arrays(checkpoint):
    """Every array of a state, the optimizer's too, as bytes."""
    read = read_arrays(checkpoint, lambda saved: saved)
    assert any(name[0] == "optimizer_state" for name in read)
    return {
        "/".join(name): (str(array.dtype), array.shape, np.asarray(array).tobytes()) for name, array in read.items()
    }


def half_written(folder):
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.startswith((".saving-", ".deleting-")) or "partial" in path.name
    ]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("whole_runs")


@pytest.fixture
def recipe(request, tmp_path, whole_runs):
    return Recipe(request.param, tmp_path, whole_runs)


every_recipe = pytest.mark.parametrize("recipe", RECIPES, indirect=True)
pretraining = pytest.mark.parametrize("recipe", ["pretrain"], indirect=True)


# Kills.

RUN_RECIPE = Path(__file__).parent / "run_recipe.py"

PLACES = {  # how often a run comes there at most before it is killed, and how long it stays, in seconds
    "step": (12, 0.005),
    "input": (6, 0.001),
    "evaluation": (1, 0.03),
    "samples": (1, 0.1),
    "checkpoints": (3, 0.2),
    "resume": (1, 0.1),
}
ANYWHERE = "anywhere"
MOMENTS = [*PLACES, *["checkpoints"] * 2, *[ANYWHERE] * 2]  # 10 of them


@pytest.mark.parametrize("recipe", ["grpo"], indirect=True)
def test_killed_at_ten_moments_a_run_ends_as_if_it_had_not_been(recipe, capsys):
    """The recipe with the most to lose: answers in the middle of their iterations, a reference that is written once,
    and seeds of what is drawn. `tests/training/test_resuming.py` kills the engine's loop at every kind of place."""
    # Each process compiles evaluation and samples anew, hence few of them; and samples between checkpoints, so that a
    # kill may leave one that is newer than the last checkpoint.
    options = {"steps": 32, "evaluate_every": 8, "sample_every": 7}
    whole = recipe.finish("whole", capsys, **options)
    chance = random.Random(recipe.name)
    moments = chance.sample(MOMENTS, len(MOMENTS))
    assert len(moments) == 10
    with Forks(f"train.{recipe.name}", "llmq_jax.model_files") as forks:
        for out in ("first", "second", "third", "fourth", "fifth"):
            if not moments:
                break
            arguments = recipe.arguments(out, **options)
            while True:
                place = moments[-1] if moments else None
                code, said = killed(forks, recipe, arguments, place, chance)
                if code == 0:
                    break
                assert code == -signal.SIGKILL, said
                moments.pop()
                if (recipe.folder / out / "metrics.jsonl").exists():
                    records(recipe.folder / out)
                if (samples := recipe.folder / out / "samples.txt").exists():
                    assert samples.read_text() == "" or samples.read_text().endswith("\n\n")
            assert recipe.left_by(out) == whole
            assert half_written(recipe.folder / out) == []
    assert moments == []


def killed(forks, recipe, arguments, place, chance):
    """(exit code, output) of a process that is killed at the place, if it comes there."""
    kill = []
    if place in PLACES:
        most, stay = PLACES[place]
        kill = ["--kill-at", place, chance.randint(1, most), chance.uniform(0, 1.5 * stay)]
    pipe = recipe.folder / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    process = forks.begin(RUN_RECIPE, *kill, recipe.name, *arguments, output=pipe, errors=pipe)
    said, lines_left = [], chance.randint(1, 4)  # of its training, before it is killed anywhere
    with open(pipe) as lines:
        for line in lines:
            said.append(line)
            lines_left -= line.startswith(("resuming", "step"))
            if place == ANYWHERE and lines_left == 0:
                time.sleep(chance.uniform(0, 0.5))
                os.kill(process, signal.SIGKILL)
                place = None
    return forks.wait(process), "".join(said)


# Damaged checkpoints.


def truncated(checkpoint):
    largest(checkpoint / "state").write_bytes(largest(checkpoint / "state").read_bytes()[:-100])


def flipped(checkpoint):
    content = bytearray(largest(checkpoint / "state").read_bytes())
    content[len(content) // 2] ^= 4
    largest(checkpoint / "state").write_bytes(content)


def half_deleted(checkpoint):
    files = sorted(path for path in (checkpoint / "state").rglob("*") if path.is_file())
    for path in files[: len(files) // 2]:
        path.unlink()


def without_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def unfinished(folder, *damages):
    """The run as if it had been killed after its last checkpoints, and these damaged: (damage, step)."""
    (folder / "finished.json").unlink()
    for damage, step in damages:
        damage(Checkpoints(folder / "checkpoints").path(step))


@pytest.mark.parametrize(
    ("recipe", "damage"),
    [(name, truncated) for name in RECIPES]
    + [("pretrain", damage) for damage in (flipped, half_deleted, without_manifest)],
    indirect=["recipe"],
)
def test_a_damaged_checkpoint_is_told_and_the_newest_whole_one_used(recipe, damage, capsys):
    whole = recipe.finished("run", capsys)
    folder = recipe.folder / "run"
    unfinished(folder, (damage, 6), (flipped, 4))
    code, out, errors = recipe.call("run", capsys)
    assert (code, errors) == (0, "")
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert [f"0000000{step}" in line for step, line in zip((6, 4), warnings, strict=True)] == [True, True]
    assert all("is damaged" in line and line.endswith("; going back to an earlier one") for line in warnings)
    assert f"resuming {folder} from step {max(whole['checkpoints'][:-2])}" in out
    assert recipe.left_by("run") == whole
    assert {"damaged-00000004", "damaged-00000006"} <= {path.name for path in (folder / "checkpoints").iterdir()}


@pretraining
def test_where_every_checkpoint_is_damaged_the_run_does_not_start_from_nothing(recipe, capsys):
    whole = recipe.finished("run", capsys)
    folder = recipe.folder / "run"
    steps = Checkpoints(folder / "checkpoints").steps()
    unfinished(folder, *((without_manifest, step) for step in steps))
    before = (folder / "metrics.jsonl").read_bytes()
    code, out, errors = recipe.call("run", capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: no checkpoint in {folder}/checkpoints is whole; checkpoint ")
    assert "step 1" not in out and (folder / "metrics.jsonl").read_bytes() == before
    assert whole["checkpoints"] == Checkpoints(folder / "checkpoints").steps()


# A full disk.


def full_filesystem(folder):
    """A small filesystem at `folder`: a function that fills it, and one that makes room again."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True, capture_output=True)
    filler = folder / "filler"

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    return fill, lambda: filler.unlink(missing_ok=True), lambda: subprocess.run(["umount", folder], check=True)


def limited_files(folder):
    """The same for files of more than some bytes, everywhere."""
    folder.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        metrics = folder / "run" / "metrics.jsonl"
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 40, limits[1]))

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return fill, make_room, make_room


def can_mount():
    if os.geteuid() != 0 or sys.platform != "linux":
        return False
    # In a mount namespace of its own, which ends with the command.
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


WORDS = {full_filesystem: "No space left on device", limited_files: "File too large"}
DISKS = [*([full_filesystem] if can_mount() else []), limited_files]


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    """(fill, make room, what the system says of it) for the folder `disk` of a recipe."""
    fill, make_room, remove = request.param(tmp_path / "disk")
    yield fill, make_room, WORDS[request.param]
    make_room()
    remove()


@pytest.fixture
def when(monkeypatch):
    """`when(place, step, action)`: do something as a run comes to a place of its loop in this step."""
    actions, on = {}, TimeSpent.on

    def acting(time_spent, part, step, *rest):
        actions.pop((part, step), lambda: None)()
        return on(time_spent, part, step, *rest)

    monkeypatch.setattr(TimeSpent, "on", acting)
    return lambda place, step, action: actions.__setitem__((place, step), action)


@pytest.mark.parametrize(
    ("recipe", "disk"),
    [("pretrain", disk) for disk in DISKS] + [("instruct", DISKS[0]), ("grpo", DISKS[0])],
    indirect=True,
)
def test_a_run_stops_where_a_checkpoint_has_no_room_and_goes_on_once_it_has(recipe, disk, when, capsys):
    fill, make_room, words = disk
    whole = recipe.finished("whole", capsys)
    when("checkpoints", 4, fill)
    code, _, errors = recipe.call("disk/run", capsys)
    folder = recipe.folder / "disk" / "run"
    make_room()
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("error: stopped at the checkpoints of step 4: ") and words in errors
    assert f"; the last good checkpoint is {folder}/checkpoints/0000000" in errors
    assert errors.endswith("; make room, and give the same command again\n")
    last = Checkpoints(folder / "checkpoints").latest_step()
    assert last < 4 and half_written(folder) == []
    assert recipe.finish("disk/run", capsys) == whole


@pretraining
def test_a_run_may_go_on_without_a_checkpoint_but_not_without_its_last(recipe, disk, when, capsys):
    fill, make_room, words = disk
    whole = recipe.finished("whole", capsys)
    when("checkpoints", 4, fill)
    when("input", 6, make_room)
    code, out, errors = recipe.call("disk/run", capsys, on_full_disk="continue")
    assert (code, errors) == (0, "")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: step 4: checkpoint not saved: ")]
    assert words in warning and "; the last good checkpoint is " in warning and warning.endswith("; going on")
    left = recipe.left_by("disk/run")
    assert 4 not in left.pop("checkpoints") and 4 in whole.pop("checkpoints")
    assert left == whole

    when("checkpoints", 6, fill)
    code, out, errors = recipe.call("disk/last", capsys, on_full_disk="continue")
    make_room()
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: stopped at the checkpoints of step 6: ") and "0000000" in errors
    assert not (recipe.folder / "disk" / "last" / "finished.json").exists()
    assert recipe.finish("disk/last", capsys)["state"] == whole["state"]


@pretraining
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_records_without_room_are_not_torn_and_not_lost(recipe, disk, when, capsys, choice):
    fill, make_room, words = disk
    seldom = {"steps": 60, "evaluate_every": 60, "sample_every": 60, "checkpoint_every": 30}
    during = []  # the records on a disk that is full
    whole = recipe.finished("whole", capsys, **seldom)
    when("input", 32, fill)  # after the checkpoint of step 30
    when("input", 58, lambda: (during.extend(records(recipe.folder / "disk" / "run")), make_room()))
    code, out, errors = recipe.call("disk/run", capsys, on_full_disk=choice, **seldom)
    if choice == "stop":
        make_room()
        assert (code, errors.count("\n")) == (2, 1)
        assert f"{words}: {recipe.folder}/disk/run/" in errors and "/checkpoints/00000030; make room" in errors
        assert 30 <= records(recipe.folder / "disk" / "run")[-1]["step"] < 58
        recipe.finish("disk/run", capsys, **seldom)
    else:
        assert (code, errors) == (0, "")
        assert 30 <= during[-1]["step"] < 56  # all lines whole, and some wait
        assert sum(line.startswith("warning: ") for line in out.splitlines()) == 1
        assert f"warning: {words}: {recipe.folder}/disk/run/" in out and "; going on, and writing it later" in out
    assert recipe.left_by("disk/run") == whole


# What changed between start and resume.


@every_recipe
def test_data_that_changed_are_noticed(recipe, capsys):
    recipe.finished("run", capsys)
    unfinished(recipe.folder / "run")
    recipe.data.write_text(recipe.data.read_text().replace("a", "b", 1))
    code, _, errors = recipe.call("run", capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {recipe.folder}/run holds a run with other options: ") and "_sha256 " in errors
    assert "; with its own options and data it goes on; " in errors


@pytest.mark.parametrize("recipe", ["grpo"], indirect=True)
def test_a_reward_that_changed_is_noticed(recipe, capsys):
    recipe.finished("run", capsys)
    unfinished(recipe.folder / "run")
    with open(recipe.folder / "reward.py", "a") as file:
        file.write("\n# Only a comment, but who knows?\n")
    code, _, errors = recipe.call("run", capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"reward_sha256.{recipe.folder}/reward.py " in errors


@pytest.mark.parametrize("recipe", ["instruct", "grpo"], indirect=True)
def test_a_run_goes_on_from_its_checkpoint_whatever_became_of_the_model_it_began_from(recipe, capsys):
    whole = recipe.finished("run", capsys)
    unfinished(recipe.folder / "run", (without_manifest, 6))
    shutil.rmtree(recipe.folder / "model")
    save_model(recipe.folder / "model", seed=2)
    assert recipe.finish("run", capsys) == whole
