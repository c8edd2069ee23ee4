"""Lets the tests import tiny_run.py, which is a script too, and has a whole run for those of a module."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    from compared_runs import quiet

    folder = tmp_path_factory.mktemp("runs") / "whole"
    quiet(folder)
    return folder
