"""Who hears the last words of another process; real processes are in tests/train/test_processes.py."""

import io
import threading
from types import SimpleNamespace

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.training import last_words


class Full:
    """A log on a disk that has no room."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    flush = write


@pytest.fixture
def heard(monkeypatch):
    """`heard(stderr)` -> whether a process that has heard another's last words ends."""
    ended = []
    client = SimpleNamespace(blocking_key_value_get=lambda key, milliseconds: "process 1 ended: no room")
    monkeypatch.setattr(last_words, "_state", lambda: SimpleNamespace(client=client, process_id=0))
    monkeypatch.setattr(last_words, "GRACE_SECONDS", 0)
    monkeypatch.setattr(last_words, "_exit", lambda: ended.append(True))

    def listen(stderr):
        monkeypatch.setattr("sys.__stderr__", stderr)
        last_words._listen(threading.Lock())
        return ended == [True]

    return listen


def test_it_ends_where_its_own_words_find_no_room(heard):
    assert heard(Full())


def test_it_ends_where_nobody_listens(heard):
    closed = io.StringIO()
    closed.close()
    assert heard(closed)


def test_it_leaves_to_itself_a_process_that_is_ending(monkeypatch, heard):
    taken = threading.Lock()
    taken.acquire()
    monkeypatch.setattr(threading, "Lock", lambda: taken)
    assert not heard(Full())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BadInput("a.txt\n  is empty"), "a.txt is empty"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(2, "No such file or directory", "a.txt"), "No such file or directory: a.txt"),
        (ValueError("a"), "ValueError: a"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_last_words_are_one_line(error, words):
    assert last_words._in_one_line(error) == words
