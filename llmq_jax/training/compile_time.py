"""How long JAX has been compiling in this process: told by the events that JAX itself reports."""

import jax

EVENTS = frozenset(
    f"/jax/core/compile/{event}_duration" for event in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
"""Tracing, lowering, and XLA's own work, which reading a kept program stands for where there is one."""

_seconds = 0.0


def _add(event: str, duration_secs: float, **_: str | int) -> None:
    global _seconds
    if event in EVENTS:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)


def compile_seconds() -> float:
    """Since this module was imported. The difference of two calls is what was compiled between them."""
    return _seconds
