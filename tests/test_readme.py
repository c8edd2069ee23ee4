"""What the README shows is run, as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
DOCUMENTED = re.findall(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", DOCUMENTED)
def test_python_examples_run(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    # The same lines on a smaller scale.
    for large, small in (("steps=500", "steps=6"), ("warmup_steps=50", "warmup_steps=2"), (": 128", ": 16")):
        assert large in code
        code = code.replace(large, small)
    exec(compile(code, "README.md", "exec"), {})
    assert "finished: 6 steps" in capsys.readouterr().out


def test_there_are_examples():
    assert len(DOCUMENTED) == 1


def test_linked_files_exist():
    root = Path(__file__).parent.parent
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / link).exists(), link
