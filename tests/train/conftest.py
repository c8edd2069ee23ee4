"""A small text and the options of a tiny run on it."""

import random

import pytest


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    words = random.Random(0)
    path.write_text("\n".join(" ".join(words.choices(["ab", "abba", "baab", "a"], k=8)) for _ in range(60)))
    return path


TINY = [
    "--num-hidden-layers=2",
    "--hidden-size=16",
    "--num-attention-heads=2",
    "--context=16",
    "--steps=6",
    "--batch-size=4",
    "--learning-rate=1e-2",
    "--log-every=1",
]


@pytest.fixture
def pretrain(capsys, monkeypatch, tmp_path, text_file):
    """`pretrain(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder; TEXT
    stands for the text file. Options given win over the tiny ones."""
    from llmq_jax.command_line import run
    from train.pretrain import main, starting_options

    monkeypatch.chdir(tmp_path)

    def call(*options, tiny=TINY):
        arguments = [str(text_file) if option == "TEXT" else str(option) for option in (*tiny, *options)]
        with pytest.raises(SystemExit) as exit:
            run(main, arguments, program="python -m train.pretrain", defaults=starting_options)
        return exit.value.code, *capsys.readouterr()

    return call
