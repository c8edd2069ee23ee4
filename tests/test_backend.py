"""The device that commands compute on, and the programs that they keep."""

import os
import re
import subprocess
import sys

import pytest

from llmq_jax.backend import use_device


@pytest.mark.parametrize(("device", "extra"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_device_that_is_not_there_is_refused(device, extra):
    """In a process of its own: JAX binds to its devices once."""
    program = f"from llmq_jax.backend import use_device\nuse_device('{device}')"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    told = f"BadInput: --device {device}: JAX finds no {device.upper()} here; use --device cpu, or install JAX for"
    assert told in ended.stderr and f"pip install -e '.[{extra}]'" in ended.stderr


def test_device_that_is_there_is_used():
    use_device("auto")
    use_device("cpu")


COMPILING = """
import jax
from llmq_jax.backend import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""


def test_programs_that_a_kill_or_a_full_disk_left_half_written_are_compiled_and_kept_again(tmp_path):
    """JAX writes the time of an entry after it. Where that is missing, it would read torn programs and write no others,
    and warn of each, whenever a command runs."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def compiled():
        """{program: its size}"""
        ended = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, env=environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        return {path: path.stat().st_size for path in tmp_path.rglob("*-cache")}

    whole = compiled()
    assert len(whole) > 0
    for path in whole:
        os.truncate(path, 100)
        path.with_name(path.name.replace("-cache", "-atime")).unlink()
    again = compiled()
    assert again.keys() == whole.keys() and min(again.values()) > 100


def test_one_line_tells_that_programs_are_not_kept(tmp_path):
    """JAX would warn of each program, in the middle of what a command writes."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    ended = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0 and ended.stderr.count("Warning: ") == 1
    folder = re.escape(str(tmp_path / "file" / "llmq_jax"))
    assert re.search(
        rf"compiled programs are not kept: no file can be made in {folder}\S*; JAX_COMPILATION_CACHE_DIR=", ended.stderr
    )
