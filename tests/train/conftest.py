"""A small text, the options of a tiny run on it, and the pictures of runs."""

import gc
import random
from dataclasses import replace

import jax
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import engine
from tests.programs import ended


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    words = random.Random(0)
    path.write_text("\n".join(" ".join(words.choices(["ab", "abba", "baab", "a"], k=8)) for _ in range(60)))
    return path


@pytest.fixture
def drawn():
    """For a test whose run draws its curves; one of each recipe does."""


@pytest.fixture(autouse=True)
def drawn_where_asked(request, monkeypatch):
    """Drawing takes two seconds of every run, most of it in matplotlib: other tests' pictures are empty."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, image, **options: None)


@pytest.fixture
def beside_state(monkeypatch):
    """A list that gets, as a recipe hands its state to the engine, the bytes of arrays that it still has beside that,
    as a part of those of the layers; the recipe ends there."""
    found, before = [], jax.live_arrays()

    def run(state, *_, **__):
        gc.collect()
        known = {id(array) for array in (*before, *jax.tree.leaves(state))}
        layers = sum(
            leaf.nbytes
            for tree in state.variables.values()
            for name, stack in tree.items()
            if name.startswith("group_")
            for leaf in jax.tree.leaves(stack)
        )
        found.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in known) / layers)
        raise BadInput("measured")

    monkeypatch.setattr("llmq_jax.training.engine.run", run)
    return found


@pytest.fixture
def at_first_step(monkeypatch):
    """Runs end where their first step would be, and this is what they tell then: for tests of what is read, told and
    written before."""

    def train(loop, output):
        raise BadInput("as far as the first step")

    whole_run = engine.run

    def run(state, step, batches, options, **others):  # without the evaluation that comes before the first step
        return whole_run(state, step, batches, replace(options, evaluate_first=False), **others)

    monkeypatch.setattr(engine._Loop, "train", train)
    monkeypatch.setattr(engine, "run", run)
    return "error: as far as the first step\n"


TINY = [
    "--num-hidden-layers=1",
    "--hidden-size=16",
    "--num-attention-heads=2",
    "--context=16",
    "--steps=6",
    "--batch-size=4",
    "--learning-rate=1e-2",
    "--log-every=1",
    "--checkpoint-every=3",
]


def run_pretrain(text_file, options, tiny=TINY):
    """The exit code of a tiny run; TEXT stands for the text file. Options given win over the tiny ones."""
    return ended("train.pretrain", *(text_file if option == "TEXT" else option for option in (*tiny, *options)))


@pytest.fixture
def pretrain(capsys, monkeypatch, tmp_path, text_file):
    """`pretrain(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options, tiny=TINY):
        return run_pretrain(text_file, options, tiny), *capsys.readouterr()

    return call


PRETRAINED = ("--data", "TEXT", "--out", "run", "--sample-every", 0, "--seed", 5, "--dropout", 0.1)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, text_file):
    """A folder with the finished run of PRETRAINED, for tests that read it or copy it."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_pretrain(text_file, PRETRAINED) == 0
    return folder
