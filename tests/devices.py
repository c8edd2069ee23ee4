"""Virtual devices on the CPU: a process must ask for them before JAX starts, so programs that want them are begun with
an environment of their own."""

import os


def with_devices(count: int, optimized: bool = False) -> dict[str, str]:
    """This process's environment, for one that is to have so many devices; `optimized`, for programs that are looked
    at, has them compiled as users have it, and not as quickly as tests do."""
    flags = f"{'' if optimized else os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
