"""Next-token prediction: the pretraining objective, -Σ log p(token | tokens before it) / tokens.

An objective is a pure function in named terms. `weights` counts, from the masks of the whole global batch, what each
term is divided by; `loss` sums over a micro-batch and divides by these weights. Sums of micro-batches and of devices
then simply add: accumulation, padding and data parallelism cannot change the result.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.cross_entropy import chunked_cross_entropy
from llmq_jax.objectives.expert_balance import balance_terms


@dataclass(frozen=True)
class NextToken:
    """Batches hold `tokens`, `targets` and `mask` [B, T] (targets are the tokens shifted by one, mask is 1 where a
    target counts), and for packed or padded rows `positions` and `segment_ids` [B, T]."""

    model: Decoder

    def weights(self, batch: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """The number of targets that count."""
        return {"loss": batch["mask"].astype(jnp.float32).sum()}

    def loss(
        self, variables: dict, batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict]:
        """(loss in nats a token, metrics that add over micro-batches, counts).

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
        head = self.model.head_variables(variables)
        unembed = partial(_unembed, self.model)
        mask = batch["mask"].astype(jnp.float32)
        total = chunked_cross_entropy(unembed, head, output.hidden, batch["targets"], mask)
        # A batch without a single target has weight 0 and loss 0, not NaN.
        weight = jnp.maximum(weights["loss"], jnp.finfo(jnp.float32).tiny)
        loss, metrics = total / weight, {}
        if rng is not None:  # in training
            penalty, metrics = balance_terms(self.model.experts, output.counts, share=mask.sum() / weight)
            if metrics:
                loss, metrics = loss + penalty, {"next_token_loss": loss, **metrics}
        return loss, metrics, output.counts


def _unembed(model: Decoder, head: dict, hidden: Array) -> Array:
    return model.apply(head, hidden, method="unembed")
