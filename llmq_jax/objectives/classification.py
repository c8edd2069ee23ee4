"""Classification: -Σ w[label] log p(label | text) / Σ w[label], by a head on the text's last token.

Without weights of classes that is the mean over texts; with them it is torch's `CrossEntropyLoss(weight=w)`: a text
counts as much as its class weighs. An objective as `next_token` describes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.models.decoder import Decoder, segments_of
from llmq_jax.models.heads import last_hidden, shown
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.cross_entropy import token_losses
from llmq_jax.objectives.means import safe_divide


@dataclass(frozen=True)
class Classification:
    """Batches hold `tokens` [B, T], padded on the right to `lengths` [B], `labels` [B], the numbers of classes, and
    `mask` [B], which is 1 where a row counts."""

    model: Decoder
    class_weights: Sequence[float] | None = None
    """How much a text of each class counts; None: all the same."""

    def __post_init__(self) -> None:
        labels, weights = self.model.config.labels, self.class_weights
        if labels is None or len(labels) < 2:
            known = "no labels" if labels is None else f"one label ({labels[0]})"
            raise BadInput(f"the model's config has {known}; to be trained to classify it needs two or more")
        if weights is not None and len(weights) != len(labels):
            raise BadInput(
                f"{counted(len(weights), 'class weight')} given for {len(labels)} classes ({shown(labels)}); give "
                "one for each"
            )
        if weights is not None and not (min(weights) >= 0 and 0 < max(weights) < float("inf")):
            raise BadInput(f"class weights {list(weights)} must not be negative, one of them must be positive")

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """What divides the loss, Σ w[label], and what divides the accuracy, the number of rows that count."""
        return {"loss": self._row_weights(batch).sum(), "accuracy": batch["mask"].astype(jnp.float32).sum()}

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss in nats a text, metrics that add over micro-batches, counts).

        `rng` is given in training: dropout acts, and the balance losses of experts are added.
        """
        tokens, mask = batch["tokens"], batch["mask"].astype(jnp.float32)
        rngs = None if rng is None else {"dropout": rng}
        output = self.model.apply(variables, tokens, lengths=batch["lengths"], method="forward", rngs=rngs)
        last = last_hidden(output.hidden, segments_of(batch["lengths"], tokens.shape[1]))
        logits = self.model.apply(variables, last, method="class_logits", rngs=rngs)
        losses = token_losses(logits, batch["labels"])
        loss = safe_divide((self._row_weights(batch) * losses).sum(), weights["loss"])
        right = (logits.argmax(axis=-1) == batch["labels"]).astype(jnp.float32)
        metrics = {"accuracy": safe_divide((mask * right).sum(), weights["accuracy"])}
        if rng is None:
            return loss, metrics, output.counts
        share = safe_divide(mask.sum(), weights["accuracy"])
        experts = self.model.experts
        return with_balance_losses(loss, metrics, output.counts, experts, share, name="classification_loss")

    def _row_weights(self, batch: dict[str, Array]) -> Float[Array, " B"]:
        mask = batch["mask"].astype(jnp.float32)
        if self.class_weights is None:
            return mask
        return mask * jnp.asarray(self.class_weights, jnp.float32)[batch["labels"]]
