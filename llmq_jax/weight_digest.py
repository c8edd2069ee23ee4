"""A digest of a model's weights, to tell them from another model's, whatever files they were read from."""

import hashlib
from typing import Any

import jax

from llmq_jax.field_types import refuse_consumed
from llmq_jax.layers.axes import on_host


def weight_digest(variables: dict[str, Any]) -> str:
    """SHA-256 of all numbers, in the type that they have in memory. On a mesh of several processes all must call it.
    BadInput for variables that a training step has consumed."""
    refuse_consumed(variables)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(on_host(leaf).tobytes())
    return digest.hexdigest()
