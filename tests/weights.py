"""Weights for tests that need some, whichever they are (`init` traces a whole pass and compiles it), and whether two
trees of them are the same."""

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.models import abstract_variables


def draw_variables(config, seed=0, dtype=np.float32):
    """Variables much as `init` draws them, in numpy, but norms and biases too, around where they begin: in float32
    hardly an element equals another, so that none can be forgotten or stand in another's place. A test of how a step
    moves the bias of a router needs it at 0."""
    rng = np.random.default_rng(seed)
    norms = 0.0 if config.norm == "zero_centred_rms_norm" else 1.0

    def draw(path, leaf):
        beginning = norms if path[-1].key in ("scale", "alpha") else 0.0
        drawn = beginning + config.initializer_range * rng.standard_normal(leaf.shape)
        return jnp.array(drawn.astype(dtype))  # a copy, which a step may be given for good

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(config))


def assert_equal_trees(found, expected):
    """The same structure, shapes, types and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        np.testing.assert_array_equal(left, right)  # which shows where they differ
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
