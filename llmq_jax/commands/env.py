"""Show versions, devices and machine, as a block to paste into a bug report."""

import itertools
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "llmq_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "tiktoken",
    "safetensors",
    "torch",
    "transformers",
)
IF_INSTALLED = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "peft",
    "trl",
    "lm_eval",
)
"""Packages that many machines do not need: shown only where they are installed."""
VARIABLES = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Options:
    """Show versions, devices and machine, as a block to paste into a bug report."""


def main(options: Options) -> None:
    rows = {"python": f"{platform.python_version()} ({sys.executable})"}
    for package in (*PACKAGES, *IF_INSTALLED):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            if package in PACKAGES:
                rows[package] = "not installed"
    rows["devices"] = _devices()
    rows["cpu"] = f"{processor()}, {os.cpu_count()} logical cores"
    rows["memory"] = memory()
    rows["system"] = platform.platform()
    rows |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def _devices() -> str:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a broken CUDA installation is what this block is for
        return f"JAX cannot start: {' '.join(str(error).split())}"
    kinds = [device.device_kind for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) + f" ({devices[0].platform})"


def processor() -> str:
    """The processor's name, with the numbers that tell its generation, since virtual machines leave that out of the
    name."""
    try:
        with open("/proc/cpuinfo") as file:
            first = itertools.takewhile(str.strip, file)
            told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
        return "{model name} (family {cpu family}, model {model})".format_map(told)
    except (OSError, KeyError):  # not Linux, or an ARM kernel, which does not say
        return platform.processor() or platform.machine()


def memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"
