import platform
from importlib.metadata import PackageNotFoundError

import jax


def test_block_names_versions_devices_and_machine(llmq, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    code, out, err = llmq("env")
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["python"].startswith(platform.python_version())
    assert rows["jax"] == jax.__version__
    assert rows["devices"] == f"{jax.device_count()} x cpu (cpu)"
    assert rows["XLA_FLAGS"] == "--xla_force_host_platform_device_count=1"
    assert "GiB" in rows["memory"] and "cores" in rows["cpu"]
    for package in ("flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers"):
        assert rows[package]


def test_packages_of_gpus_and_of_comparisons_are_shown_where_they_are_installed(llmq, monkeypatch):
    installed = {"jax": "0.10.2", "jax-cuda13-plugin": "0.10.2", "nvidia-cudnn-cu13": "9.13.0.50", "trl": "1.16.0"}

    def version(package):
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr("llmq_jax.commands.env.version", version)
    rows = dict(line.split(maxsplit=1) for line in llmq("env")[1].splitlines())
    assert rows.items() >= installed.items()
    assert rows["torch"] == "not installed"
    assert not rows.keys() & {"jax-cuda12-plugin", "nvidia-cudnn-cu12", "peft", "lm_eval"}
