"""Folders that are written whole or not at all."""

import errno
import os
import re

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.whole_folders import check_target, whole_folder


@pytest.mark.parametrize("name", ["new", "new/export"])
def test_a_place_where_nothing_may_be_written_is_refused_in_words(name, tmp_path, monkeypatch):
    """Asked of the system, because a superuser may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    fault = re.escape(f"{tmp_path / name}: this user may not write in {tmp_path}; name another folder")
    with pytest.raises(BadInput, match=fault):
        check_target(tmp_path / name, False, "config.json", ("config.json",))
    with pytest.raises(BadInput, match=fault), whole_folder(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    ("of_library", "named"), [(False, None), (False, ""), (False, "weights"), (True, None)], ids=str
)
def test_a_disk_that_is_full_is_told_with_the_place_that_was_asked_for(of_library, named, number, tmp_path):
    """Not with the folder beside it, which is gone again; and a quota is no disk."""
    folder, words = tmp_path / "export", os.strerror(number)
    place = folder / named if named else folder
    with pytest.raises(OSError, match=re.escape(f"{words}: '{place}'")) as raised, whole_folder(folder) as partial:
        if of_library:
            raise RuntimeError(f"I/O error: {words} (os error {number})")
        raise OSError(number, words, *([] if named is None else [str(partial / named)]))
    assert raised.value.errno == number
    assert list(tmp_path.iterdir()) == []
