"""Where CI=true, what is skipped fails: single tests and whole modules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "test": "import pytest\n@pytest.mark.skip\ndef test_it(): pass\n",
    "module": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n",
}


@pytest.mark.parametrize("case", CASES)
def test_skipping_fails_in_ci_alone(case, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    (tests / "test_skipped.py").write_text(CASES[case] + "def test_other(): pass\n")

    def exit_code(ci):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "CI": ci}, capture_output=True).returncode

    assert exit_code("true") in (1, 2)
    assert exit_code("") in (0, 5)
