import platform

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
