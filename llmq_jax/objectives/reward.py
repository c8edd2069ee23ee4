"""Reward model: -log σ(r(chosen) - r(rejected)), the mean over pairs of answers of which one was preferred.

Bradley and Terry (1952) give each answer a strength r and say that one wins over another with probability
σ(r_1 - r_2); the loss is the negative log likelihood of what was preferred (Ouyang et al. 2022, "InstructGPT",
equation 1). The strength is the score of a scalar head on the last token's hidden state, as in TRL and transformers, or
the mean of that head's scores over the tokens of the response, as in the original repository.

Only differences count, so that all rewards may drift together: `center` adds a multiple of (r(chosen) + r(rejected))²,
which holds their mean near 0 (Eisenstein et al. 2023, arXiv:2312.09244, equation 2). For a pair with a margin m the
loss is -log σ(r(chosen) - r(rejected) - m) (Touvron et al. 2023, "Llama 2", equation 2).

Shapes: B rows of T tokens; of pairs [B, 2, T], the chosen answer first. An objective as `next_token` describes it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from llmq_jax.errors import BadInput
from llmq_jax.models.decoder import Decoder, segments_of
from llmq_jax.models.heads import last_hidden, shown
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.means import safe_divide
from llmq_jax.objectives.preference import rows_of_pairs

POOLINGS = ("last", "mean")


@dataclass(frozen=True)
class RewardModel:
    """Batches hold pairs: `tokens` and `response_mask` [B, 2, T] (1 where a token belongs to the response), `lengths`
    [B, 2], `mask` [B], which is 1 where a pair counts, and, if there are any, `margins` [B]."""

    model: Decoder
    """Its config has one label: the head is a scalar."""
    pooling: str = "last"
    """The reward of a text: the score of its "last" token, or the "mean" score over the tokens of its response."""
    center: float = 0.0
    """Coefficient of (r(chosen) + r(rejected))²."""

    def __post_init__(self) -> None:
        require_scalar_head(self.model)
        _check_pooling(self.pooling)
        if not 0 <= self.center < math.inf:
            raise BadInput(f"center={self.center} must not be negative: 0 does not centre rewards")

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """The number of pairs that count, which the loss and all means are divided by."""
        pairs = batch["mask"].astype(jnp.float32).sum()
        return dict.fromkeys(("loss", "accuracy", "margin", "mean_reward"), pairs)

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss in nats a pair, metrics, counts).

        Metrics are TRL's: `accuracy`, the fraction of pairs whose chosen answer gets the greater reward (ties count one
        half), `margin`, the mean of r(chosen) - r(rejected), and `mean_reward`, `min_reward` and `max_reward` of
        all answers. All but the last two add over micro-batches. `rng` is given in training: dropout acts, and the
        balance losses of experts are added.
        """
        mask = batch["mask"].astype(jnp.float32)
        rngs = None if rng is None else {"dropout": rng}
        rewards, counts = model_rewards(self.model, variables, **rows_of_pairs(batch), pooling=self.pooling, rngs=rngs)
        rewards = rewards.reshape(-1, 2)
        chosen, rejected = rewards[:, 0], rewards[:, 1]
        losses = bradley_terry_loss(chosen, rejected, margin=batch.get("margins"), center=self.center)
        loss = safe_divide((mask * losses).sum(), weights["loss"])
        right = jnp.where(chosen == rejected, 0.5, (chosen > rejected).astype(jnp.float32))
        metrics = {
            "accuracy": safe_divide((mask * right).sum(), weights["accuracy"]),
            "margin": safe_divide((mask * (chosen - rejected)).sum(), weights["margin"]),
            "mean_reward": safe_divide((mask * (chosen + rejected) / 2).sum(), weights["mean_reward"]),
            "min_reward": jnp.where(mask > 0, rewards.min(axis=1), jnp.inf).min(),
            "max_reward": jnp.where(mask > 0, rewards.max(axis=1), -jnp.inf).max(),
        }
        if rng is None:
            return loss, metrics, counts
        share = safe_divide(mask.sum(), weights["loss"])
        return with_balance_losses(loss, metrics, counts, self.model.experts, share, name="reward_loss")


def bradley_terry_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | None = None,
    center: float = 0.0,
) -> Float[Array, " B"]:
    """-log σ(chosen - rejected - margin) + center · (chosen + rejected)² of the rewards [B] of each pair: [B], in nats.

    Ouyang et al. 2022 (arXiv:2203.02155, eq. 1); `margin` [B] as in Touvron et al. 2023 (arXiv:2307.09288, eq. 2).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -jax.nn.log_sigmoid(difference) + center * (chosen + rejected) ** 2


def model_rewards(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    response_mask: Shaped[Array, "B T"] | None = None,
    pooling: str = "last",
    rngs: dict[str, Any] | None = None,
) -> tuple[Float[Array, " B"], Any]:
    """(the reward of each row in float32, counts). Rows are padded on the right to `lengths`; "last" needs no
    `response_mask`, and takes only the last token's hidden state through the head. Empty rows and errors as in
    `sequence_rewards`."""
    if pooling != "last":
        scores, counts = token_scores(model, variables, tokens, lengths, rngs)
        return sequence_rewards(scores, lengths, response_mask, pooling), counts
    output = model.apply(variables, tokens, lengths=lengths, method="forward", rngs=rngs)
    last = last_hidden(output.hidden, segments_of(lengths, tokens.shape[1]))
    rewards = model.apply(variables, last, method="class_logits", rngs=rngs)[:, 0]
    return jnp.where(lengths > 0, rewards, 0.0), output.counts


def token_scores(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rngs: dict[str, Any] | None = None,
) -> tuple[Float[Array, "B T"], Any]:
    """(the scalar head's score of every token in float32, counts): the rewards of steps, for process supervision.
    Scores of padding mean nothing. BadInput: the head does not have exactly one label."""
    require_scalar_head(model)
    output = model.apply(variables, tokens, lengths=lengths, method="forward", rngs=rngs)
    return model.apply(variables, output.hidden, method="class_logits", rngs=rngs)[..., 0], output.counts


def sequence_rewards(
    scores: Float[Array, "B T"],
    lengths: Int[Array, " B"],
    response_mask: Shaped[Array, "B T"] | None = None,
    pooling: str = "last",
) -> Float[Array, " B"]:
    """The reward of each row from its tokens' scores: that of the last real token, or the mean over the tokens of the
    response, where `response_mask` is not 0. A row without such tokens gets 0. BadInput: a pooling that is unknown, or
    "mean" without a mask."""
    _check_pooling(pooling)
    if pooling == "last":
        last = jnp.take_along_axis(scores, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
        return jnp.where(lengths > 0, last, 0.0)
    if response_mask is None:
        raise BadInput('pooling "mean" is over the tokens of the response: give response_mask')
    counts = response_mask != 0
    # Scores of padding may be anything: they are left out, not multiplied by 0.
    return jnp.where(counts, scores, 0.0).sum(axis=1) / jnp.maximum(counts.sum(axis=1), 1)


def require_scalar_head(model: Decoder) -> None:
    """BadInput for a model that does not have exactly one label."""
    labels = model.config.labels
    if labels is None or len(labels) != 1:
        known = "no labels" if labels is None else f"{len(labels)} labels ({shown(labels)})"
        raise BadInput(
            f"the model's config has {known}; to give rewards it needs one: lq.with_classifier(lm, ['reward'])"
        )


def _check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise BadInput(f'pooling must be "last" or "mean", not {pooling!r}')
