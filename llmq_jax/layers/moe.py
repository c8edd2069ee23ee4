"""Mixture of experts: many feed-forward networks, of which each token passes through the few that a router picks.

Shazeer et al. 2017, arXiv:1701.06538 (noisy top-k gating); Fedus et al. 2021 (Switch), arXiv:2101.03961 (weights of the
full softmax, not renormalised); Jiang et al. 2024 (Mixtral), arXiv:2401.04088 (renormalised over the chosen); Dai et
al. 2024 (DeepSeekMoE), arXiv:2401.06066 (fine-grained and shared experts); DeepSeek-AI 2024 (V3), arXiv:2412.19437
(sigmoid scores, groups, a bias for selection).

Any decoder takes experts in place of its feed-forward networks: `config.experts`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields, create
from llmq_jax.layers.activations import ACTIVATIONS
from llmq_jax.layers.attention import Context
from llmq_jax.layers.expert_balance import Balance, RouterReport, report
from llmq_jax.layers.expert_dispatch import check_implementation
from llmq_jax.layers.expert_exchange import dispatch_on_mesh
from llmq_jax.layers.expert_weights import ExpertWeights
from llmq_jax.layers.experts_apart import APART
from llmq_jax.layers.feedforward import MLP
from llmq_jax.layers.linear import Linear
from llmq_jax.layers.lora import LORA, LORA_FIXED, factors
from llmq_jax.layers.repetition import repeated

SCORES: dict[str, Callable[[Array], Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
"""Functions from the router's logits [B, T, E] to scores. A score is never negative; where it is 0 a token does not go
to the expert, even if the expert is among its k largest."""
# A group's score is the sum of its best two experts', as in DeepSeek's code. The paper (section 2.1.2) sums the best
# top_k / top_groups, which in V3 is 2 as well.
BEST_OF_GROUP = 2


@dataclass(frozen=True)
class Experts:
    """The experts of a decoder. Width, gating, activation and biases that are not given are those of the feed-forward
    network that the experts replace."""

    num_experts: int = 8
    top_k: int = 2
    """Experts for each token."""
    intermediate_size: int | None = None
    """Width of an expert; None is that of the network it replaces."""
    first_layer: int = 0
    """Layers before this one keep their feed-forward network."""
    dense_layers: tuple[int, ...] | list[int] | None = None
    """Further layers that keep theirs, counted from 0; None: there are none."""
    num_shared: int = 0
    """Experts that all tokens pass through, computed as one network of `num_shared` times the width."""
    shared_weight: bool = False
    """Whether the shared experts' output has a learned weight, sigmoid(p); p starts at 0."""
    gated: bool | None = None
    """Three matrices (SwiGLU, GeGLU) or two; None is as in the network they replace."""
    activation: str | None = None
    bias: bool | None = None
    """Whether experts have biases."""
    score: str = "softmax"
    """"softmax" over the experts, or "sigmoid" of each: an entry of `SCORES`."""
    router_bias: bool = False
    """Whether the router's logits have a bias of their own."""
    renormalise: bool = True
    """Whether the weights of the chosen experts are made to add up to 1. With top_k=1 they then are 1, and the router
    learns from balance losses alone; Switch has False."""
    scaling_factor: float = 1.0
    """What the weights are multiplied by."""
    selection_bias: bool = False
    """Whether a bias is added to the scores when experts are chosen, but not when they are weighted (DeepSeek's
    e_score_correction_bias). It is in the collection "router"; a `balance.bias_rate` moves it in training."""
    num_groups: int = 1
    """Groups of consecutive experts; only experts of the best `top_groups` of them can be chosen."""
    top_groups: int = 1
    noise: bool = False
    """Whether training adds normal noise of a learned size to the logits (Shazeer et al. 2017, eq. 4)."""
    dispatch: str = "auto"
    """How tokens come to their experts: see `layers.expert_dispatch`."""
    capacity_factor: float | None = None
    """Slots per expert, as a multiple of an equal share of the assignments; for dispatch="capacity". The share counts
    all tokens of a batch, padding included, although padding takes no slot."""
    balance: Balance | dict[str, Any] | None = None
    """Losses and the bias that keep the load even; None turns them off."""

    def __post_init__(self) -> None:
        check_fields(self)
        balance = balance_from(self.balance)
        object.__setattr__(self, "balance", balance)
        # An empty list is held as None: so equal models have equal configs.
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers or ()) or None)
        for name in ("num_experts", "top_k", "num_groups", "top_groups"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("first_layer", "num_shared"):
            self._require(getattr(self, name) >= 0, name, "must be at least 0")
        size = self.intermediate_size
        self._require(size is None or size >= 1, "intermediate_size", "must be at least 1")
        self._require(self.top_k <= self.num_experts, "top_k", f"is more than num_experts={self.num_experts}")
        self._require(self.score in SCORES, "score", f"is none of {', '.join(SCORES)}")
        self._require(
            self.activation is None or self.activation in ACTIVATIONS,
            "activation",
            f"is none of {', '.join(ACTIVATIONS)}",
        )
        self._require(
            self.num_experts % self.num_groups == 0, "num_groups", f"must divide num_experts={self.num_experts}"
        )
        self._require(self.top_groups <= self.num_groups, "top_groups", f"is more than num_groups={self.num_groups}")
        reachable = self.top_groups * self.num_experts // self.num_groups
        self._require(self.top_k <= reachable, "top_k", f"is more than the {reachable} experts of top_groups")
        self._require(
            self.num_shared > 0 or not self.shared_weight, "shared_weight", "has no effect without num_shared"
        )
        self._require(0 < self.scaling_factor < math.inf, "scaling_factor", "must be positive, and finite")
        check_implementation(self.dispatch)
        given = self.capacity_factor is not None
        self._require(given or self.dispatch != "capacity", "capacity_factor", "is needed by dispatch='capacity'")
        self._require(not given or self.dispatch == "capacity", "capacity_factor", "needs dispatch='capacity'")
        positive = self.capacity_factor is None or self.capacity_factor > 0
        self._require(positive, "capacity_factor", "must be positive, or all is dropped")
        self._require(self.capacity_factor != math.inf, "capacity_factor", "must be finite")
        if balance is not None:
            if balance.bias_rate and not self.selection_bias:
                raise BadInput(f"balance: bias_rate={balance.bias_rate} moves a bias that needs selection_bias=true")
            if self.num_experts % balance.devices:
                raise BadInput(f"balance: devices={balance.devices} must divide {self.num_experts} experts")

    def in_layer(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        return layer >= self.first_layer and layer not in (self.dense_layers or ())

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise BadInput(f"experts: {name}={getattr(self, name)!r} {rule}")


def balance_from(given: Any) -> Balance | None:
    """The `balance` of experts, from None, a Balance, or a dict as a file or a command line has it. BadInput: anything
    else, or fields that cannot be."""
    if isinstance(given, dict):
        return create(Balance, given)
    if not isinstance(given, Balance | None):
        raise BadInput(f"balance={given!r} is neither a Balance nor an object of its fields")
    return given


def experts_from(given: Any, layers: int, default: Experts | None = None) -> Experts | None:
    """The `experts` of a config, from None, Experts, or a dict as a file or a command line has it, of the fields that
    differ from `default`. BadInput: anything else, fields that cannot be, or no layer of the `layers` with experts."""
    if isinstance(given, dict):
        given = create(Experts, (asdict(default) if default else {}) | given)
    if not isinstance(given, Experts | None):
        raise BadInput(f"experts={given!r} is neither Experts nor an object of their fields")
    if given is None:
        return None
    first, dense = given.first_layer, list(given.dense_layers or ())
    if any(not 0 <= layer < layers for layer in dense):
        raise BadInput(f"experts: dense_layers={dense} must be numbers of the {layers} layers, counted from 0")
    if not any(map(given.in_layer, range(first, layers))):
        told = f"first_layer={first}" + (f" and dense_layers={dense}" if dense else "")
        raise BadInput(f"experts: {told} leaves no expert in {layers} layers")
    return given


def require_same_sizes(given: Experts | None, sizes: tuple[int, int], config: object, names: str) -> None:
    """BadInput if num_experts and top_k are not `sizes`, which the fields called `names` of the same config say."""
    if given is not None and (given.num_experts, given.top_k) != sizes:
        raise BadInput(
            f"{type(config).__name__}.experts has num_experts={given.num_experts} and top_k={given.top_k}, and {names} "
            f"say {sizes[0]} and {sizes[1]}; change these"
        )


def route(
    logits: Float[Array, "*batch E"], experts: Experts, bias: Float[Array, " E"] | None = None
) -> tuple[Int[Array, "*batch k"], Float[Array, "*batch k"], Float[Array, "*batch E"]]:
    """(int32 ids of the chosen experts, their weights, the router's probabilities); the latter two in float32.

    Equations are those of DeepSeek-V3 (arXiv:2412.19437); Mixtral's are a special case. The probabilities, for the
    balance losses, add up to 1 over all experts (eq. 19).
    """
    scores = SCORES[experts.score](logits.astype(jnp.float32))  # s, eq. 15
    selection = jax.lax.stop_gradient(scores if bias is None else scores + bias)  # s + b, eq. 16
    if experts.num_groups > 1:
        selection = _in_best_groups(selection, experts)
    _, ids = jax.lax.top_k(selection, experts.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)  # g', eq. 14: of the scores alone
    if experts.renormalise:
        weights /= weights.sum(-1, keepdims=True) + 1e-20  # g, eq. 13
    probabilities = scores if experts.score == "softmax" else scores / (scores.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * experts.scaling_factor, probabilities


def _in_best_groups(selection: Float[Array, "*batch E"], experts: Experts) -> Float[Array, "*batch E"]:
    """-inf for the experts of all groups but the best `top_groups` (section 2.1.2, node-limited routing)."""
    groups = selection.reshape(*selection.shape[:-1], experts.num_groups, -1)
    best = jax.lax.top_k(groups, min(BEST_OF_GROUP, groups.shape[-1]))[0].sum(-1)
    _, chosen = jax.lax.top_k(best, experts.top_groups)
    allowed = jax.nn.one_hot(chosen, experts.num_groups).sum(-2) > 0
    return jnp.where(allowed[..., None], groups, -jnp.inf).reshape(selection.shape)


class MixtureOfExperts(nn.Module):
    """A router, experts stacked in one array, and shared experts:

        y = Σ g_e · expert_e(x) + shared(x)              over the chosen experts, with their weights g: `route`
        expert_e(x) = W_down (act(W_gate x) * W_up x)    or W_down act(W_up x), if it is not gated

    `gated`, `activation`, `use_bias` and `intermediate_size` describe the feed-forward network that it replaces.
    """

    experts: Experts
    intermediate_size: int
    gated: bool
    activation: str
    use_bias: bool
    kernel_init: Initializer
    down_init: Initializer
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterReport]:
        """`real` is False for padding, which is given to no expert and counts nowhere."""
        e = self.experts
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        logits = self.logits(x)
        bias = None
        if e.selection_bias:
            bias = self.variable("router", "bias", jnp.zeros, (e.num_experts,), jnp.float32).value
        ids, weights, probabilities = route(logits, e, bias)
        gated = self.gated if e.gated is None else e.gated
        kernels = self.expert_weights(x.shape[-1], 2 if gated else 1)
        activation = ACTIVATIONS[e.activation or self.activation]

        def activate(parts: Float[Array, "*rows P F"]) -> Float[Array, "*rows F"]:
            """Of the two parts of a gated expert, the gate comes first."""
            first = activation(parts[..., 0, :])
            return first * parts[..., 1, :] if gated else first

        # The id E is no expert: of padding, and of scores that are 0.
        ids = jnp.where(real[..., None] & (weights != 0), ids, e.num_experts)
        rows = x.astype(self.dtype or jax.tree.leaves(kernels.up)[0].dtype).reshape(-1, x.shape[-1])
        mixed, dropped = dispatch_on_mesh(
            rows,
            ids.reshape(-1, e.top_k),
            weights.reshape(-1, e.top_k),
            kernels,
            activate,
            e.dispatch,
            e.capacity_factor,
        )
        mixed = mixed.reshape(x.shape)
        if e.num_shared:
            shared = self.shared(gated)(x)
            if e.shared_weight:
                weight = self.param("shared_weight", nn.initializers.zeros, ())
                shared *= repeated(jax.nn.sigmoid(weight.astype(jnp.float32)), shared)
            mixed += shared
        return mixed, report(logits, probabilities, ids, real, dropped)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        e, x = self.experts, x.astype(jnp.float32)
        # A GPU would round both factors to TF32, and so choose other experts where two are nearly equal.
        with jax.default_matmul_precision("highest"):
            logits = Linear(e.num_experts, e.router_bias, self.kernel_init, jnp.float32, name="router")(x)
            if e.noise:
                size = Linear(e.num_experts, False, nn.initializers.zeros, jnp.float32, name="noise")(x)
        if e.noise and self.has_rng("dropout"):
            logits += jax.random.normal(self.make_rng("dropout"), logits.shape) * jax.nn.softplus(size)
        return logits

    def expert_weights(self, width: int, parts: int) -> ExpertWeights:
        """The weights of all experts, stacked unless `by_expert` has laid their matrices apart, and their adapters;
        `parts` is 2 in gated networks, else 1."""
        e = self.experts
        hidden = e.intermediate_size or self.intermediate_size

        def kernel(name: str, initialise: Initializer, shape: tuple[int, ...]) -> Any:
            if self.has_variable("params", name + APART):
                return self.get_variable("params", name + APART)

            def draw(key: Array) -> Array:  # a flat matrix per expert, so that initialisers see the true fan-in
                keys = jax.random.split(key, shape[0])
                matrix = (shape[1], math.prod(shape[2:]))
                return jax.vmap(lambda key: initialise(key, matrix))(keys).reshape(shape)

            leaf = self.param(name, draw)
            return leaf.astype(self.dtype or leaf.dtype)

        def bias(name: str, shape: tuple[int, ...]) -> Array | None:
            if not (self.use_bias if e.bias is None else e.bias):
                return None
            leaf = self.param(name, nn.initializers.zeros, shape)
            return leaf.astype(self.dtype or leaf.dtype)

        def low_rank(name: str, dtype: Dtype) -> tuple[Array, ...] | None:
            if not self.has_variable(LORA_FIXED, name):
                return None
            pair = factors(*(self.get_variable(collection, name) for collection in (LORA, LORA_FIXED)))
            return tuple(leaf.astype(dtype) for leaf in pair)

        up = kernel("up_kernel", self.kernel_init, (e.num_experts, width, parts, hidden))
        down = kernel("down_kernel", self.down_init, (e.num_experts, hidden, width))
        dtypes = [self.dtype or jax.tree.leaves(matrices)[0].dtype for matrices in (up, down)]
        return ExpertWeights(
            up,
            down,
            up_bias=bias("up_bias", (e.num_experts, parts, hidden)),
            down_bias=bias("down_bias", (e.num_experts, width)),
            up_low_rank=low_rank("up_kernel", dtypes[0]),
            down_low_rank=low_rank("down_kernel", dtypes[1]),
        )

    def shared(self, gated: bool) -> nn.Module:
        e = self.experts
        hidden = e.num_shared * (e.intermediate_size or self.intermediate_size)
        activation = e.activation or self.activation
        bias = self.use_bias if e.bias is None else e.bias
        return MLP(hidden, activation, self.kernel_init, self.down_init, self.dtype, bias, gated, name="shared")


def mlp_or_experts(
    x: Float[Array, "B T D"],
    context: Context,
    experts: Experts | None,
    *,
    intermediate_size: int,
    gated: bool,
    activation: str,
    use_bias: bool,
    kernel_init: Initializer,
    down_init: Initializer,
    dtype: Dtype | None,
) -> tuple[Float[Array, "B T D"], dict[str, RouterReport]]:
    """What a block calls: a feed-forward network "mlp", or experts "moe" in its place. Returns (output, the block's
    counts)."""
    if experts is not None:
        kind = (intermediate_size, gated, activation, use_bias, kernel_init, down_init)
        real = None if context.segment_ids is None else context.segment_ids != 0
        mixed, report = MixtureOfExperts(experts, *kind, dtype, name="moe")(x, real)
        return mixed, {"router": report}
    return MLP(intermediate_size, activation, kernel_init, down_init, dtype, use_bias, gated, name="mlp")(x), {}
