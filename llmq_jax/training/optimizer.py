"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), Muon (Jordan et al. 2024) and their learning rate."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import require_numbers, whole
from llmq_jax.layers.axes import FSDP, TENSOR, axis_sizes, dimensions, is_stacked, partition_spec, path_names
from llmq_jax.training.roles import role, roles

# Roles that weight decay pulls towards zero; norms and biases stay out.
DECAYED = frozenset({"kernel", "embedding"})

MOMENTS = ("float32", "first-bfloat16", "bfloat16")
"""Types of the moments between updates; "first-bfloat16" is that of the first alone."""

Schedule = Callable[[int], jax.Array]

# (rate - minimum) / (peak - minimum), as a function of the fraction of the decay that has passed.
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "wsd": lambda progress: 1.0 - progress,
    "constant": jnp.ones_like,
}


def warmup_schedule(
    *,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    initial: float = 0.0,
    minimum: float = 0.0,
    decay: str = "cosine",
    decay_steps: int | None = None,
) -> Schedule:
    """Learning rate of step 0 ... steps - 1: linear from `initial` (at step 0) to `peak` (at step `warmup_steps`), then
    by `decay` to `minimum`, which it reaches exactly at the last step and keeps afterwards. (A warm-up up to the last
    step leaves no step to decay in; and "constant" does not decay.)

    "cosine": half a cosine (SGDR, arXiv:1608.03983, eq. 5); "linear": a straight line; "wsd": the peak, and over the
    last `decay_steps`, a tenth of the steps unless given, a straight line (MiniCPM, arXiv:2404.06395, section 4);
    "constant": the peak.

    BadInput: a warm-up as long as the run, a rate that does not lie between 0 and the peak, an unknown decay, a minimum
    between 0 and the peak with "constant", decay steps without "wsd" or for which the warm-up leaves no room.
    """
    steps, warmup_steps = whole(steps, "steps"), whole(warmup_steps, "warmup_steps")
    if warmup_steps < 0:
        raise BadInput(f"warmup_steps={warmup_steps} must not be negative")
    if warmup_steps >= steps:
        raise BadInput(
            f"warm-up of {counted(warmup_steps, 'step')} does not fit a run of {steps}; make it shorter than the run"
        )
    require_numbers(peak=peak, initial=initial, minimum=minimum)
    for name, value in (("initial", initial), ("minimum", minimum)):
        if not 0.0 <= value <= peak:
            raise BadInput(f"{name} learning rate {value:g} must lie between 0 and the peak, {peak:g}")
    if decay == "constant" and minimum not in (0.0, peak):
        raise BadInput(f"minimum={minimum:g} has no effect with decay='constant'; leave it out")
    if decay not in DECAYS:
        raise BadInput(f"decay={decay!r} is unknown; {did_you_mean(decay, DECAYS)}")
    if decay_steps is not None:
        if decay != "wsd":
            raise BadInput(f"decay_steps={decay_steps} has no effect with decay={decay!r}; leave it out")
        if not 0 < decay_steps < steps - warmup_steps:
            raise BadInput(
                f"decay_steps={decay_steps} does not fit: {counted(steps, 'step')} less {warmup_steps} of warm-up "
                f"leave room for {max(0, steps - warmup_steps - 1)}"
            )
    start = warmup_steps
    if decay == "wsd":
        start = max(warmup_steps, steps - 1 - (max(1, steps // 10) if decay_steps is None else decay_steps))

    def learning_rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = initial + (peak - initial) * step / max(warmup_steps, 1)
        progress = jnp.clip((step - start) / max(steps - 1 - start, 1), 0.0, 1.0)
        falling = minimum + (peak - minimum) * DECAYS[decay](progress)
        return jnp.where(step < warmup_steps, rising, falling)

    return learning_rate


def warmup_cosine(
    peak: float, steps: int, warmup_steps: int = 0, *, initial: float = 0.0, minimum: float = 0.0
) -> Schedule:
    """`warmup_schedule` whose decay is the cosine: linear from `initial` to `peak` at step `warmup_steps`, then half a
    cosine to `minimum`, which it reaches at the last of the `steps` and keeps. BadInput: as there.

    It is optax.warmup_cosine_decay_schedule(initial, peak, warmup_steps, steps - 1, minimum)."""
    return warmup_schedule(peak=peak, steps=steps, warmup_steps=warmup_steps, initial=initial, minimum=minimum)


def adamw(
    learning_rate: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    moments: str = "float32",
) -> optax.GradientTransformation:
    """AdamW with the gradient's global norm clipped to `clip` (None: not at all) before every update.

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2. `learning_rate` is a number or a function of the step, from
    0 on; `b1` and `b2` are the decay rates of the two moments, `epsilon` is added to the root of the second. Weight
    decay acts on kernels and embeddings, by role, and is scaled by the learning rate, as in torch.optim.AdamW.

    `moments` is the type of both moments between updates, "float32" or "bfloat16" (as in DeepSeek-V3, arXiv:2412.19437,
    section 3.3.3), or "first-bfloat16", of the first alone (optax's `mu_dtype`). BadInput for decay rates so near 1
    that bfloat16, of 8 bits, would lose every change.
    """
    require_numbers(epsilon=epsilon)
    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)
    scale = _kept_in(scale, moments, b1=b1, b2=b2)
    return _decoupled(scale, learning_rate, weight_decay, clip)


def muon(
    learning_rate: Schedule | float,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    moments: str = "float32",
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Muon for the matrices of the layers, which then need one moment in place of two, and AdamW for all else:
    embeddings, the head, norms, biases and adapters.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the update of a matrix is its Nesterov momentum,
    orthogonalised. Liu et al. 2025, arXiv:2502.16982, section 2.2: the update is scaled to the root mean square of
    AdamW's, 0.2, and weight decay is AdamW's, so that `learning_rate` and `weight_decay` can stay as they are for
    AdamW. This equals torch.optim.Muon with adjust_lr_fn="match_rms_adamw", except for the type of its products.
    Matrices that are stored in one array (layers, experts, queries beside keys, the two halves of a gated network) are
    each updated by itself.

    `momentum` is that of matrices; `b1`, `b2` and `epsilon` are AdamW's for the rest; `dtype` is the type of the
    products that orthogonalise (PyTorch's are bfloat16); the others are those of `adamw`. BadInput if no matrix of a
    layer trains, as with adapters.
    """
    require_numbers(epsilon=epsilon)

    def kinds(params: Any) -> Any:
        def kind(path: Any, leaf: Any) -> str:
            names = path_names(path)
            if not is_matrix(names):
                return "adamw"
            _require_as_named(names, leaf.ndim)
            return "muon"

        return jax.tree_util.tree_map_with_path(kind, params)

    partition = optax.partition(
        {"muon": scale_by_muon(momentum, dtype), "adamw": optax.scale_by_adam(b1=b1, b2=b2, eps=epsilon)}, kinds
    )

    def init(params: Any) -> Any:
        if "muon" not in jax.tree.leaves(kinds(params)):
            raise BadInput("muon has nothing to do: no matrix of a layer is among what trains; use adamw")
        return partition.init(params)

    scale = optax.GradientTransformation(init, partition.update)
    scale = _kept_in(scale, moments, momentum=momentum, b1=b1, b2=b2)
    return _decoupled(scale, learning_rate, weight_decay, clip)


def is_matrix(path: tuple[str, ...]) -> bool:
    """Whether `muon` orthogonalises the parameter at a path: the kernels of layers, but no head and no adapter."""
    named = dimensions(path)
    return role(path) == "kernel" and bool(named) and "vocabulary" not in named and path[-2] != "score"


def _require_as_named(path: tuple[str, ...], axes: int) -> None:
    """BadInput for a matrix in a group of layers, which are stacked, that has more dimensions than its module's name
    tells of, or fewer: others than its own would be taken for rows and columns."""
    named = dimensions(path)
    in_group = any(map(is_stacked, path[:2]))  # the name of a collection may come first
    if in_group and axes - 1 != len(named):
        raise BadInput(
            f"{'/'.join(path)} has {axes - 1} dimensions in a layer, and layers.axes.MODULES names {len(named)} of "
            f"{path[-2]!r}; give its module another name, and these their names there"
        )


def scale_by_muon(momentum: float, dtype: str) -> optax.GradientTransformation:
    """Replaces the gradient of a matrix [M, N] by its orthogonalised Nesterov momentum, times 0.2 sqrt(max(M, N))."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, gradient)
        nesterov = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state, gradient)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _orthogonal_update(path_names(path), leaf, dtype), nesterov
        ), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def _orthogonal_update(path: tuple[str, ...], leaf: jax.Array, dtype: str) -> jax.Array:
    """The Muon update of each of the matrices that an array holds, from their Nesterov momenta."""
    named = dimensions(path)
    flat = leaf.reshape(-1, *leaf.shape[leaf.ndim - len(named) :])
    alone = [axis for axis, name in enumerate(named) if name in ("expert", "parts")]
    order = (*alone, *(axis for axis in range(len(named)) if axis not in alone))

    def update(layer: jax.Array) -> jax.Array:
        moved = layer.transpose(order)
        matrices = moved.reshape(*moved.shape[: len(alone) + 1], -1)  # [..., inputs, outputs], heads x width one axis
        made: jax.Array = 0.2 * max(matrices.shape[-2:]) ** 0.5 * orthogonalised(matrices)
        return made.reshape(moved.shape).transpose([order.index(axis) for axis in range(len(named))])

    return _by_whole_layers(path, flat.astype(dtype), update).reshape(leaf.shape).astype(leaf.dtype)


def _by_whole_layers(path: tuple[str, ...], layers: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`function` of each of the layers [L, ...], one after another, which takes the memory of one. If a mesh divides
    them, devices exchange their parts of all layers for some whole layers (or experts), and the results back."""
    sizes = axis_sizes()
    divided = partition_spec(path, layers.shape, sizes)
    spec: tuple[Any, ...] = (*divided, *(None,) * (layers.ndim - len(divided)))
    # One axis at a time, which the compiler turns into an all-to-all; axes that divide nothing yet come last.
    axes = [axis for axis in (FSDP, TENSOR) if axis in spec]
    axes += [axis for axis, size in sizes.items() if size > 1 and axis not in spec]
    ways = [spec]
    for axis in axes:
        first, *others = ways[-1]
        ways.append(((*(first or ()), axis), *(None if other == axis else other for other in others)))

    def constrained(x: jax.Array, way: tuple[Any, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*way)) if axes else x

    devices = math.prod(sizes[axis] for axis in axes)
    missing = -len(layers) % devices
    x = jnp.pad(layers, [(0, missing), *[(0, 0)] * (layers.ndim - 1)])
    for way in ways[1:]:
        x = constrained(x, way)
    shares = x.reshape(devices, -1, *x.shape[1:])  # of each device
    made = jax.lax.map(jax.vmap(function), shares.swapaxes(0, 1)).swapaxes(0, 1)
    x = made.reshape(x.shape)
    for way in reversed(ways):
        x = constrained(x, way)
    return x[: len(layers)]


def orthogonalised(matrices: jax.Array) -> jax.Array:
    """[..., M, N] -> [..., M, N]: approximately U V^T of each matrix's singular value decomposition U S V^T, by
    five steps of the Newton-Schulz iteration X <- a X + (b X X^T + c (X X^T)^2) X (Jordan et al. 2024). Singular values
    above 1/500 of the matrix's norm end between 0.68 and 1.21; smaller ones grow at most 500-fold."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x = (x / jnp.maximum(norm, 1e-7)).astype(x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


def _decoupled(
    scale: optax.GradientTransformation, learning_rate: Schedule | float, weight_decay: float, clip: float | None
) -> optax.GradientTransformation:
    """Clip the gradient, scale it by `scale`, add `weight_decay` times the parameter, multiply by the learning rate."""
    require_numbers(learning_rate=learning_rate, weight_decay=weight_decay, clip=1.0 if clip is None else clip)
    return optax.chain(
        optax.identity() if clip is None else clip_by_global_norm(clip),
        scale,
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """The gradient, scaled down to a norm of `largest` if its norm is greater, as by `optax.clip_by_global_norm`, but
    multiplied by one factor, as in torch.nn.utils.clip_grad_norm_. optax divides each number, which XLA does not fuse
    with what follows: that takes a pass of its own through memory, a fifth of an update's time on a CPU."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, largest / optax.tree.norm(gradient))  # of a norm of 0: 1
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _kept_in(scale: optax.GradientTransformation, moments: str, **decays: float) -> optax.GradientTransformation:
    """The transformation with its moments, which have these decay rates, rounded between updates as `moments`, one of
    MOMENTS, says; the updates themselves are computed in float32. BadInput for another name."""
    require_numbers(**decays)
    if moments not in MOMENTS:
        raise BadInput(f"moments={moments!r} is unknown; {did_you_mean(moments, MOMENTS)}")
    if moments == "float32":
        return scale
    first_alone = moments == "first-bfloat16"
    for name, decay in decays.items():
        if 1 - decay < 2**-7 and not (first_alone and name == "b2"):
            option = {"b1": " (the first of --betas)", "b2": " (the second of --betas)"}.get(name, "")
            other = "first-bfloat16 or " if name == "b2" else ""
            raise BadInput(
                f"{name}={decay} with moments in bfloat16: what one update changes is rounded away; choose "
                f"{name}=0.99 or less{option}, or moments in {other}float32"
            )

    def cast(state: Any, to: Any) -> Any:
        def kept(path: Any, x: jax.Array) -> jax.Array:
            stays = first_alone and "nu" in path_names(path)  # optax's name of the second
            return x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) and not stays else x

        return jax.tree_util.tree_map_with_path(kept, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = scale.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: cast(scale.init(params), jnp.bfloat16), update)


def decay_mask(params: dict[str, Any]) -> dict[str, Any]:
    """True where weight decay acts."""
    decayed: dict[str, Any] = jax.tree.map(lambda role: role in DECAYED, roles(params))
    return decayed
