"""The attention that all architectures share: `scaled_dot_product.py` under a mask of positions and segments, over the
sequence itself or a cache.

Masks are built from positions (causality, windows) and segment ids (packed documents; padding is segment 0), never from
token ids. A query sees the keys of its own segment at its own position and before; in a layer with a window of W, only
those at the last W positions, its own included. Padding sees padding, so that no row of scores is ever empty and
nothing becomes NaN.

Self-attention has four implementations, equal in values and gradients, with and without a window:

- plain: the formula as it is written (`attend`) under a mask, with JAX's own gradient; it reads caches too;
- masked: all T x T scores under a mask as well, with a hand-written gradient, in fewer passes over the scores;
- blocked: blocks of queries, each scored only against keys that some of its queries may see; in layers with a window,
  linear in T in time and in memory, forward and backward (`window_attention.py`);
- fused: the accelerator's own kernel, which never stores the scores in memory (`fused_attention.py`).

Projections give [B, T, heads, H]; products over positions need heads before positions. Queries, keys and values are
transposed once on the way in and the result once on the way out (caches hold keys and values in that order already):
left to XLA, each product and each of its gradients gets transposes of its own, at twice the time on a CPU.
"""

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from llmq_jax.errors import BadInput, close_names, did_you_mean
from llmq_jax.layers.axes import target_device, target_platform
from llmq_jax.layers.fused_attention import fused_attention, obstacle_to_fused
from llmq_jax.layers.positions import Rotation
from llmq_jax.layers.scaled_dot_product import attend, lean_attend, visible
from llmq_jax.layers.window_attention import window_block, window_blocks

IMPLEMENTATIONS = ("auto", "plain", "masked", "blocked", "fused")
# What "auto" chooses, by backend: (in layers without a window, in layers with one). On other backends, and where the
# fused kernel cannot run, it chooses ELSEWHERE. To run a formula that you change in `attend` everywhere, write
# ("plain", "plain") for your backend (docs/attention.md).
AUTOMATIC = {"cpu": ("blocked", "blocked"), "gpu": ("fused", "fused"), "tpu": ("fused", "fused")}
ELSEWHERE = ("masked", "blocked")
# Into how many blocks a sequence is cut in layers without a window: few, because each is compiled separately. Below
# the shortest length, a block costs more than the masked scores that it skips.
QUERY_BLOCKS = 4
SHORTEST_QUERY_BLOCK = 128
# A sequence no longer than this many windows is cut as in layers without a window, which is then as fast.
FEW_WINDOWS = 2


class Context(struct.PyTreeNode):
    """Positions, segments and rotations of a batch's tokens; the same for all layers."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    """0 is padding; the documents packed into a row are numbered 1, 2, ... None: one document, nothing padded."""
    rotation: Rotation | None = None
    """RoPE's rotation of queries and keys at these positions, in architectures that have it."""
    local_rotation: Rotation | None = None
    """The rotation in layers with a window, if they have frequencies of their own."""
    implementation: str = struct.field(pytree_node=False, default="auto")
    """How self-attention is computed: one of `IMPLEMENTATIONS`."""
    padded_on_the_right: bool = struct.field(pytree_node=False, default=False)
    """Whether `segment_ids` tell nothing but the padding after the one document of each row."""


class Choice(NamedTuple):
    """The implementation that `choose` selects."""

    name: str
    obstacle: str | None = None
    """Why the fused kernel cannot run, where "auto" would have chosen it; otherwise None."""


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
    formula: Callable[..., Array] | None = None,
    **others: Any,
) -> tuple[Float[Array, "B T N V"], Any]:
    """What a block calls: attention to the sequence itself and to the tokens in its cache. Returns (mixed values,
    cache).

    `others` are passed to `attend` unchanged: further inputs of a formula of yours, such as a learned sink. With
    `formula` a function of yours runs in place of `attend`, on the same arguments. "plain" alone supports either, so
    "auto" becomes "plain"; BadInput if another implementation is named, or if a keyword looks like a misspelling of an
    existing argument.
    """
    if formula is not None:
        others["formula"] = formula
    if others:
        _refuse_misspelt(others)
        if context.implementation not in ("auto", "plain"):
            known = f"attention={context.implementation!r} does not compute with {' and '.join(others)}"
            raise BadInput(f"{known}; take 'plain' or 'auto'")
        context = context.replace(implementation="plain")
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # heads before positions
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, **others}
    if cache is None or cache.empty:
        dropout: dict[str, Any] = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
        mixed = self_attention(query, key, value, context, **options, **dropout)
        if cache is not None:
            cache = cache.write(key, value, context.positions, context.segment_ids)
    else:
        cache, (keys, values, key_positions) = cache.update(key, value, context.positions, context.segment_ids)
        # Of one query XLA's GPU backend makes one kernel of the whole softmax, so that `lean_attend` saves no pass.
        one = query.shape[2] == 1 and target_platform() == "gpu"
        if one or reads_plainly(context.implementation, window is not None):
            mixed = plain_attention(query, keys, values, (context.positions, key_positions), **options)
        else:
            mask = visible(context.positions, key_positions, window=window)
            mixed = lean_attend(query, keys, values, mask, scale, softcap)
    return mixed.swapaxes(1, 2), cache


def _refuse_misspelt(names: Iterable[str]) -> None:
    """BadInput for a keyword that neither `attend` nor a function that calls it takes, but that resembles one of
    theirs."""
    taken: dict[str, Parameter] = {}
    for function in (attend, plain_attention, self_attention, attention):
        taken |= signature(function).parameters
    known = [name for name, parameter in taken.items() if parameter.kind is Parameter.KEYWORD_ONLY]
    for name in names:
        if name not in taken and close_names(name, known):
            raise BadInput(f"attention takes no {name!r}; {did_you_mean(name, known)}")


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
    **others: Any,
) -> Float[Array, "B N T V"]:
    """Causal attention of a sequence to itself, as `context.implementation` says; `others` are for "plain" alone.

    Within a segment, positions must rise by at least 1 from token to token (by exactly 1 for "fused" with a window), as
    they do in every batch here. Blocks and kernels skip keys by their index in the row, masks go by position: with
    rising positions no visible key is skipped. Implementations may differ at padding, and draw dropout differently.
    """
    if dropout_rate == 0.0:
        dropout_key = None
    length = query.shape[2]
    name = choose(
        context.implementation,
        window=window,
        widths=(query.shape[3], value.shape[3]),
        dtype=query.dtype,
        softcap=softcap,
        dropout=dropout_key is not None,
        heads=(query.shape[1], key.shape[1]),
    ).name
    if name == "fused":
        segments = None if context.padded_on_the_right else context.segment_ids
        return fused_attention(query, key, value, segments, scale=scale, window=window, softcap=softcap)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout_rate": dropout_rate}
    if name == "plain":
        positions, segments = context.positions, context.segment_ids
        both = None if segments is None else (segments, segments)
        return plain_attention(
            query, key, value, (positions, positions), both, window, dropout_key, **options, **others
        )
    if name == "masked":
        return query_blocks(query, key, value, context, length, window, dropout_key, **options)
    if window is None or length <= FEW_WINDOWS * window:
        block = max(SHORTEST_QUERY_BLOCK, -(-length // QUERY_BLOCKS))
        return query_blocks(query, key, value, context, block, window, dropout_key, **options)
    places, block = (context.positions, context.segment_ids), window_block(window)
    return window_blocks(query, key, value, places, block, window, dropout_key, **options)


def plain_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S V"],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    window: int | None = None,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    *,
    formula: Callable[..., Array] | None = None,
    **options: Any,
) -> Float[Array, "B N T V"]:
    """All that attention="plain" computes, on a sequence's own keys or on those in a cache: `attend`, or another
    `formula`, under one mask. `positions` and `segments` are pairs, (of queries, of keys); empty slots of a cache have
    positions after all queries, so that none sees them."""
    query_segments, key_segments = segments or (None, None)
    mask = visible(*positions, query_segments, key_segments, window)
    return (formula or attend)(query, key, value, mask, dropout_key=dropout_key, **options)


def check_implementation(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise BadInput(f"attention={name!r} is unknown; {did_you_mean(name, IMPLEMENTATIONS)}")


def choose(
    name: str,
    *,
    window: int | None,
    widths: tuple[int, int],
    dtype: Dtype,
    softcap: float | None = None,
    dropout: bool = False,
    heads: tuple[int, int] = (1, 1),
    device: Any = None,
) -> Choice:
    """The implementation to run for a name, which may be "auto". `widths` are those of keys and of values in a head,
    `heads` the numbers of query and of key heads, which a mesh may divide. BadInput: the name is unknown, or it is
    "fused" and that cannot run."""
    check_implementation(name)
    device = device or target_device()
    windowed, automatic = window is not None, name == "auto"
    if automatic:
        name = _automatic(device, windowed)
        if name == "blocked" and dropout and not windowed:
            name = "masked"
    obstacle = None
    if name == "fused":
        obstacle = obstacle_to_fused(device, widths, dtype, softcap, dropout, heads)
        if obstacle is not None:
            if not automatic:
                raise BadInput(f"attention='fused' cannot run: {obstacle}; take 'blocked' or 'auto'")
            name = ELSEWHERE[windowed]
    return Choice(name, obstacle)


def _automatic(device: Any, windowed: bool) -> str:
    return AUTOMATIC.get(device.platform, ELSEWHERE)[windowed]


def reads_plainly(name: str, windowed: bool) -> bool:
    """Whether a cache is read by the formula as it is written ("plain"). All other implementations read it in one and
    the same way, whether or not they can run here."""
    return (_automatic(target_device(), windowed) if name == "auto" else name) == "plain"


def query_blocks(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    context: Context,
    block: int,
    window: int | None = None,
    dropout_key: PRNGKeyArray | UInt32[Array, "2"] | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "B N T V"]:
    """An unrolled loop over blocks of queries, each scored against the keys up to its own end: scores above the blocks
    on the diagonal are never computed."""
    length, positions, segments = query.shape[2], context.positions, context.segment_ids
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = visible(
            positions[:, start:end],
            positions[:, :end],
            None if segments is None else segments[:, start:end],
            None if segments is None else segments[:, :end],
            window,
        )
        rows = query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask
        if dropout_key is None:
            outputs.append(lean_attend(*rows, scale, softcap))
        else:
            drop = dropout_key if block >= length else jax.random.fold_in(dropout_key, start)
            options: dict[str, Any] = {"softcap": softcap, "dropout_rate": dropout_rate, "dropout_key": drop}
            outputs.append(attend(*rows, scale=scale, **options))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
