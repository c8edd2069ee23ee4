"""Imported first by a program that is to have 8 virtual devices, and by nothing else: JAX asks for them when it starts,
and what is set here goes on to every process begun after it."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
