"""A whole run for the tests of a module."""

import pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    from tests.training.compared_runs import quiet

    folder = tmp_path_factory.mktemp("runs") / "whole"
    quiet(folder)
    return folder
