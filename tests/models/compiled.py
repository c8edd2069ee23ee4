"""A model's passes as one program each, shared by all tests that ask for the same: run operation by operation, every
operation is compiled alone."""

from functools import partial

import jax


@partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, variables, *inputs, rngs=None, method=None):
    return model.apply(variables, *inputs, rngs=rngs, method=method)


@partial(jax.jit, static_argnums=0)
def decode(model, outside, layers, tokens, positions, caches):
    """(logits of these tokens, the caches with them)."""
    output = model.decode(outside, layers, tokens, positions, caches)
    return model.apply(outside, output.hidden, method="unembed"), output.caches
