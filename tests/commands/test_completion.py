"""What a shell completes after a tab, asked of a real bash."""

import shutil
import subprocess

import pytest

from llmq_jax.commands import VERBS


def completed(script, folder, *words):
    """The answers to a tab after the last of these words."""
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _llmq; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) in ((0, ""), (1, ""))
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_verbs_options_and_files(llmq, tmp_path):
    code, script, err = llmq("completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "model.gguf").touch()
    assert completed(script, tmp_path, "llmq", "") == list(VERBS)
    assert completed(script, tmp_path, "llmq", "gen") == ["generate"]
    assert completed(script, tmp_path, "llmq", "generate", "--max") == ["--max-new-tokens"]
    assert "--help" in completed(script, tmp_path, "llmq", "env", "-")
    assert completed(script, tmp_path, "llmq", "generate", "mo") == ["model.gguf"]
    assert completed(script, tmp_path, "llmq", "generate", "--model") == []
    (tmp_path / "my model [1].gguf").touch()
    (tmp_path / "my m*").touch()
    assert sorted(completed(script, tmp_path, "llmq", "generate", "my")) == ["my m*", "my model [1].gguf"]


def test_zsh_takes_the_same(llmq):
    _, bash, _ = llmq("completion", "bash")
    code, zsh, err = llmq("completion", "zsh")
    assert (code, err) == (0, "")
    assert zsh.endswith(bash) and "bashcompinit" in zsh


def test_another_shell_is_refused(llmq):
    code, out, err = llmq("completion", "fish")
    assert (code, out, err) == (2, "", "error: shell cannot be 'fish': choose from bash, zsh\n")
