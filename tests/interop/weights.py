"""What the tests of every architecture's weights begin with."""

import jax
import numpy as np
import pytest

from llmq_jax.errors import BadInput
from llmq_jax.models import abstract_variables


def draw_variables(config, dtype=np.float32):
    """Every element of every leaf is different, so that none can be in another's place."""
    leaves, structure = jax.tree.flatten(abstract_variables(config))
    rng = np.random.default_rng(0)
    return structure.unflatten([rng.standard_normal(leaf.shape).astype(dtype) for leaf in leaves])


def refused(call, *arguments, **named) -> str:
    """The one line with which the call is refused."""
    with pytest.raises(BadInput) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
