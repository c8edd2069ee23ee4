"""The `llmq` script: its verbs, and how fast and how politely it answers."""

import re
import subprocess
import sys

import pytest

import llmq_jax as lq
from llmq_jax import commands


def test_help_lists_every_verb(llmq):
    code, out, err = llmq("--help")
    assert (code, err) == (0, "")
    for verb in commands.VERBS:
        assert re.search(rf"^  {verb} +[A-Z].*\.$", out, re.MULTILINE)
    assert llmq() == (code, out, err)


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_of_a_verb_gives_every_option_a_meaning(llmq, verb):
    code, out, _ = llmq(verb, "--help")
    assert code == 0 and f"usage: llmq {verb}" in out
    assert "(default: None)" not in out


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
