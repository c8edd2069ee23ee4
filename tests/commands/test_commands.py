"""The `llmq` script: its verbs, and how fast and how politely it answers."""

import dataclasses
import importlib
import re
import subprocess
import sys
import typing

import pytest

import llmq_jax as lq
from llmq_jax import command_line, commands
from llmq_jax.errors import BadInput


def test_help_lists_every_verb(llmq):
    code, out, err = llmq("--help")
    assert (code, err) == (0, "")
    for verb in commands.VERBS:
        assert re.search(rf"^  {verb} +[A-Z].*\.$", out, re.MULTILINE)
    assert llmq() == llmq("help") == (code, out, err)
    assert llmq("help", "models") == llmq("models", "--help")


COMMANDS = [
    *commands.VERBS.values(),
    "train.pretrain",
    "train.demo",
    "convert.from_hf",
    "convert.to_hf",
    "convert.openai_gpt2",
    "convert.parity",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_gives_every_option_a_meaning_and_a_default_that_means_something(name, capsys):
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as exit:
        command_line.run(main, ["--help"], program="it")
    out = " ".join(" ".join(line.strip("│") for line in capsys.readouterr().out.splitlines()).split())
    assert exit.value.code == 0 and "usage: it" in out
    assert "(default: None)" not in out and "(default: )" not in out
    options = typing.get_type_hints(main)["options"]
    for field in dataclasses.fields(options):
        shown = rf"(--{field.name.replace('_', '-')}|{field.name.upper().replace('_', '-')})(, --no-\S+)?"
        assert re.search(rf" \[?{shown}", out), field.name
        assert not re.search(rf" {shown}( [A-Z]+| \{{[^}}]*\}})* \((default|required|repeatable)", out), field.name


@pytest.mark.parametrize(
    ("verb", "words"),
    [("generate", ["--prompt", "a"]), ("chat", []), ("evaluate", [__file__]), ("classify", ["--text", "a"])],
)
def test_weights_are_read_in_the_type_that_is_given(llmq, monkeypatch, verb, words):
    def load(source, dtype=None):
        raise BadInput(f"{source} in {dtype}")

    monkeypatch.setattr(lq, "load", load)
    assert llmq(verb, "model", *words, "--dtype", "bfloat16") == (2, "", "error: model in bfloat16\n")


def test_version(llmq):
    assert llmq("--version") == (0, f"llmq {lq.__version__}\n", "")


def test_misspelt_verb_names_the_nearest(llmq):
    code, out, err = llmq("genrate")
    assert (code, out) == (2, "")
    assert err == "error: unknown command 'genrate' for llmq: did you mean generate?\n"


def test_help_does_not_wait_for_jax():
    program = (
        "import sys\nfrom llmq_jax import commands\n"
        "sys.argv = ['llmq', 'generate', '--help']\n"
        "try:\n    commands.main()\nexcept SystemExit:\n    pass\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\nprint('light')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.endswith("light\n"), ended.stderr
