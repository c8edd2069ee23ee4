"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): the next token, and D further ones.

    loss = L_main + λ/D Σ_k L_k                                                      the second term is eq. 25
    L_k = -Σ_i log p_k(token i + k + 1 | tokens up to i + k) / their number          eq. 24, which divides by T

p_k is the prediction of the model's k-th module, by the head that all share. Where a row or a document ends before
token i + k + 1, there is nothing to predict: place i is neither in the sum nor in the number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llmq_jax.errors import BadInput
from llmq_jax.models.decoder import Decoder
from llmq_jax.models.deepseek3 import has_token_ahead, modules_ahead
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.means import safe_divide
from llmq_jax.objectives.next_token import head_loss


@dataclass(frozen=True)
class MultiToken:
    """Batches are those of `NextToken`. Module k then sees the tokens, and predicts the targets, k places further on;
    or a batch has its own: `ahead_tokens`, `ahead_targets`, `ahead_mask` and `ahead_segment_ids`, all [B, depth, T].

    The loss of evaluation is the main one alone, so that it compares with models that have no such modules; each
    module's is reported beside it: `mtp_1_loss`, ...
    """

    model: Decoder
    """One with such modules, as DeepSeek3 may have."""
    coefficient: float | Callable[[Any], Any] = 0.3
    """λ, or a schedule: a function of the step. The paper has 0.3, then 0.1 for the last third (section 4.2)."""

    def __post_init__(self) -> None:
        if not self.depth:
            raise BadInput("multi-token prediction needs a model with num_nextn_predict_layers of at least 1")
        if not callable(self.coefficient) and not 0 <= self.coefficient < math.inf:
            raise BadInput(f"coefficient={self.coefficient} of multi-token prediction must be at least 0, and finite")

    @property
    def depth(self) -> int:
        """D, the number of the model's modules."""
        return modules_ahead(self.model.config)

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """The number of targets that count at each depth; in training also λ at this step."""
        length = batch["tokens"].shape[1]
        if length <= self.depth:
            raise BadInput(
                f"rows of {length} tokens leave nothing to predict for {self.depth} modules; take longer ones"
            )
        streams = batch["ahead_targets"].shape[1] if "ahead_targets" in batch else self.depth
        if streams != self.depth:
            raise BadInput(f"the batch has targets for {streams} modules of multi-token prediction, not {self.depth}")
        counts = {name: mask.sum() for name, (_, mask) in self.targets(batch).items()}
        if step is None:
            return counts
        coefficient = self.coefficient(step) if callable(self.coefficient) else self.coefficient
        return {**counts, "coefficient": jnp.asarray(coefficient, jnp.float32)}

    def targets(self, batch: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
        """(targets, mask) of each term: "loss" and "mtp_1_loss", ..."""
        targets, mask = batch["targets"], batch["mask"].astype(jnp.float32)
        terms = {"loss": (targets, mask)}
        for k in range(1, self.depth + 1):
            if "ahead_targets" in batch:
                term = batch["ahead_targets"][:, k - 1], batch["ahead_mask"][:, k - 1].astype(jnp.float32)
            else:
                real = has_token_ahead(batch["tokens"], batch.get("segment_ids"), k)
                term = jnp.roll(targets, -k, axis=1), jnp.roll(mask, -k, axis=1) * real
            terms[f"mtp_{k}_loss"] = term
        return terms

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss in nats a token, metrics that add over micro-batches, counts); `rng` is given in training."""
        output, ahead = self.model.apply(
            variables,
            batch["tokens"],
            batch.get("positions"),
            batch.get("segment_ids"),
            batch.get("ahead_tokens"),
            batch.get("ahead_segment_ids"),
            method="forward_and_ahead",
            rngs=None if rng is None else {"dropout": rng},
        )
        hidden = [output.hidden, *ahead.hidden]
        losses = {
            name: safe_divide(head_loss(self.model, variables, states, targets, mask), weights[name])
            for states, (name, (targets, mask)) in zip(hidden, self.targets(batch).items(), strict=True)
        }
        loss = losses.pop("loss")
        if rng is None:
            return loss, losses, output.counts
        share = safe_divide(batch["mask"].astype(jnp.float32).sum(), weights["loss"])
        total, metrics, counts = with_balance_losses(
            loss, losses, output.counts, self.model.experts, share, name="next_token_loss"
        )
        total += weights["coefficient"] / self.depth * sum(losses.values())
        return total, {"next_token_loss": loss, **metrics, "mtp_coefficient": share * weights["coefficient"]}, counts
