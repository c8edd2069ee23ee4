"""How long JAX has been compiling in this process, from the events that JAX itself reports."""

import jax

EVENTS = frozenset(
    f"/jax/core/compile/{event}_duration" for event in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)
"""Tracing, lowering, and XLA's own compilation or, where a program is cached, reading it."""

_seconds = 0.0


def _add(event: str, duration_secs: float, **_: str | int) -> None:
    global _seconds
    if event in EVENTS:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)


def compile_seconds() -> float:
    """Seconds of compilation since this module was imported. The difference of two calls is what was spent between
    them."""
    return _seconds
