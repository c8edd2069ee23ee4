"""Position-wise feed-forward networks."""

from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.linear import Linear, side_by_side


class MLP(nn.Module):
    """Two linear layers with an activation between them (Vaswani et al. 2017, arXiv:1706.03762, eq. 2).

    `gated`: three layers, `down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6), which is SwiGLU
    with `activation="silu"`, GeGLU with one of the GELUs.
    """

    intermediate_size: int
    activation: str
    kernel_init: Initializer
    down_init: Initializer
    """Initialises the kernel of "down", whose output is added to the residual stream."""
    dtype: Dtype | None = None
    use_bias: bool = True
    gated: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def linear(features: int, initialise: Initializer, name: str) -> Linear:
            return Linear(features, self.use_bias, initialise, self.dtype, name=name)

        activation = ACTIVATIONS[self.activation]
        up = linear(self.intermediate_size, self.kernel_init, "up")
        if self.gated:
            gate = linear(self.intermediate_size, self.kernel_init, "gate")
            gate_of_x, up_of_x = side_by_side(x, gate, up)
            hidden = activation(gate_of_x) * up_of_x
        else:
            hidden = activation(up(x))
        return linear(x.shape[-1], self.down_init, "down")(hidden)
