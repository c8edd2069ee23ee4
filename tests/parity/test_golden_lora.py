"""The original repository's LoRA layer: output, loss and gradients. It calls B what is applied first."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llmq_jax.layers.linear import Linear
from tests.parity.golden import read_golden


def test_a_linear_layer_with_an_adapter():
    arrays, meta = read_golden("lora")
    scale = meta["alpha"] / meta["r"]
    layer = Linear(arrays["param/linear.weight"].shape[0], kernel_init=nn.initializers.zeros)
    params = {"kernel": jnp.asarray(arrays["param/linear.weight"].T), "bias": jnp.asarray(arrays["param/linear.bias"])}
    factors = {"A": jnp.asarray(arrays["param/B"]), "B": jnp.asarray(arrays["param/A"])}
    variables = {"params": params, "lora_fixed": {"kernel": {"scale": jnp.float32(scale)}}}

    def loss(factors, params):
        y = layer.apply({**variables, "params": params, "lora": {"kernel": factors}}, jnp.asarray(arrays["in/x"]))
        return (y * arrays["in/cotangent"]).sum(), y

    (value, y), (gradients, of_params) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(factors, params)
    np.testing.assert_allclose(y, arrays["out/y"], atol=1e-5)
    np.testing.assert_allclose(value, arrays["out/loss"], rtol=1e-5)
    found = {"B": gradients["A"], "A": gradients["B"], "linear.bias": of_params["bias"]}
    found |= {"linear.weight": of_params["kernel"].T}
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, arrays[f"grad/{name}"], atol=1e-5, err_msg=name)
