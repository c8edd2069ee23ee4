"""The one attention core: scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

Queries may outnumber keys and values: N query heads in K groups (K = N is multi-head attention, K = 1 multi-query).
What may look at what comes from facts, never from token ids: positions (causality, windows) and segment ids (packed
documents and padding, which is segment 0). A query sees a key of its own segment that does not lie after it and, in a
layer with a window of W, is one of the last W, its own among them (Child et al. 2019, arXiv:1904.10509; Beltagy et al.
2020, arXiv:2004.05150, section 3.1). Padding sees padding, so that no row of scores is ever empty and nothing becomes
NaN.

A sequence looks at itself in one of three ways, equal in values and gradients, with and without a window:

- masked: all T x T scores and a mask over them: the reference;
- blocked: blocks of queries that meet only keys that some of them may see. In layers with a window that is linear in T,
  in time and in memory, forward and back;
- fused: the accelerator's own kernel, which forms no scores in memory.

Projections give [B, T, heads, H]; products over positions want heads before positions. Queries, keys and values are
transposed once on the way in and the result once on the way out (caches hold keys and values in that order already):
left to XLA, each product and each of its gradients gets transposes of its own, at twice the time on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.layers.caches import NOWHERE
from llmq_jax.layers.positions import Rotation

IMPLEMENTATIONS = ("auto", "masked", "blocked", "fused")
# What "auto" takes, by backend: (in layers without a window, in layers with one). Where the fused kernel cannot run,
# blocked takes its place.
AUTOMATIC = {"cpu": ("blocked", "blocked"), "gpu": ("masked", "fused")}
ELSEWHERE = ("masked", "blocked")
# Blocks that a sequence is cut into without a window. Each is compiled apart, so there are few; and below a certain
# length a block costs more than the masked part that it skips.
QUERY_BLOCKS = 4
SHORTEST_QUERY_BLOCK = 64
# The scores of a block should stay in the processor's cache.
LONGEST_WINDOW_BLOCK = 256
# Queries that a step of the loop over a window's blocks takes, in two blocks or more: what one block does alone leaves
# cores idle between its operations.
QUERIES_OF_A_STEP = 256
# A sequence of no more windows than this is cut as one without a window, which is then as fast.
FEW_WINDOWS = 2


class Context(struct.PyTreeNode):
    """Where the tokens of a batch stand; the same for all layers."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    """0 is padding; the documents packed into a row are numbered 1, 2, ... None: one document, nothing padded."""
    rotation: Rotation | None = None
    """How RoPE turns queries and keys at these positions, in architectures that have it."""
    local_rotation: Rotation | None = None
    """The same in layers with a window, where these have frequencies of their own."""
    implementation: str = struct.field(pytree_node=False, default="auto")
    """How a sequence looks at itself: one of `IMPLEMENTATIONS`."""


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """True where a query may look at a key; a window is the number of keys that it sees, its own among them."""
    mask = key_positions[:, None, :] <= query_positions[:, :, None]
    if window is not None:
        mask &= key_positions[:, None, :] > query_positions[:, :, None] - window
    if query_segments is not None:
        assert key_segments is not None
        mask &= key_segments[:, None, :] == query_segments[:, :, None]
    return mask


def attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "B N T V"]:
    """Softmax(Q Kᵀ · scale) V over the visible keys: the reference form. The softmax runs in float32.

    `softcap` c bounds the scores: c · tanh(scores / c) (Gemma 2, arXiv:2408.00118, section 2).
    """
    query = _in_groups(query, key)
    weights = jax.nn.softmax(_scores(query, key, mask, scale, softcap), axis=-1)
    if dropout_key is not None and dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    return _heads(jnp.einsum("bkgts,bksh->bkgth", weights.astype(value.dtype), value))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def lean_attend(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    mask: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B N T V"]:
    """`attend` without dropout, in fewer passes over [T, S], forward and back.

    The sum of the exponentials divides the mixed values, not the weights. And the softmax's gradient needs for each
    query the sum over keys of weight · slope, which equals the product of the mixed values with their own slope
    (Dao et al. 2022, arXiv:2205.14135, appendix B.2, eq. 4). The slope of the softcap, 1 - tanh², is had from the
    capped scores, and these from their exponentials: nothing more of size [T, S] is saved.
    """
    return _lean_forward(query, key, value, mask, scale, softcap)[0]


def _lean_forward(
    query: Array, key: Array, value: Array, mask: Array, scale: float, softcap: float | None
) -> tuple[Array, tuple[Array, ...]]:
    query = _in_groups(query, key)
    scores = _scores(query, key, mask, scale, softcap)
    largest = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - largest)
    total = exponentials.sum(-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", exponentials, value, preferred_element_type=jnp.float32) / total
    return _heads(mixed.astype(value.dtype)), (query, key, value, exponentials, largest, total, mixed)


def _lean_again(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    scale: float,
    softcap: float | None,
    largest: Array,
    total: Array,
    mixed: Array,
) -> tuple[Array, ...]:
    """What `_lean_forward` saves, had from what of it is linear in the length: its exponentials are formed anew."""
    query = _in_groups(query, key)
    exponentials = jnp.exp(_scores(query, key, mask, scale, softcap) - largest).astype(value.dtype)
    return query, key, value, exponentials, largest, total, mixed


def _lean_backward(
    scale: float, softcap: float | None, saved: tuple[Array, ...], slope: Array
) -> tuple[Array, Array, Array, None]:
    query, key, value, exponentials, largest, total, mixed = saved
    slope = _in_groups(slope, key)
    sums = (slope * mixed).sum(-1, keepdims=True)  # in float32, as `mixed` is: differences are taken with them
    weight_slope = jnp.einsum("bkgth,bksh->bkgts", slope, value, preferred_element_type=jnp.float32)
    score_slope = exponentials * (weight_slope - sums) * (scale / total)
    if softcap is not None:
        tiny = jnp.finfo(jnp.float32).tiny  # An exponential of zero makes the slope zero, whatever its logarithm.
        capped = largest + jnp.log(jnp.maximum(exponentials.astype(jnp.float32), tiny))
        capped = jnp.clip(capped, -softcap, softcap)  # where a query sees no key, `largest` is beyond all scores
        score_slope *= 1.0 - jnp.square(capped / softcap)
    score_slope = score_slope.astype(value.dtype)
    return (
        _heads(jnp.einsum("bkgts,bksh->bkgth", score_slope, key)),
        _over_queries(query, score_slope),
        _over_queries((slope / total).astype(value.dtype), exponentials),
        None,
    )


def _over_queries(x: Float[Array, "B K G T H"], weights: Float[Array, "B K G T S"]) -> Float[Array, "B K S H"]:
    """weightsᵀ x, formed as (xᵀ weights)ᵀ: XLA's CPU backend then transposes x and the result, not the weights."""
    return jax.lax.dot_general(x, weights, (((2, 3), (2, 3)), ((0, 1), (0, 1)))).mT


lean_attend.defvjp(_lean_forward, _lean_backward)


def _in_groups(query: Float[Array, "B N T H"], key: Float[Array, "B K S _"]) -> Float[Array, "B K G T H"]:
    """Query heads by the key's head that they share."""
    batch, num_heads, length, width = query.shape
    return query.reshape(batch, key.shape[1], num_heads // key.shape[1], length, width)


def _heads(grouped: Float[Array, "B K G T V"]) -> Float[Array, "B N T V"]:
    return grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])


def _scores(
    query: Array, key: Array, mask: Array, scale: float, softcap: float | None = None
) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def self_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    context: Context,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> Float[Array, "B N T V"]:
    """Causal attention of a sequence to itself, as `context.implementation` says.

    Tokens of a segment must stand in the order of their positions, and as many positions apart as places or more, as
    they do in every batch: then no query sees a key that stands after it in the row, nor with a window W one that
    stands W or more places before it. Implementations may differ in padding, and draw dropout differently.
    """
    if dropout_rate == 0.0:
        dropout_key = None
    length = query.shape[2]
    name = choose(
        context.implementation,
        length=length,
        window=window,
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        softcap=softcap,
        dropout=dropout_key is not None,
        segmented=context.segment_ids is not None,
    )
    if name == "fused":
        return _fused(query, key, value, context, scale, window)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout_rate": dropout_rate}
    if name == "masked":
        return query_blocks(query, key, value, context, length, window, dropout_key, **options)
    if window is None or length <= FEW_WINDOWS * window:
        block = max(SHORTEST_QUERY_BLOCK, -(-length // QUERY_BLOCKS))
        return query_blocks(query, key, value, context, block, window, dropout_key, **options)
    return window_blocks(query, key, value, context, window_block(window), window, dropout_key, **options)


def check_implementation(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise BadInput(f"attention={name!r} is unknown; {did_you_mean(name, IMPLEMENTATIONS)}")


def choose(
    name: str,
    *,
    length: int,
    window: int | None,
    head_dim: int,
    dtype: Dtype,
    value_dim: int | None = None,
    softcap: float | None = None,
    dropout: bool = False,
    segmented: bool = False,
    device: Any = None,
) -> str:
    """The implementation that is meant by a name, "auto" among them. BadInput: there is none, or it cannot run."""
    check_implementation(name)
    device = device or jax.devices()[0]
    automatic = name == "auto"
    if automatic:
        name = AUTOMATIC.get(device.platform, ELSEWHERE)[window is not None]
        if dropout and window is None:
            name = "masked"
    if name == "fused":
        widths = head_dim, head_dim if value_dim is None else value_dim
        obstacle = _fused_obstacle(device, length, widths, dtype, softcap, dropout, segmented)
        if obstacle is not None and not automatic:
            raise BadInput(f"attention='fused' cannot run: {obstacle}; take 'blocked' or 'auto'")
        name = "fused" if obstacle is None else "blocked"
    return name


def query_blocks(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    context: Context,
    block: int,
    window: int | None = None,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    **options: Any,
) -> Float[Array, "B N T V"]:
    """Blocks of queries that skip the keys after them, written out: the upper triangle of scores is never computed."""
    length = query.shape[2]
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        positions, segments = context.positions, context.segment_ids
        mask = visible(
            positions[:, start:end],
            positions[:, :end],
            None if segments is None else segments[:, start:end],
            None if segments is None else segments[:, :end],
            window,
        )
        drop = dropout_key if dropout_key is None or block >= length else jax.random.fold_in(dropout_key, start)
        outputs.append(_mix(query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, drop, **options))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def window_block(window: int) -> int:
    """Length of a block of queries that meets a window's keys: half the window costs three halves of it in keys."""
    return min(max(SHORTEST_QUERY_BLOCK, -(-window // 2)), LONGEST_WINDOW_BLOCK)


def window_blocks(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    context: Context,
    block: int,
    window: int,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    **options: Any,
) -> Float[Array, "B N T V"]:
    """A loop over blocks of queries, each of which meets its own keys and those of the blocks that its window reaches.

    The backward pass forms the scores of a block anew: those of a few blocks are all that is ever held. The mixed
    values, largest scores and totals are kept, as in FlashAttention.
    """
    length = query.shape[2]
    loop = _WindowLoop(block, -(-(window - 1) // block), window, **options)

    def padded(x: Array | None, axis: int, before: int, fill: int = 0) -> Array | None:
        """Whole blocks, and as many before them."""
        if x is None:
            return None
        pad = [(0, 0)] * x.ndim
        pad[axis] = (before * block, -length % block)
        return jnp.pad(x, pad, constant_values=fill)

    # What fills up the row stands nowhere: no token looks there, and it sees itself.
    places = padded(context.positions, 1, loop.reach, NOWHERE), padded(context.segment_ids, 1, loop.reach)
    keys, values = (padded(x, 2, loop.reach) for x in (key, value))
    return _windowed(padded(query, 2, 0), keys, values, places, dropout_key, loop)[:, :, :length]


@dataclass(frozen=True)
class _WindowLoop:
    """What a loop over the blocks of a window knows beside its arrays."""

    block: int
    reach: int
    """Blocks before its own whose keys a block of queries meets."""
    window: int
    scale: float
    softcap: float | None
    dropout_rate: float

    def cut(self, x: Array, start: Array, axis: int = 2) -> Array:
        """A block of queries, or of anything that goes with them."""
        return jax.lax.dynamic_slice_in_dim(x, start, self.block, axis)

    def cut_near(self, x: Array, start: Array, axis: int = 2) -> Array:
        """The keys, or values, of that block and of the `reach` blocks before it: they stand that much further on."""
        return jax.lax.dynamic_slice_in_dim(x, start, (self.reach + 1) * self.block, axis)

    def visible(self, places: tuple[Array, Array | None], start: Array) -> Bool[Array, "B T S"]:
        own = start + self.reach * self.block
        positions, segments = places
        return visible(
            self.cut(positions, own, 1),
            self.cut_near(positions, start, 1),
            None if segments is None else self.cut(segments, own, 1),
            None if segments is None else self.cut_near(segments, start, 1),
            self.window,
        )

    def dropping(self, key: Array, index: Array) -> dict[str, Any]:
        """How `attend` mixes a block."""
        options = {"scale": self.scale, "softcap": self.softcap, "dropout_rate": self.dropout_rate}
        return options | {"dropout_key": jax.random.fold_in(key, index)}

    def run(self, step: Callable[[Array, Any], Any], state: Any, length: int) -> Any:
        """`state` after `step(index, state)` of all blocks."""
        indices, unroll = jnp.arange(length // self.block), max(2, QUERIES_OF_A_STEP // self.block)
        return jax.lax.scan(lambda state, i: (step(i, state), None), state, indices, unroll=unroll)[0]


# Written with its gradient. Left to JAX, each block would get a copy of the keys that it meets, which then are kept.
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _windowed(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    places: tuple[Int[Array, "B S"], Int[Array, "B S"] | None],
    dropout_key: Array | None,
    loop: _WindowLoop,
) -> Float[Array, "B N T V"]:
    """Keys and values stand `loop.reach` blocks after queries."""
    return _windowed_forward(query, key, value, places, dropout_key, loop)[0]


def _windowed_forward(
    query: Array, key: Array, value: Array, places: Any, dropout_key: Array | None, loop: _WindowLoop
) -> tuple[Array, tuple[Any, ...]]:
    def one_block(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        start = index * loop.block
        block = loop.cut(query, start), loop.cut_near(key, start), loop.cut_near(value, start)
        mask = loop.visible(places, start)
        found: tuple[Array, ...]
        if dropout_key is None:
            *_, largest, total, mixed = _lean_forward(*block, mask, loop.scale, loop.softcap)[1]
            found = _heads(mixed), _heads(largest), _heads(total)
        else:
            found = (attend(*block, mask, **loop.dropping(dropout_key, index)),)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, part, start, 2) for x, part in zip(state, found, strict=True)
        )

    rows = query.shape[:3]
    if dropout_key is None:
        state = [jnp.zeros((*rows, width), jnp.float32) for width in (value.shape[3], 1, 1)]
    else:
        state = [jnp.zeros((*rows, value.shape[3]), value.dtype)]
    mixed, *sums = loop.run(one_block, tuple(state), rows[2])
    kept = (mixed, *sums) if dropout_key is None else ()
    return mixed.astype(value.dtype), (query, key, value, places, dropout_key, *kept)


def _windowed_backward(loop: _WindowLoop, saved: tuple[Any, ...], slope: Array) -> tuple[Any, ...]:
    query, key, value, places, dropout_key, *kept = saved

    def one_block(index: Array, slopes: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start = index * loop.block
        block = loop.cut(query, start), loop.cut_near(key, start), loop.cut_near(value, start)
        mask, own_slope = loop.visible(places, start), loop.cut(slope, start)
        if dropout_key is None:
            mixed, largest, total = (_in_groups(loop.cut(x, start), key) for x in kept)
            again = _lean_again(*block, mask, loop.scale, loop.softcap, largest, total, mixed)
            own, *near, _ = _lean_backward(loop.scale, loop.softcap, again, own_slope)
        else:
            mix = partial(attend, mask=mask, **loop.dropping(dropout_key, index))
            own, *near = jax.vjp(mix, *block)[1](own_slope)
        query_slope, *others = slopes
        key_slope, value_slope = (
            jax.lax.dynamic_update_slice_in_dim(x, loop.cut_near(x, start) + part, start, 2)
            for x, part in zip(others, near, strict=True)
        )
        own = own.astype(query_slope.dtype)
        return jax.lax.dynamic_update_slice_in_dim(query_slope, own, start, 2), key_slope, value_slope

    # In float32: a key's slope is the sum of what several blocks add to it.
    inputs = query, key, value
    slopes = loop.run(one_block, tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs), query.shape[2])
    return *(slope.astype(x.dtype) for slope, x in zip(slopes, inputs, strict=True)), None, None


_windowed.defvjp(_windowed_forward, _windowed_backward)


def _mix(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    dropout_key: Array | None,
    *,
    scale: float,
    softcap: float | None,
    dropout_rate: float,
) -> Array:
    if dropout_key is None:
        return lean_attend(query, key, value, mask, scale, softcap)
    options: dict[str, Any] = {"softcap": softcap, "dropout_rate": dropout_rate, "dropout_key": dropout_key}
    return attend(query, key, value, mask, scale=scale, **options)


def _fused(query: Array, key: Array, value: Array, context: Context, scale: float, window: int | None) -> Array:
    """cuDNN's flash attention. Its window counts places in the row, which in a segment is as good as positions. Its
    values are as wide as its keys: narrower ones (MLA's) are filled up with zeros, which mix to zeros."""
    segments, width = context.segment_ids, value.shape[-1]
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, key.shape[-1] - width)])
    mixed = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=None if segments is None else segments[:, None, :, None] == segments[:, None, None, :],
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed[..., :width].swapaxes(1, 2)


def _fused_obstacle(
    device: Any,
    length: int,
    widths: tuple[int, int],
    dtype: Any,
    softcap: float | None,
    dropout: bool,
    segmented: bool,
) -> str | None:
    """Why cuDNN's kernel cannot run, if it cannot (`jax.nn.dot_product_attention`, implementation="cudnn")."""
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if not generation.isdigit() or int(generation) < 8:
        return f"it is a kernel of NVIDIA GPUs from Ampere on, and this is {device.device_kind}"
    widest = 256 if int(generation) >= 9 else 128
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    if softcap is not None:
        return "it has no softcap on the scores"
    if dropout:
        return "it has no dropout with our keys"
    head_dim, value_dim = widths
    if value_dim > head_dim:
        return f"its values are no wider than its keys, and here {value_dim} features beside {head_dim}"
    if head_dim % 8 or head_dim > widest:
        return f"its heads have a multiple of 8 features, here at most {widest}, not {head_dim}"
    if segmented and length % 2:
        return f"rows with segment ids must have an even length, not {length}"
    return None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    context: Context,
    cache: Any = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
) -> tuple[Float[Array, "B T N V"], Any]:
    """What a block calls: attention to the sequence itself and to what its cache holds: (mixed values, cache)."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # heads before positions
    if cache is None or cache.empty:
        options: dict[str, Any] = {"softcap": softcap, "dropout_rate": dropout_rate, "dropout_key": dropout_key}
        mixed = self_attention(query, key, value, context, scale=scale, window=window, **options)
        if cache is not None:
            cache = cache.write(key, value, context.positions, context.segment_ids)
    else:
        cache, (keys, values, key_positions) = cache.update(key, value, context.positions, context.segment_ids)
        mask = visible(context.positions, key_positions, window=window)
        mixed = lean_attend(query, keys, values, mask, scale, softcap)
    return mixed.swapaxes(1, 2), cache
