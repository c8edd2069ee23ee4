"""Every command that the README, the docs and the help texts show is run, page by page and in their order: with all its
options, and others after them that make it small, on stand-ins for what it names (tests/documented_disk.py)."""

import contextlib
import functools
import gc
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import pytest

import bench.measure
import bench.report
import bench.rows
from bench.rows import TrainStep, gpt2
from llmq_jax import models
from llmq_jax.errors import BAD_INPUT
from llmq_jax.interop import evaluation_harness
from tests.devices import with_devices
from tests.documented import PAGES, PROGRAMS, ROOT, commands
from tests.documented_disk import MADE, write_disk
from tests.harness_tasks import leave_out_what_takes_seconds
from tests.ports import free_port
from tests.programs import ended
from train import arithmetic

pytestmark = pytest.mark.exhaustive

NOT_RUN = {
    "make demo": "trains for minutes; its program is run by tests/train/test_demo.py",
    "make test": "is this suite",
    "make test-all": "is this suite",
    "make lint": "a step of its own in .ci/run",
    "make test-golden PYTHON=python3.14": "installs packages for another Python",
    "make test-oldest": "installs other versions of all packages",
    "make fuzz": "10,000 inputs; tests/fuzz tries 300",
    "xprof --port 8791 runs/mine/profile": "serves pages, from a package of its own",
}
OTHER_OUTCOMES = (
    (r"bench\.gpu", 2),  # where there is no GPU
    ("--compile-for", 2),  # nor a compiler for TPUs
    (r"train\.plan .*--device-memory 60$", 1),  # does not fit
    ("--inject", 1),  # a fault that is to be found
    (r"bench\.figures attention", 2),  # the stand-in has too few heads; tests/bench/test_figures.py draws it
)
FRESH = r"train\.pretrain(?!.* --(init-from|layout))"
SAMPLED = r"out runs/(mine|dpo)\b|sample|options|layout|preview|help"
"""Some runs of each recipe, and what says itself whether it samples; the others do not."""
SMALLER = (
    (r"train\.pretrain(?!.* --layout)", "--steps 1 --context 16 --warmup-steps 0"),
    (r"train\.pretrain(?!.* --(layout|mesh|coordinator))", "--batch-size 2"),  # those need the rows that they ask for
    (r"train\.(classifier|instruct|reward|dpo) .*--data", "--epochs 0.01"),  # a step
    (FRESH, "--hidden-size 32 --num-attention-heads 2"),
    (rf"{FRESH}(?!.*layer_types)", "--num-hidden-layers 1"),
    (rf"{FRESH}.* --preset deepseek", "--num-hidden-layers 2"),  # a dense one, and one of experts
    (rf"train\.(pretrain|instruct|dpo|grpo)(?!.* --({SAMPLED}))", "--sample-every 0"),
    (r"train\.plan .*--preset deepseek", "--config num_hidden_layers=4"),
    ("--preset gemma", "--context 64"),  # the window, which must not be longer
    ("--preset deepseek", "--context 128"),  # room for what is generated then
    (r"train\.pretrain(?!.* --(data|layout|options))", "--evaluate-batches 2"),  # of the standard library
    ("--out runs/rate-", "--steps 2"),  # which have a speed, to be drawn over seconds
    ("--profile 10:15", "--steps 15"),
    (r"train\.grpo", "--steps 1 --prompts-per-step 2 --group-size 2 --max-new-tokens 8"),
    ("--judge", "--steps 3 --steps-per-iteration 2"),
    ("--lora-layers 20-29", "--lora-layers 0-0"),
    ("--branch-from", "--branch-from runs/plateau --steps 3 --decay-steps 1"),
    (r"train\.arithmetic", "--steps 1"),
    (r"bench\.run", "--seconds 0.01 --rounds 5"),  # as many as --write wants: measured once for all
    (r"bench\.figures (rope|windows) --out docs", "--out figure.png"),
    ("/shared/text", "--data text --tokenizer bytes --out shared/tokens"),
    ("/shared/runs", "--out shared/runs/mine --coordinator 127.0.0.1:{port}"),
)
"""What the options of a command are followed by where they match; the last one counts."""


def pages():
    """(path, commands) of each file: those that no other one runs, and those that make what a later one reads."""
    shown = set()
    for path in [*PAGES[1:], PAGES[0], *PROGRAMS]:  # the README repeats the pages
        found = [command for command in commands(path) if str(command) not in NOT_RUN]
        run, read = [], set()
        for command in reversed(found):
            if kind(command) not in shown or any(makes(command, name) for name in read):
                run.insert(0, command)
                read = {name for name in read.union(all_arguments(command)) if not makes(command, name)}
        shown.update(map(kind, found))
        yield path, run


def makes(command, name):
    return any(Path(target).is_relative_to(name) for target in targets(command))


def kind(command):
    """Its words, but of files that it reads and writes no more than their types."""
    pairs = itertools.pairwise(("", *command.words))
    return tuple(Path(word).suffix if option in ("--data", "--out") else word for option, word in pairs)


@pytest.fixture(scope="session")
def whole_disk(tmp_path_factory):
    """All stand-ins and all runs that pages take for granted."""
    disk = tmp_path_factory.mktemp("disk")
    write_disk(disk)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(disk)
        for command, names in MADE:
            program, *arguments = shlex.split(command)
            assert ended(program, *arguments) == 0
            for name in names:
                shutil.copytree(arguments[arguments.index("--out") + 1], name)
    return disk


@pytest.fixture
def disk(whole_disk, tmp_path, monkeypatch):
    """A copy of it to work in, as one's home; what no option makes small, or asks the hub, is small and local."""
    disk = tmp_path / "disk"
    shutil.copytree(whole_disk, disk)
    monkeypatch.chdir(disk)
    for name, folder in (("HOME", "."), ("XDG_CACHE_HOME", ".cache")):
        monkeypatch.setenv(name, str(disk / folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    leave_out_what_takes_seconds(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk / "datasets")
    tasks = evaluation_harness._task_manager
    hub = disk / "tasks_of_the_hub"
    monkeypatch.setattr(evaluation_harness, "_task_manager", lambda names, folder: tasks(names, folder or hub))

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"prompts_per_step": 2, "group_size": 2, "validation_prompts": 4}
    for name, value in (
        ("WATCHED", 8),
        ("ENOUGH", 0.0),
        ("WARM_UP_BATCH", 4),
        ("SIZES", {**arithmetic.SIZES, **sizes}),
        ("SETTINGS", {**arithmetic.SETTINGS, **settings}),
    ):
        monkeypatch.setattr(arithmetic, name, value)
    # Of a figure's time half goes to where its parts have room.
    monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None)
    yield disk
    jax.clear_caches()
    gc.collect()


def targets(command):
    """What the command promises to leave on the disk."""
    arguments = all_arguments(command)
    given = options(command)
    if {"--preview", "--layout", "--help"} & {*arguments} or command.program == "train.plan":
        return []
    if command.stdout:
        return [command.stdout]
    if command.program == "train.report":
        return [f"{arguments[0]}/report.html"]
    if command.program.startswith("convert.") and command.program != "convert.parity":
        return [arguments[1]]
    if command.program == "train.prepare":
        return [given["--out"]]
    if command.program == "train.arithmetic":
        return [f"{given['--out']}/run/finished.json"]
    if command.program.startswith("train."):
        profile = ["profile"] if "--profile" in given else []
        return [f"{run_folder(command)}/{name}" for name in ("finished.json", "report.html", *profile)]
    return [given[name] for name in ("--out", "--write") if name in given]


def run_folder(command):
    given = options(command)
    return given.get("--out", f"runs/{given.get('--preset', 'demo')}")


def options(command):
    return {name: value for name, value in itertools.pairwise(all_arguments(command)) if name.startswith("--")}


def all_arguments(command):
    """The documented ones, and those that make it small."""
    added = [word for match, words in SMALLER if re.search(match, str(command)) for word in words.split()]
    return [*command.arguments, *added]


def run_here(command, monkeypatch):
    """The exit code of a command in this process, with standard input and output as the shell would give them."""
    if "chats.jsonl" in command.words:
        shutil.copy("conversations.jsonl" if command.program == "train.instruct" else "pairs.jsonl", "chats.jsonl")
    if command.program == "bench.run":
        only_tiny_rows(command, monkeypatch)
    with contextlib.ExitStack() as stack:
        if command.words[1] == "models":  # tests/commands/test_models.py counts those of all
            few = {name: models.PRESETS[name] for name in ("gpt2-124m", "llama-10m")}
            stack.enter_context(monkeypatch.context()).setattr(models, "PRESETS", few)
        typed = io.TextIOWrapper(io.BytesIO(b"Hello\n"))
        stdin = stack.enter_context(open(command.stdin)) if command.stdin else typed
        monkeypatch.setattr("sys.stdin", stdin)
        if command.stdout:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(command.stdout, "w"))))
        return ended(command.program, *all_arguments(command))


TINY = TrainStep("tiny", gpt2(1, 2, 16, 8, 31), batch=2, context=8, sides=("ours", "plain torch, eager"))
measure_row = bench.measure.measure


@functools.cache
def measured(rounds, seconds):
    return measure_row(TINY, rounds, seconds, print)


def only_tiny_rows(command, monkeypatch):
    """Of those that are named, or one, all the same: measured once."""
    names = [name for name in bench.rows.ROWS if name in command.words] or ["gpt2-step-256"]
    for module in (bench.rows, bench.report):
        monkeypatch.setattr(module, "ROWS", dict.fromkeys(names, TINY))
    monkeypatch.setattr(bench.measure, "measure", lambda row, rounds, seconds, report: measured(rounds, seconds))


def run_apart(together):
    """Exit codes of commands that begin at the same time, in processes of their own, with 8 devices among them."""
    port, processes = free_port(), []
    for command in together:
        line = [sys.executable, "-m", command.program, *(word.format(port=port) for word in all_arguments(command))]
        processes.append(subprocess.Popen(line, env=with_devices(8 // len(together))))
    return [process.wait(timeout=300) for process in processes]


def groups(found):
    """Commands that run together: several processes of one run, else each by itself."""
    for _, group in itertools.groupby(found, key=lambda command: "--coordinator" in command.words or command.line):
        yield list(group)


def in_shell(command):
    """The exit code of a tool of this repository, which is run there; files are fetched to the test's own folder."""
    assert "install" not in command.words, f"{command.where}: changes the environment of the tests; do not indent it"
    folder = None if "download" in command.words else ROOT
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    line = " ".join(command.words)
    return subprocess.run(line, shell=True, cwd=folder, env={**os.environ, "PATH": path}, timeout=300).returncode


CASES = [pytest.param(found, id=str(path.relative_to(ROOT))) for path, found in pages() if found]


@pytest.mark.parametrize("found", CASES)
def test_every_command_runs(found, disk, capfd, monkeypatch):
    for together in groups(found):
        first = together[0]
        if first.program.startswith("train.") and "--preview" not in first.words:
            shutil.rmtree(run_folder(first), ignore_errors=True)  # pages show several ways to make one run
        if not first.is_ours:
            codes = [in_shell(first)]
        elif re.search(r"--coordinator|train\.(?!plan).* --mesh (?!.* --layout)", str(first)):
            codes = run_apart(together)
        else:
            codes = [run_here(first, monkeypatch)]
        said = capfd.readouterr()
        expected = next((code for match, code in OTHER_OUTCOMES if re.search(match, str(first))), 0)
        assert codes == [expected] * len(together), f"{first.where}: {first}\n{said.err[-3000:]}"
        if expected == BAD_INPUT:
            assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
            continue
        left = targets(first)
        assert left or said.out, f"{first.where}: {first}: nothing came of it"
        assert all(map(os.path.exists, left)), f"{first.where}: {first}: {left}"


def test_the_tables_are_of_commands_that_exist():
    shown = [str(command) for path in [*PAGES, *PROGRAMS] for command in commands(path)]
    assert NOT_RUN.keys() <= set(shown)
    for match in dict((*SMALLER, *OTHER_OUTCOMES)):
        assert any(re.search(match, command) for command in shown), match
