"""Direct preference optimisation: learn from pairs of answers of which one is preferred, without a reward model.

DPO (Rafailov et al. 2023, arXiv:2305.18290): the policy's own log-probabilities, compared with those of a frozen
reference, are the reward, r(x, y) = β log(π(y|x) / π_ref(y|x)) plus a term of x alone, which cancels (eq. 5). The loss
is the negative log likelihood of the preferences in the Bradley-Terry model of this reward. With y_w the preferred
answer, y_l the other, and ε `label_smoothing`:

    Δ = log(π(y_w|x) / π_ref(y_w|x)) - log(π(y_l|x) / π_ref(y_l|x))

    sigmoid    -log σ(β Δ)                                             eq. 7
    cDPO       -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)                     sigmoid with label smoothing: labels are wrong
                                                                       with probability ε
    robust     (-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)) / (1 - 2ε)        unbiased despite these, arXiv:2403.00409
    hinge      max(0, 1 - β Δ)                                         arXiv:2305.10425
    ipo        (Δ - 1 / (2 β))²                                        arXiv:2310.12036, eq. 17

An answer's log-probability is the sum over its tokens, the end token included, so that long answers weigh more; `ipo`
takes means over tokens, and the others can, by `normalise`. An objective as `next_token` describes it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.logprobs import logprobs_and_counts
from llmq_jax.objectives.means import safe_divide

LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo")
SMOOTHED = ("sigmoid", "robust")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPROBS = ("logps/chosen", "logps/rejected")


def dpo_loss(
    policy_chosen: Float[Array, " B"],
    policy_rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """(loss, metrics by name) of each of B pairs, from log-probabilities of the answers in nats: sums over tokens, for
    "ipo" means. Rafailov et al. 2023 (arXiv:2305.18290, eq. 7), and its relatives: see above.

    Metrics are TRL's: `rewards/chosen` and `rewards/rejected` (beta · log-ratio), `rewards/margins`,
    `rewards/accuracies` (ties count one half). BadInput: a loss type that is unknown, or options that it ignores.
    """
    check_dpo(beta, label_smoothing, loss_type)
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    delta = chosen - rejected
    right, wrong, e = -jax.nn.log_sigmoid(beta * delta), -jax.nn.log_sigmoid(-beta * delta), label_smoothing
    losses = {
        "sigmoid": (1 - e) * right + e * wrong,
        "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "hinge": jax.nn.relu(1 - beta * delta),
        "ipo": (delta - 1 / (2 * beta)) ** 2,
    }
    return losses[loss_type], rewards_of(chosen, rejected, beta)


def rewards_of(chosen: Float[Array, " B"], rejected: Float[Array, " B"], beta: float) -> dict[str, Float[Array, " B"]]:
    """The metrics of `dpo_loss`, from log-ratios of the policy to its reference."""
    delta = chosen - rejected
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * delta,
        "rewards/accuracies": (delta > 0) + 0.5 * (delta == 0),
    }


def check_dpo(beta: float, label_smoothing: float, loss_type: str, normalise: bool = False) -> None:
    """BadInput for options that are unknown or out of range, or that the loss ignores."""
    if loss_type not in LOSS_TYPES:
        advice = (
            "cDPO is sigmoid with label_smoothing" if loss_type == "cdpo" else f"choose from {', '.join(LOSS_TYPES)}"
        )
        raise BadInput(f"loss_type={loss_type!r} is unknown; {advice}")
    if not 0 < beta < float("inf"):
        raise BadInput(f"beta={beta} must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise BadInput(
            f"label_smoothing={label_smoothing} must be at least 0 and below 0.5: it is how often the labels are wrong"
        )
    if label_smoothing and loss_type not in SMOOTHED:
        raise BadInput(f"label_smoothing has no effect with loss_type={loss_type!r}; leave it out")
    if normalise and loss_type == "ipo":
        raise BadInput("normalise has no effect with loss_type='ipo', which always compares means; leave it out")


@dataclass(frozen=True)
class DPO:
    """Batches hold pairs, chosen before rejected: `tokens` [B, 2, T], padded on the right to `lengths` [B, 2],
    `response_mask` [B, 2, T], which is 1 on the tokens of the answers, `reference_logprobs` [B, 2], the answers'
    log-probabilities (sums) under the reference, and `mask` [B], which is 1 where a pair counts."""

    model: Decoder
    beta: float = 0.1
    """β: how much the distance from the reference costs."""
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"
    normalise: bool = False
    """Compare means over tokens in place of sums; "ipo" always does."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_dpo(self.beta, self.label_smoothing, self.loss_type, self.normalise)

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """The number of pairs that count: of the loss and of each metric."""
        pairs = batch["mask"].astype(jnp.float32).sum()
        return dict.fromkeys(("loss", *REWARDS, *LOGPROBS), pairs)

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss a pair, metrics that add over micro-batches, counts).

        `rng` is given in training: the balance losses of experts are added. Dropout never acts: the reference is
        evaluated without it, and its effect on a log-probability would count as distance from the reference.
        """
        mask = batch["mask"].astype(jnp.float32)
        policy, counts = pair_logprobs(self.model, variables, batch)
        reference = batch["reference_logprobs"]
        means = self.normalise or self.loss_type == "ipo"
        tokens = jnp.maximum(batch["response_mask"].sum(axis=-1), 1) if means else jnp.ones_like(reference)
        policy_chosen, policy_rejected = (policy / tokens).T
        reference_chosen, reference_rejected = (reference / tokens).T
        losses, _ = dpo_loss(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            loss_type=self.loss_type,
        )
        chosen, rejected = (policy - reference).T
        # Always of sums, unlike the metrics of dpo_loss, which are of means where the loss is (docs/dpo.md).
        metrics = rewards_of(chosen, rejected, self.beta)
        metrics |= {"logps/chosen": policy[:, 0], "logps/rejected": policy[:, 1]}
        metrics = {name: safe_divide((mask * value).sum(), weights["loss"]) for name, value in metrics.items()}
        loss = safe_divide((mask * losses).sum(), weights["loss"])
        if rng is None:
            return loss, metrics, counts
        share = safe_divide(mask.sum(), weights["loss"])
        return with_balance_losses(loss, metrics, counts, self.model.experts, share, name="preference_loss")


def pair_logprobs(
    model: Decoder, variables: dict[str, Any], batch: dict[str, Array]
) -> tuple[Float[Array, "B 2"], dict[str, Any]]:
    """(log p(answer | prompt) of both answers of each pair, counts of the pass): one pass for all of them."""
    rows = rows_of_pairs(batch)
    logprobs, counts = logprobs_and_counts(
        model, variables, rows["tokens"], rows["response_mask"], lengths=rows["lengths"]
    )
    return logprobs.sum(axis=-1).reshape(-1, 2), counts


def rows_of_pairs(batch: dict[str, Any]) -> dict[str, Any]:
    """The answers of a batch of B pairs as rows, those of a pair one after the other: `tokens` [2 B, T], `lengths`
    [2 B], `response_mask` [2 B, T]."""
    return {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("tokens", "lengths", "response_mask")}
