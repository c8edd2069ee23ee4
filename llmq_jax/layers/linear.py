"""The one linear layer: every product of activations with a weight matrix goes through it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from llmq_jax.layers.axes import axis_sizes, target_platform
from llmq_jax.layers.lora import EXPERT_KERNELS, LORA, LORA_FIXED, adapted
from llmq_jax.layers.repetition import repeated

KERNEL, KERNEL_BY_OUTPUT, JOINED_KERNELS = "kernel", "kernel_by_output", "joined_kernels"
TIED_HEAD = "head"
"""Beside a table of embeddings, once `rounded` has been there: the same as the head that it serves as."""
IN_FLOAT32 = ("router", "noise")
"""Layers, of experts, that compute in float32 whatever the others do."""
# Up to so many rows a product counts as one of few rows: see `times_transposed`.
FEW_ROWS = 64
# What a GPU loads at once; rows are filled up to a multiple of it.
ROW_BYTES = 128
# Layers that share one input, by their names in attention and in feed-forward networks.
SIDE_BY_SIDE = (
    ("query", "key", "value"),
    ("query", "latent_down"),
    ("query_down", "latent_down"),
    ("gate", "up"),
)


class JoinedKernels(struct.PyTreeNode):
    """What a layer holds in place of its kernel once `by_output` has joined the kernels of several layers."""

    kernels: Float[Array, "out D"]
    """The kernels of all these layers, one array that each of them refers to."""
    names: tuple[str, ...] = struct.field(pytree_node=False)
    """The names of these layers, in the order of their rows in `kernels`."""
    start: int = struct.field(pytree_node=False)
    end: int = struct.field(pytree_node=False)

    @property
    def own(self) -> Float[Array, "rows D"]:
        """The kernel of the layer that holds this: rows `start` to `end`."""
        return self.kernels[self.start : self.end]


class Linear(nn.Module):
    """`y = x W + b` over the last axis of x, with a kernel laid out (in, out...).

    `features` may have several axes: attention asks for (3, N, H) and gets queries, keys and values apart and split
    into heads without a reshape, so that heads stay an axis that can be sharded.
    """

    features: int | tuple[int, ...]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: Dtype | None = None
    """Type to compute in; None computes in the kernel's own type."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch D"],
        product: Float[Array, "..."] | None = None,
        batch: tuple[int, ...] | None = None,
    ) -> Float[Array, "..."]:
        """`product` is x W, if `side_by_side` has computed it already. `batch` is the leading shape of the result, if x
        comes as rows [M, D]."""
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        y = self.times_kernel(x, features) if product is None else product
        y = y.reshape(-1, *features)  # [M, *features]
        if self.has_variable(LORA_FIXED, KERNEL):
            y = self.adapt(x, y)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features)
            y = y + repeated(bias, y)
        return y.reshape(*(x.shape[:-1] if batch is None else batch), *features)

    @nn.nowrap
    def times_kernel(self, x: Float[Array, "*batch D"], features: tuple[int, ...]) -> Float[Array, "M ..."]:
        """x W, whichever layout of W the parameters hold."""
        params = self.variables.get("params", {})
        if {KERNEL_BY_OUTPUT, JOINED_KERNELS} & params.keys():  # as from `by_output`
            return _by_rows(x, flat_by_output(params), self.dtype)
        # Initialised as the flat matrix it is, so that initialisers see fan-in = D and fan-out = all features.
        width = x.shape[-1]
        kernel: Array = self.param(
            KERNEL, lambda key: self.kernel_init(key, (width, math.prod(features))).reshape(width, *features)
        )
        dtype = self.dtype or kernel.dtype
        # Batch and time become one axis first: from [B, T, D] XLA's CPU backend writes slow transposes for the kernel's
        # gradient (1.2 times the time of a whole training step).
        return _rows_first(x.astype(dtype).reshape(-1, width), kernel.astype(dtype), 0)

    @nn.nowrap
    def adapt(self, x: Float[Array, "*batch D"], y: Float[Array, "M ..."]) -> Float[Array, "M ..."]:
        """y = x W plus what the adapter adds."""
        adapter: dict[str, Any] = {name: self.get_variable(name, KERNEL) for name in (LORA, LORA_FIXED)}
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        rows = x.reshape(-1, x.shape[-1])
        kernel = by_input(self.variables["params"], (rows.shape[-1], *y.shape[1:]))
        return adapted(rows, y, kernel, adapter[LORA], adapter[LORA_FIXED], key)


def _by_rows(x: Float[Array, "*batch D"], kernel: Float[Array, "out D"], dtype: Dtype | None) -> Float[Array, "M out"]:
    dtype = dtype or kernel.dtype
    return times_transposed(x.astype(dtype).reshape(-1, x.shape[-1]), kernel.astype(dtype))


def times_transposed(rows: Float[Array, "M D"], matrix: Float[Array, "out D"]) -> Float[Array, "M out"]:
    """x Wᵀ. On a mesh in the usual form, in which the rows that a device holds are those that it computes."""
    few = 1 < len(rows) <= FEW_ROWS and target_platform() == "cpu" and not axis_sizes()
    return _matrix_first(rows, matrix) if few else _rows_first(rows, matrix)


def _rows_first(rows: Array, matrix: Array, depth: int = 1) -> Array:
    """The product over the matrix's axis `depth`. Where its results (a vocabulary of 50,257, say) do not fill a
    multiple of 16 bytes, a GPU could not load several at once, here and in the gradients. So there the matrix is filled
    up with zeros; but not for a few rows, for which the matrix is read only once."""
    width, size = matrix.shape[1 - depth], matrix.dtype.itemsize
    uneven = matrix.ndim == 2 and width * size % 16 != 0 and len(rows) > FEW_ROWS
    missing = -width % (ROW_BYTES // size) if uneven and target_platform() == "gpu" else 0
    if missing:
        matrix = jnp.pad(matrix, [(0, 0 if axis == depth else missing) for axis in (0, 1)])
    product: Array = jax.lax.dot_general(rows, matrix, (((1,), (depth,)), ((), ())))
    return product[:, :width] if missing else product


@jax.custom_jvp
def _matrix_first(rows: Array, matrix: Array) -> Array:
    """(W xᵀ)ᵀ. XLA's CPU backend reads the second operand once for every few rows of the first: with the matrix in that
    place, 8 rows take 2.5 times as long (2,048 x 8,192)."""
    product: Array = jax.lax.optimization_barrier(_rows_first(matrix, rows))
    return product.T  # The barrier keeps XLA from swapping the operands again.


@_matrix_first.defjvp
def _matrix_first_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Gradients need no such form."""
    (rows, matrix), (change_of_rows, change_of_matrix) = primals, tangents
    change = _rows_first(change_of_rows, matrix) + _rows_first(rows, change_of_matrix)
    return _matrix_first(rows, matrix), change


def side_by_side(x: Float[Array, "*batch D"], *linears: Linear) -> tuple[Float[Array, "..."], ...]:
    """`linear(x)` of each layer. Kernels that `by_output` has joined take one product, which is split afterwards."""
    first = linears[0]
    joined: JoinedKernels | None = first.get_variable("params", JOINED_KERNELS)
    if joined is None or joined.names != tuple(linear.name for linear in linears):
        rows = x.reshape(-1, x.shape[-1])  # flattened here, so that the backward pass keeps one copy for all layers
        return tuple(linear(rows, batch=x.shape[:-1]) for linear in linears)
    ends = np.cumsum([np.prod(linear.features) for linear in linears])
    products = jnp.split(_by_rows(x, joined.kernels, first.dtype), ends[:-1], axis=1)
    return tuple(linear(x, product) for linear, product in zip(linears, products, strict=True))


# The layout of decoding.


def rounded(variables: dict[str, Any], dtype: Dtype, tied: bool) -> dict[str, Any]:
    """The same variables with every matrix of a product in `dtype`, in which its layer computes, if that is the
    narrower type. A loop over tokens would otherwise convert float32 matrices for each of them, which takes several
    times as long as to read them in bfloat16. Norms and what is looked up stay as they are; if the head is `tied` to
    the table, it comes to lie beside it."""
    tree = {
        name: rounded(leaf, dtype, tied) if isinstance(leaf, dict) and name not in IN_FLOAT32 else leaf
        for name, leaf in variables.items()
    }
    table = tree.get("token_embedding", {})
    if tied and "embedding" in table:
        tree["token_embedding"] = table | {TIED_HEAD: _narrowed(table["embedding"], dtype)}
    for name in {KERNEL, *EXPERT_KERNELS} & tree.keys():
        if not isinstance(tree[name], dict):  # a dict is the kernel's adapter
            tree[name] = _narrowed(tree[name], dtype)
    return tree


def _narrowed(matrix: Any, dtype: Dtype) -> Any:
    return matrix.astype(dtype) if jnp.dtype(dtype).itemsize < matrix.dtype.itemsize else matrix


def by_output(variables: dict[str, Any]) -> dict[str, Any]:
    """The same variables with every `Linear`'s kernel as (out, in): each output reads contiguous memory. Adapters stay
    as they are.

    XLA's CPU backend multiplies a single row by such a matrix at the speed of memory, 1.1 to 1.5 times as fast as by
    (in, out), and few rows (`times_transposed`) up to 3 times, the more the larger the matrix. Kernels of layers that
    `SIDE_BY_SIDE` lists together are joined: one product of 1 MB or more replaces small ones, which would wait for each
    other's threads. On a GPU fewer products are launched, and XLA's `dot-merger` need not join them by copying the
    kernels for every token. Layers of these names that are called one by one, each with its own input, use their own
    rows of the joined kernel.
    """
    tree = {name: by_output(leaf) if isinstance(leaf, dict) else leaf for name, leaf in variables.items()}
    if KERNEL in tree and not isinstance(tree[KERNEL], dict):  # a dict is the kernel's adapter
        tree[KERNEL_BY_OUTPUT] = _transposed(tree.pop(KERNEL))
    for names in SIDE_BY_SIDE:
        kernels = [tree[name][KERNEL_BY_OUTPUT] for name in names if KERNEL_BY_OUTPUT in tree.get(name, ())]
        kinds = {(kernel.shape[1], kernel.dtype) for kernel in kernels}
        if len(kernels) == len(names) and len(kinds) == 1:
            joined = jnp.concatenate(kernels)
            ends = [0, *np.cumsum([len(kernel) for kernel in kernels]).tolist()]
            for name, start, end in zip(names, ends, ends[1:], strict=False):
                del tree[name][KERNEL_BY_OUTPUT]
                tree[name][JOINED_KERNELS] = JoinedKernels(joined, names, start, end)
    return tree


def each_own_kernel(params: Any) -> list[Array]:
    """The leaves of parameters, with joined kernels once: as the kernel of each layer."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, JoinedKernels))
    return [leaf.own if isinstance(leaf, JoinedKernels) else leaf for leaf in leaves]


def flat_by_output(params: Mapping[str, Any]) -> Float[Array, "out D"]:
    """The kernel of a `Linear` as (out, in), whichever layout its parameters hold."""
    if JOINED_KERNELS in params:
        own: Array = params[JOINED_KERNELS].own
        return own
    flat: Array = params[KERNEL_BY_OUTPUT] if KERNEL_BY_OUTPUT in params else _transposed(params[KERNEL])
    return flat


def by_input(params: Mapping[str, Any], shape: tuple[int, ...]) -> Float[Array, "in *features"]:
    """The kernel of a `Linear` as (in, out...), of this shape, whichever layout its parameters hold."""
    kernel: Array = params[KERNEL] if KERNEL in params else flat_by_output(params).T.reshape(shape)
    return kernel


@jax.jit
def _transposed(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(kernel.shape[0], -1).T
