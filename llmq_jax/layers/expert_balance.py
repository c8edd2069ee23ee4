"""Keeping experts evenly loaded: what a router reports, and the losses and the bias that follow from it.

A router tends to send most tokens to a few experts, which then learn even more. Three remedies:

- losses that penalise imbalance, added to the objective: `load_balance` (per layer, or pooled over layers), `sequence`,
  `device`, and `router_z`, on the size of the router's logits;
- a bias on the scores, for selection only, moved after each step against the load: no loss, no gradient
  (`moved_bias`; Wang et al. 2024, arXiv:2408.15664);
- noise on the logits (`Experts.noise`).

With E experts, of which each of n tokens chooses k, c_e assignments to expert e, and p_e(t) the router's probability:

    f_e = c_e / n, or c_e / (k n)      P_e = Σ_t p_e(t) / n      loss = E Σ_e f_e P_e

For an even load the loss is 1 with the division by k, and k without it. Gradients flow through P alone. Padding is
counted nowhere.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import check_fields

BIAS_UPDATES = ("sign", "proportional")


@dataclass(frozen=True)
class Balance:
    """Coefficients of the losses that are added in training, and the update speed of the bias. 0 turns each off."""

    load_balance: float = 0.0
    """Coefficient of E Σ f P in each layer (Fedus et al. 2021, arXiv:2101.03961, eq. 4; DeepSeekMoE, arXiv:2401.06066,
    eq. 12), averaged over layers."""
    pooled: bool = False
    """Whether `load_balance` takes f and P over the tokens of all layers together, as transformers' Mixtral does,
    instead of per layer."""
    divide_by_top_k: bool = True
    """Whether f of `load_balance` is c / (k n). False is c / n, as in transformers, which makes the loss k times as
    large."""
    router_z: float = 0.0
    """Coefficient of the mean square of the logits' logsumexp (ST-MoE, arXiv:2202.08906, eq. 5), averaged over
    layers."""
    sequence: float = 0.0
    """Coefficient of E Σ f P within each row, f = c / (k n) (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20), averaged
    over rows and layers."""
    device: float = 0.0
    """Coefficient of D Σ f P over D groups of experts (DeepSeekMoE, eq. 15), averaged over layers."""
    devices: int = 1
    """D, the number of groups of experts that `device` balances: one for each device that has experts."""
    bias_rate: float = 0.0
    """How far the bias for selection moves after each step (γ of DeepSeek-V3, section 2.1.2)."""
    bias_update: str = "sign"
    """How the bias moves: by the "sign" of (mean load - own load), or "proportional" to (mean - own) / mean."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("load_balance", "router_z", "sequence", "device", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"balance: {name}={getattr(self, name)} must be at least 0, and finite")
        if self.bias_update not in BIAS_UPDATES:
            raise BadInput(f"balance: bias_update={self.bias_update!r}; {did_you_mean(self.bias_update, BIAS_UPDATES)}")
        default = Balance.__dataclass_fields__
        for name, needed in (
            ("pooled", "load_balance"),
            ("divide_by_top_k", "load_balance"),
            ("devices", "device"),
            ("bias_update", "bias_rate"),
        ):
            if getattr(self, name) != default[name].default and not getattr(self, needed):
                raise BadInput(f"balance: {name}={getattr(self, name)!r} has no effect without {needed}; set that too")
        if self.device and self.devices < 2:
            raise BadInput(f"balance: device={self.device} needs devices, at least 2 groups of experts; set that too")


class RouterReport(struct.PyTreeNode):
    """What a layer's router did with the real tokens of a batch: sums, which add over batches and devices.

    Layers that run in a scan stack theirs on a leading axis.
    """

    # Any, because leaves may be shapes as well as arrays.
    assigned: Any
    """int32 [E]: assignments to each expert."""
    dropped: Any
    """int32: assignments that found no slot."""
    tokens: Any
    """int32: real tokens."""
    probability: Any
    """float32 [E]: Σ over tokens of the router's probabilities."""
    squared_logsumexp: Any
    """float32: Σ over tokens of the square of the logits' logsumexp."""
    sequence_balance: Any
    """float32: Σ over rows of E Σ f P within the row, f divided by k."""
    sequences: Any
    """int32: rows that hold a token."""


def report(
    logits: Float[Array, "B T E"],
    probabilities: Float[Array, "B T E"],
    ids: Int[Array, "B T k"],
    real: Bool[Array, "B T"],
    dropped: Int[Array, ""],
) -> RouterReport:
    count, top_k = logits.shape[-1], ids.shape[-1]
    chosen = jax.nn.one_hot(ids, count, dtype=jnp.int32).sum(2) * real[..., None]  # [B, T, E]
    probabilities = probabilities * real[..., None]
    lengths = jnp.maximum(real.sum(1), 1)[:, None]
    by_row = count * (chosen.sum(1) / (top_k * lengths) * probabilities.sum(1) / lengths).sum(-1)
    return RouterReport(
        assigned=chosen.sum((0, 1)),
        dropped=dropped,
        tokens=real.sum(),
        probability=probabilities.sum((0, 1)),
        squared_logsumexp=(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real).sum(),
        sequence_balance=by_row.sum(),
        sequences=real.any(1).sum(),
    )


def all_layers(counts: dict[str, Any]) -> RouterReport | None:
    """The reports of all layers with experts, from first to last, out of the counts that a decoder's pass returns."""
    groups = []
    for _, blocks in _in_order(counts):
        reports = [block["router"] for _, block in _in_order(blocks) if "router" in block]
        if reports:  # A group repeats its blocks one after another.
            groups.append(
                jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *reports)
            )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *groups) if groups else None


def _in_order(parts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Groups or blocks by their numbers: a compiled function returns group_10 before group_2."""
    return sorted(parts.items(), key=lambda item: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", item[0])])


def balance_losses(reports: RouterReport, balance: Balance, top_k: int) -> dict[str, Float[Array, ""]]:
    """The losses whose coefficient is not 0, not yet multiplied by it, from the reports of all layers [L, ...]."""
    tokens = jnp.maximum(reports.tokens, 1)
    count = reports.assigned.shape[-1]
    losses = {}
    if balance.load_balance:
        part = reports
        if balance.pooled:
            part = jax.tree.map(lambda leaf: leaf.sum(0, keepdims=True), reports)
        by_layer = _frequencies_times_probabilities(part.assigned, part.probability, part.tokens, count)
        losses["load_balance"] = by_layer.mean() / (top_k if balance.divide_by_top_k else 1)
    if balance.router_z:
        losses["router_z"] = (reports.squared_logsumexp / tokens).mean()
    if balance.sequence:
        losses["sequence"] = (reports.sequence_balance / jnp.maximum(reports.sequences, 1)).mean()
    if balance.device:
        # f' is the mean of f over a group's experts (f = E/k · c/n, 1 where even), P' the sum of its probabilities.
        assigned, probability = (
            leaf.reshape(-1, balance.devices, count // balance.devices).sum(-1)
            for leaf in (reports.assigned, reports.probability)
        )
        by_layer = _frequencies_times_probabilities(assigned, probability, reports.tokens, balance.devices)
        losses["device"] = by_layer.mean() / top_k
    return losses


def _frequencies_times_probabilities(
    assigned: Array, probability: Array, tokens: Array, count: int
) -> Float[Array, " L"]:
    """count · Σ f P, f not divided by k."""
    tokens = jnp.maximum(tokens, 1)[:, None]
    return count * (assigned / tokens * probability / tokens).sum(-1)


def moved_bias(bias: Float[Array, "*L E"], assigned: Int[Array, "*L E"], balance: Balance) -> Float[Array, "*L E"]:
    """The bias after a step: up for experts with less than the mean load, down for those with more."""
    mean = assigned.mean(-1, keepdims=True)
    error = mean - assigned
    step = jnp.sign(error) if balance.bias_update == "sign" else error / jnp.maximum(mean, 1)
    return bias + balance.bias_rate * step


def max_violation(assigned: Int[Array, "*L E"]) -> Float[Array, "*L"]:
    """(largest load - mean load) / mean load over experts: 0 is even (arXiv:2408.15664, eq. 4)."""
    mean = assigned.mean(-1)
    return (assigned.max(-1) - mean) / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
