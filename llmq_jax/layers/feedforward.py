"""Position-wise feed-forward networks."""

from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.linear import Linear, side_by_side
from llmq_jax.layers.recomputation import recomputed


class MLP(nn.Module):
    """Two linear layers with an activation between them (Vaswani et al. 2017, arXiv:1706.03762, eq. 2)."""

    intermediate_size: int
    activation: str
    kernel_init: Initializer
    down_init: Initializer
    dtype: Dtype | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = Linear(self.intermediate_size, self.use_bias, self.kernel_init, self.dtype, name="up")
        down = Linear(x.shape[-1], self.use_bias, self.down_init, self.dtype, name="down")
        return down(recomputed(ACTIVATIONS[self.activation])(up(x)))


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6).

    SwiGLU with `activation="silu"`, GeGLU with one of the GELUs.
    """

    intermediate_size: int
    activation: str
    use_bias: bool
    kernel_init: Initializer
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def linear(features: int, name: str) -> Linear:
            return Linear(features, self.use_bias, self.kernel_init, self.dtype, name=name)

        size = self.intermediate_size
        gate, up = side_by_side(x, linear(size, "gate"), linear(size, "up"))

        def gated(gate: Array, up: Array) -> Array:
            return ACTIVATIONS[self.activation](gate) * up

        return linear(x.shape[-1], "down")(recomputed(gated)(gate, up))
