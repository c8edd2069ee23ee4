"""Attention by an accelerator's own kernel, which computes scores block by block and never stores them (FlashAttention,
Dao et al. 2022, arXiv:2205.14135): cuDNN's on an NVIDIA GPU, JAX's Splash attention, written in Pallas, on a TPU.

Both skip keys by their index in the row, which within a segment equals the position. Neither needs a mask for padding
on the right: what comes later is not seen anyway. So rows are filled up at the end to a length that suits a kernel.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd
from threading import RLock
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.layers.axes import TENSOR, axis_sizes, partition_spec, target_device

# A TPU's kernel takes tokens in blocks of 128, one for each lane of a vector unit, or a multiple; here of at most 512.
LANES, LONGEST_BLOCK = 128, 512
NEWER = "NVIDIA GPUs from Ampere and of TPUs from v4"


def fused_attention(
    query: Float[Array, "B N T H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T V"],
    segments: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N T V"]:
    """Causal attention within segments, by the kernel of the backend; what it cannot do, `obstacle_to_fused` tells."""
    if window is not None and window >= query.shape[2]:
        window = None
    if target_device().platform == "gpu":
        return _cudnn(query, key, value, segments, scale, window)
    return _on_devices(query, key, value, segments, scale, window, softcap)


def obstacle_to_fused(
    device: Any,
    widths: tuple[int, int],
    dtype: Any,
    softcap: float | None,
    dropout: bool,
    heads: tuple[int, int],
) -> str | None:
    """Why the kernel cannot run on such a device, if it cannot. `widths` are those of keys and of values in a head,
    `heads` the numbers of query and of key heads."""
    if device.platform == "tpu":
        generation = re.search(r"\d+", device.device_kind)
        if generation and int(generation[0]) < 4:
            return f"it is a kernel of {NEWER} on, and this is {device.device_kind}"
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"it computes in bfloat16 or float32, not in {jnp.dtype(dtype)}"
    else:
        obstacle = _obstacle_to_cudnn(device, widths, dtype, softcap)
        if obstacle is not None:
            return obstacle
    if dropout:
        return "it has no dropout with our keys"
    parts = axis_sizes().get(TENSOR, 1)
    if heads[0] % parts == 0 and heads[1] % parts:
        return f"heads of queries and keys must be divided alike, and tensor={parts} divides {heads[0]}, not {heads[1]}"
    return None


def _padded(x: Array, more: int) -> Array:
    """[B, heads, T, width] or [B, T], with so many tokens of zeros at the end."""
    axis = 2 if x.ndim == 4 else 1
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


# On a TPU.


def _on_devices(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Array:
    """`_splash`, on a mesh for the rows and heads of each device: the compiler cannot divide a kernel by itself."""
    kernel = partial(_splash, scale=scale, window=window, softcap=softcap)
    sizes = axis_sizes()
    if not sizes:
        return kernel(query, key, value, segments)
    of_heads = [partition_spec((), x.shape, sizes, names=("batch", "heads", None, None)) for x in (query, key, value)]
    of_segments = None if segments is None else partition_spec((), segments.shape, sizes, names=("batch", None))
    specs = (*of_heads, of_segments)
    on_mesh = jax.shard_map(kernel, in_specs=specs, out_specs=of_heads[0], check_vma=False)
    mixed: Array = on_mesh(query, key, value, segments)
    return mixed


def _splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Array:
    """Its kernel takes one row, and queries that are scaled already. Elsewhere than on a TPU Pallas interprets it: that
    is for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = query.shape[1:3]
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query, key, value = (_padded(x, -length % LANES) for x in (query, key, value))
    whole = query.shape[2]
    one_head = (
        masks.CausalMask((whole, whole))
        if window is None
        else masks.LocalMask((whole, whole), (window - 1, 0), offset=0)
    )
    block = gcd(whole, LONGEST_BLOCK)
    of_gradients = ("q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in ("q", "kv", "kv_compute", *of_gradients)}
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([one_head] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        attn_logits_soft_cap=softcap,
        interpret=target_device().platform != "tpu",
    )
    rows: tuple[Any, ...] = (query, key, value)
    if segments is not None:
        segments = _padded(segments, whole - length)
        rows = (*rows, splash.SegmentIds(q=segments, kv=segments))
    mixed: Array = jax.vmap(kernel)(*rows)
    return mixed[:, :, :length]


# On an NVIDIA GPU.


def _cudnn(query: Array, key: Array, value: Array, segments: Array | None, scale: float, window: int | None) -> Array:
    """cuDNN needs values as wide as keys: narrower ones (MLA's) are padded with zeros, which are cut off the result.
    Its masks, and in JAX all of its gradients, need rows of even length."""
    length, width = query.shape[2], value.shape[-1]
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, key.shape[-1] - width)])
    query, key, value = (_padded(x, length % 2) for x in (query, key, value))
    segments = None if segments is None else _padded(segments, length % 2)
    with _no_gradient_of_masks():
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
    return mixed[:, :length, :, :width].swapaxes(1, 2)


_PATCHING = RLock()


@contextmanager
def _no_gradient_of_masks() -> Iterator[None]:
    """JAX gives cuDNN a mask as numbers to be added to the scores, and up to 0.10.2 asks it for their gradient too: a
    sum over heads [B, 1, T, T] in every layer that nobody reads, and that some of cuDNN's kernels cannot compute."""
    module: Any = sys.modules.get("jax._src.cudnn.fused_attention_stablehlo")
    with _PATCHING:
        asks = getattr(module, "should_export_dbias", None)
        if asks is None:  # a newer JAX
            yield
            return
        module.should_export_dbias = lambda *shapes: False
        try:
            yield
        finally:
            module.should_export_dbias = asks


def _obstacle_to_cudnn(device: Any, widths: tuple[int, int], dtype: Any, softcap: float | None) -> str | None:
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if not generation.isdigit() or int(generation) < 8:
        return f"it is a kernel of {NEWER} on, and this is {device.device_kind}"
    # Of gradients: Hopper's kernels alone have wider ones. JAX's own check lets Blackwell through, where cuDNN has no
    # engine for keys of 192 features with values as wide, nor a GeForce for any above 128.
    widest = 256 if int(generation) == 9 else 128
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 (--dtype bfloat16) or float16, not in {jnp.dtype(dtype)}"
    if softcap is not None:
        return "it has no softcap on the scores"
    head_dim, value_dim = widths
    if value_dim > head_dim:
        return f"its values are no wider than its keys, and here {value_dim} features beside {head_dim}"
    if head_dim % 8 or head_dim > widest:
        return f"its heads have a multiple of 8 features, here at most {widest}, not {head_dim}"
    return None
