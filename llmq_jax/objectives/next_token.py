"""Next-token prediction: the pretraining objective, -Σ log p(token | tokens before it) / tokens.

An objective is two pure functions. `weights` counts, from the masks of the whole global batch, what each named term is
divided by; `loss` sums over a micro-batch and divides by these weights. The results of micro-batches and of devices
then simply add: accumulation, padding and data parallelism cannot change the total.

What training adds to the loss is added where `rng` is given, and the plain loss is then a metric by one of OWN_LOSSES
(`training/metrics.py`). A metric that evaluation returns, where `rng` is None, has an entry in `weights`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy
from llmq_jax.objectives.means import safe_divide


@dataclass(frozen=True)
class NextToken:
    """Batches hold `tokens`, `targets` and `mask` [B, T] (targets are the tokens shifted by one, mask is 1 where a
    target counts), and for packed or padded rows `positions` and `segment_ids` [B, T]."""

    model: Decoder

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """The number of targets that count. `step` is the training step; no term here depends on it."""
        return {"loss": batch["mask"].astype(jnp.float32).sum()}

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss in nats a token, metrics that add over micro-batches, `Output.counts`: what the routers of experts
        report).

        `rng` is given in training: dropout acts, and the balance losses of experts are added.
        """
        output = self.model.apply(
            variables,
            batch["tokens"],
            batch.get("positions"),
            batch.get("segment_ids"),
            method="forward",
            rngs=None if rng is None else {"dropout": rng},
        )
        mask = batch["mask"].astype(jnp.float32)
        loss = safe_divide(head_loss(self.model, variables, output.hidden, batch["targets"], mask), weights["loss"])
        if rng is None:
            return loss, {}, output.counts
        share = safe_divide(mask.sum(), weights["loss"])
        return with_balance_losses(loss, {}, output.counts, self.model.experts, share, name="next_token_loss")


def head_loss(
    model: Decoder,
    variables: dict[str, Any],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum over tokens of mask · (-log p(target)), by the model's head."""
    unembed = partial(model.apply, method="unembed")
    return chunked_cross_entropy(unembed, model.head_variables(variables), hidden, targets, mask)
