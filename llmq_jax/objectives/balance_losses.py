"""What experts add to an objective in training: the losses that keep their load even.

They are products of means over a batch. Here they are computed for each micro-batch and averaged, weighted by its share
of the batch. So accumulation changes them, unlike nearly everything else.
"""

from typing import Any

from jaxtyping import Array, Float

from llmq_jax.layers.expert_balance import Balance, all_layers, balance_losses, max_violation
from llmq_jax.layers.moe import Experts, balance_from


def balance_terms(
    experts: Experts | None, counts: dict[str, Any], share: Float[Array, ""]
) -> tuple[Float[Array, ""] | float, dict[str, Array]]:
    """(Σ coefficient · loss; by name, each loss without its coefficient and the mean over layers of `max_violation`),
    all times this micro-batch's `share` of the batch. Without experts: 0 and nothing."""
    reports = all_layers(counts)
    if reports is None:
        return 0.0, {}
    assert experts is not None
    balance = balance_from(experts.balance) or Balance()
    losses = balance_losses(reports, balance, experts.top_k)
    metrics = {f"{name}_loss": share * loss for name, loss in losses.items()}
    penalty = sum((getattr(balance, name) * share * loss for name, loss in losses.items()), 0.0)
    return penalty, {**metrics, "max_violation_batch": share * max_violation(reports.assigned).mean()}


def with_balance_losses(
    loss: Float[Array, ""],
    metrics: dict[str, Array],
    counts: dict[str, Any],
    experts: Experts | None,
    share: Float[Array, ""],
    *,
    name: str,
) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
    """What an objective returns in training, from its loss, metrics and counts: (what is minimised, metrics, counts).

    Training minimises the loss plus the balance losses of experts. The metrics then hold these too, and the loss itself
    by its own `name`, such as "next_token_loss". Without experts nothing is added, and all stays as it is. `share` is
    this micro-batch's part of the batch.
    """
    penalty, balance = balance_terms(experts, counts, share)
    if balance:
        metrics = {name: loss, **metrics, **balance}
    return loss + penalty, metrics, counts
