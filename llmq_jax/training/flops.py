"""The FLOP of a token in training, and the peak rates of devices: model FLOP utilisation (MFU).

    MFU = tokens a second · FLOP a token / peak of all devices
    FLOP a token = 6 · weights + 3 · attention                       all of the model learns
                 = 4 · weights + 3 · attention                       adapters learn, and no weight has a gradient

    weights      entries of the matrices that a token passes through: of experts, k and the shared ones; of embeddings,
                 only one that is the head. Each takes 2 FLOP forward, 2 for its input's gradient and 2 for its own
    attention    FLOP forward, in each layer (T + 1) / 2 · heads · 2 · (key width + value width): only the keys that a
                 token sees, at most W with a window of W. For MLA the widths are those of training, 192 and 128 in
                 DeepSeek-V3. Both factors of its products have gradients: backward takes twice as much

Chowdhery et al. 2022 (arXiv:2204.02311), appendix B. Not counted: what the backward pass recomputes, norms, rotations,
the adapters' own products, and the optimizer.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmq_jax.layers.axes import EXPERTS, path_names
from llmq_jax.models import abstract_variables, build
from llmq_jax.models.deepseek3 import MTP
from llmq_jax.models.heads import LM_HEAD


class Peak(NamedTuple):
    """The peak rates of a device."""

    flops: float
    """FLOP a second, dense, in bfloat16."""
    bandwidth: float
    """Bytes a second, from its memory."""


PEAKS = {
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "H200 NVL": Peak(835e12, 4.8e12),
    "H200": Peak(989e12, 4.8e12),
    "GH200": Peak(989e12, 4.0e12),
    "A100-(SXM4|PCIE)-40GB": Peak(312e12, 1.555e12),
    "A100": Peak(312e12, 2.04e12),
    "B200": Peak(2250e12, 8.0e12),
    "TPU v4$": Peak(275e12, 1.23e12),
    "TPU v5(e| lite)": Peak(197e12, 0.82e12),
    "TPU v5p?$": Peak(459e12, 2.77e12),
    "TPU v6(e| lite)": Peak(918e12, 1.64e12),
    "TPU7x": Peak(1154e12, 3.69e12),  # half a chip, which is two devices
}
"""{pattern: peak}, where the first pattern found in a device's name counts; of SXM boards where the name does not say.
From the data sheets of NVIDIA and Google."""


def peak_of(device_kind: str) -> Peak | None:
    """The peak of a device of this name; None where it is not known, as for a CPU."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_kind)), None)


def token_utilisation(flops_per_token: float | None, state: Any, replicas: int = 1) -> float | None:
    """The MFU of one token a second, on the devices that hold the arrays of `state`, or on `replicas` devices of that
    kind. None where the FLOP of a token or the peak are not known."""
    if flops_per_token is None:
        return None
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    devices: set[Any] = set().union(*(array.sharding.device_set for array in arrays))
    peak = peak_of(next(iter(devices)).device_kind) if devices else None
    return None if peak is None else flops_per_token / (peak.flops * max(len(devices), replicas))


def token_flops(
    config: Any, lengths: int | Sequence[int], *, adapters: bool = False, modules: int = 0, unembedded: float = 1.0
) -> float:
    """FLOP of a token in training, by the formula above, in a model of this config.

    `lengths` are those of sequences that attend only to themselves, without padding, or one length for all. `adapters`:
    nothing but adapters learns, from the first layer on. `modules`: how many modules of multi-token prediction run
    beside the model. `unembedded`: the share of the tokens for which the head is computed.
    """
    weights = passed_weights(config, modules, unembedded)
    return (4 if adapters else 6) * weights + 3 * attention_flops(config, lengths, modules)


def passed_weights(config: Any, modules: int = 0, unembedded: float = 1.0) -> float:
    """Entries of the matrices that a token passes through; arguments as in `token_flops`."""
    total, experts = 0.0, build(config).experts
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(config)["params"]):
        names = path_names(path)
        if names[0] == MTP and not modules:
            continue
        if names[-1] in EXPERTS and names[-1].endswith("kernel"):
            assert experts is not None
            total += leaf.size * experts.top_k / leaf.shape[-len(EXPERTS[names[-1]])]
        elif _is_head(names, config):
            total += leaf.size * (unembedded + modules)
        elif names[-1] == "kernel":
            total += leaf.size
    return total


def _is_head(names: Sequence[str], config: Any) -> bool:
    """Whether this is the matrix that gives logits of tokens; a classifier has none."""
    tied: bool = config.tie_word_embeddings
    return config.labels is None and names[0] == ("token_embedding" if tied else LM_HEAD)


def attention_flops(config: Any, lengths: int | Sequence[int], modules: int = 0) -> float:
    """FLOP of attention forward, for a token, over all layers; arguments as in `token_flops`."""
    lengths = [lengths] if isinstance(lengths, int) else lengths
    windows = getattr(config, "layer_windows", (None,) * config.num_hidden_layers)
    model = build(config)
    block = next(iter(model.unbound_blocks().values()))  # heads are as wide in all layers
    key, value = model.head_widths(block.create_cache(1, 1, jnp.float32))
    total = 0.0
    for window in (*windows, *(None,) * modules):
        longest = window or max(lengths)
        pairs = sum(_seen(length, min(length, longest)) for length in lengths)
        total += pairs / sum(lengths) * config.num_attention_heads * 2 * (key + value)
    return total


def _seen(length: int, window: int) -> float:
    """The number of keys that each token of a sequence sees, at most `window`, summed over the tokens."""
    return window * (window + 1) / 2 + (length - window) * window
