"""The kind of device that JAX computes on in a command, and the folder of programs compiled for it.

Nothing here imports JAX before it is called, so that commands can read their options first.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmq_jax.errors import BadInput

Device = Literal["auto", "cpu", "gpu", "tpu"]
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # JAX's names, and those of this package's extras
KEPT_PROGRAMS_BYTES = 2**30  # beyond it, those that were not used for longest go
SHORTEST_KEPT_SECONDS = 0.1  # of compilation: below, reading is no faster than compiling


def use_device(device: Device) -> None:
    """Bind JAX to a kind of device, before its first use; BadInput when there is none of that kind.

    "auto" leaves the choice to JAX, which takes the fastest kind that it finds. What is compiled is kept from now on
    (`keep_programs`).
    """
    import jax

    settings: Any = jax.config
    keep_programs()
    # A CPU runs a program when it is called: a step that waits for the one before it would have its temporary memory
    # already, and training takes up to twice as much. Nothing is computed beside it on the same cores anyway.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if device == "auto":
        return
    before = settings.jax_platforms
    jax.config.update("jax_platforms", PLATFORMS[device])
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError):  # JAX has no such backend, could not start it, or (asserting) sees no GPU
        found = "none"
    if found != device:
        jax.config.update("jax_platforms", before)
        raise BadInput(
            f"--device {device}: JAX finds no {device.upper()} here; use --device cpu, or install JAX for your "
            f"{device.upper()}: pip install -e '.[{PLATFORMS[device]}]'"
        )


def keep_programs() -> None:
    """Keep what JAX compiles for the next run of a command, unless JAX_COMPILATION_CACHE_DIR names a place already.

    A folder for each kind of processor: XLA's code for one may not run on another that shares the home directory.
    """
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = home / "llmq_jax" / "programs" / _processor_kind()
        if not _is_writable(folder):  # JAX would warn in the middle of what a command writes
            other = "JAX_COMPILATION_CACHE_DIR=FOLDER chooses another"
            warnings.warn(f"compiled programs are not kept: no file can be made in {folder}; {other}", stacklevel=2)
            return
        _remove_torn(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", KEPT_PROGRAMS_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_KEPT_SECONDS)


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Context in which nothing that is compiled is kept: JAX cannot read programs for devices that are not here."""
    import jax

    settings: Any = jax.config
    before = settings.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if it is missing."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK | os.X_OK)


def _remove_torn(folder: Path) -> None:
    """Remove the programs that a kill or a full disk left half-written: those without the time that JAX writes after
    each. As long as there is one, JAX keeps no others, and warns of it."""
    with contextlib.suppress(OSError):
        for program in folder.glob("*-cache"):
            if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                program.unlink(missing_ok=True)


def _processor_kind() -> str:
    """The instruction sets of this machine, as a short name."""
    try:
        with open("/proc/cpuinfo") as file:
            features = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
