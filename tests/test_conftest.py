"""Where CI=true, what is skipped fails; of products, each value is in a case of the quick suite."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "test": "import pytest\n@pytest.mark.skip\ndef test_it(): pass\n",
    "module": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n",
}


PRODUCT = """
import pytest

@pytest.fixture(params="xyz")
def letter(request):
    return request.param

@pytest.mark.product
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("left", "right"), [(True, 5), (False, 6)])
def test_it(letter, number, left, right): pass

@pytest.mark.parametrize("number", [1, 2])
def test_other(letter, number): pass

@pytest.mark.product("together")
def test_one(letter): pass

@pytest.mark.product("together")
def test_two(letter): pass
"""


@pytest.fixture
def pytest_of(tmp_path):
    """`pytest_of(source, *arguments, ci=...)` -> the finished process of a suite of this one file."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)

    def call(source, *arguments, ci=""):
        (tests / "test_these.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "tests"]
        # Nothing is compiled, so no process needs to try the compiler's flags first.
        environment = {**os.environ, "CI": ci, "OPTIMIZED_TESTS": "true", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return call


@pytest.mark.parametrize("case", CASES)
def test_skipping_fails_in_ci_alone(case, pytest_of):
    source = CASES[case] + "def test_other(): pass\n"
    assert pytest_of(source, ci="true").returncode in (1, 2)
    assert pytest_of(source).returncode in (0, 5)


def test_a_product_s_quick_cases_have_every_value(pytest_of):
    def chosen(marks):
        listing = pytest_of(PRODUCT, "--collect-only", "-q", "-m", marks).stdout
        found = (re.findall(rf"test_{name}\[(.*)\]", listing) for name in ("it", "one", "two"))
        return *found, listing.count("test_other[")

    quick, one, two, others = chosen("not exhaustive")
    assert len(quick) == 3 and others == 6 and (one, two) == (["x", "z"], ["y"])
    assert set("-".join(quick).split("-")) == {"x", "y", "z", "1", "2", "True", "5", "False", "6"}
    rest, one, two, others = chosen("exhaustive")
    assert len(rest) == 9 and not set(rest) & set(quick) and others == 0 and (one, two) == (["y"], ["x", "z"])
