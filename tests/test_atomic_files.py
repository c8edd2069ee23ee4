import errno
import os
from pathlib import Path

import pytest

from llmq_jax import atomic_files
from llmq_jax.atomic_files import AppendedFile, full_disk, write_atomically


class Disk:
    """Takes so many bytes more of a file that is opened after it was patched in."""

    def __init__(self, room):
        self.room = room

    def open(self, *arguments, **named):
        disk, file = self, open(*arguments, **named)  # noqa: SIM115

        class Limited:
            def write(self, data):
                taken = min(disk.room, len(data))
                if not taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.room -= taken
                return file.write(data[:taken])

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Limited()


def test_a_piece_without_room_is_left_out_as_a_whole_and_comes_later(tmp_path, monkeypatch):
    disk = Disk(9)
    monkeypatch.setattr(atomic_files, "open", disk.open, raising=False)
    file = AppendedFile(tmp_path / "file")
    file.append(b"one\n")
    for piece in (b"twenty\n", b"three\n"):
        with pytest.raises(OSError, match=r"No space left on device: .*file"):
            file.append(piece)
        assert (tmp_path / "file").read_bytes() == b"one\n"
        disk.room = 2
    with pytest.raises(OSError, match="No space left"):
        file.sync()
    disk.room = 100
    file.append(b"four\n")
    assert (tmp_path / "file").read_bytes() == b"one\ntwenty\nthree\nfour\n"
    file.close()


def test_an_atomic_write_without_room_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(atomic_files, "open", Disk(0).open, raising=False)
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "file", b"new")
    assert (error.value.filename, os.listdir(tmp_path)) == (str(tmp_path / "file"), ["file"])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_is_written_is_on_the_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.name, path.read_bytes() if path.is_file() else "folder"))
        fsync(descriptor)

    def replaced(old, new):
        done.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "file", b"new")
    assert done == [(".file.partial", b"new"), "file", (tmp_path.name, "folder")]
    file = AppendedFile(tmp_path / "lines")
    file.append(b"one\n")
    file.sync()
    file.close()
    assert done[3:] == [("lines", b"one\n")]


def test_what_a_full_disk_is_told_by():
    assert full_disk(OSError(errno.EDQUOT, "text", "file")) == "Disk quota exceeded: file"
    assert full_disk(ValueError("RESOURCE: Failed: No space left on device [code='28']")) == "No space left on device"
    assert full_disk(OSError(errno.EACCES, "No space left on device")) is None
    assert full_disk(ValueError("wrong")) is None
