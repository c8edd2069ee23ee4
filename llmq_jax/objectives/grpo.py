"""Group relative policy optimisation (GRPO; DeepSeekMath, Shao et al. 2024, arXiv:2402.03300) and its relatives.

The policy answers each question several times, the answers are scored, and an answer's advantage is how much better it
did than the others of its group: no critic is trained. The policy π then learns from the answers, for one or more
steps, staying near the policy π_old that sampled them and, if β > 0, near a reference π_ref. For token t of answer i:

    A_i = (r_i - mean(r)) / (std(r) + ε)          advantage (`objectives.advantages`), r: rewards of the group
    ρ_t = π(o_t | q, o_<t) / π_old(o_t | q, o_<t)                                                  ratio
    D_t = π_ref/π - log(π_ref/π) - 1              distance from the reference                      eq. 4
    loss = -average of (surrogate(ρ_t, A_i) - β D_t)                                               eq. 3, 19

The relatives differ in ratio, surrogate and average. Where ρ is near 1, all of them have the policy gradient
Σ ρ A ∇log π (eq. 20-21); they differ in what they do to tokens whose ρ has moved away from 1.

    loss type  surrogate                                    average                          source
    grpo       min(ρ A, clip(ρ, 1 - low, 1 + high) A)       over answers of token means      DeepSeekMath
    bnpo       as grpo                                      over the micro-batch's tokens    TRL
    dapo       as grpo                                      over the batch's tokens          DAPO, 2503.14476
    dr_grpo    as grpo                                      Σ / (answers · max_length)       Dr. GRPO, 2503.20783
    gspo       as grpo, with one ratio an answer:           as grpo                          GSPO, 2507.18071
               ρ = exp(mean_t log ρ_t)
    sapo       4/τ σ(τ (ρ - 1)) A, τ by the sign of A       as grpo                          SAPO, 2511.20347
    cispo      sg[min(ρ, high)] A log π, sg: no gradient    as dapo                          MiniMax-M1, 2506.13585

In the first step after sampling, ρ = 1 everywhere. With β = 0 the loss of `grpo` is then minus the mean of the
advantages, which is 0: a loss of 0 is nothing to worry about, its gradient is not 0.

An objective as `next_token` describes it, except for two terms that TRL defines on a micro-batch: the average of
`bnpo`, and the entropy bonus. They depend on how the batch is cut, as balance losses of experts do.
"""

import math
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import check_fields
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.balance_losses import with_balance_losses
from llmq_jax.objectives.logprobs import completion_logprobs
from llmq_jax.objectives.means import safe_divide

Mask = Float[Array, "B C"] | Int[Array, "B C"] | Bool[Array, "B C"]
Advantages = Float[Array, " B"] | Float[Array, "B C"]

ESTIMATORS = ("k1", "k2", "k3")
# The options that a loss type has beside those that all have, with their defaults; clip_high None is clip_low.
_CLIPPED: dict[str, float | None] = {"clip_low": 0.2, "clip_high": None}
OPTIONS: dict[str, dict[str, float | None]] = {
    "grpo": _CLIPPED,
    "bnpo": _CLIPPED,
    "dapo": _CLIPPED,
    "dr_grpo": {**_CLIPPED, "max_length": None},
    "gspo": _CLIPPED,
    "sapo": {"sapo_temperature_positive": 1.0, "sapo_temperature_negative": 1.05},
    "cispo": {"clip_high": 5.0},
}
TOKEN_AVERAGES = ("dapo", "cispo")


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The options of `grpo_loss` and of the objective. None: the loss type's own default, where it has the option;
    an option that the loss type ignores is refused."""

    loss_type: str = "grpo"
    """grpo, bnpo, dapo, dr_grpo, gspo, sapo or cispo."""
    clip_low: float | None = None
    """How far below 1 the ratio may fall before a bad answer no longer pushes it down; 0.2 by default. For gspo, whose
    ratio is a mean over tokens, its paper has 3e-4, and 4e-4 above."""
    clip_high: float | None = None
    """How far above 1 the ratio may rise before a good answer no longer pushes it up; by default as clip_low, DAPO has
    0.28. For cispo the greatest ratio itself; 5.0 by default."""
    beta: float = 0.0
    """β, the coefficient of the distance from the reference. 0: none; a reference given to `grpo_loss` is measured, by
    k3, and no more."""
    kl: str | None = None
    """The estimator of the distance from the reference, see `kl_estimate`; k3 by default."""
    kl_by_ratio: bool = False
    """Whether each token's distance from the reference is multiplied by its ratio (DeepSeek-V3.2, arXiv:2512.02556;
    TRL's use_bias_correction_kl). With k1 and k3 the gradient is then that of KL(π || π_ref) on average, also where the
    policy has moved away from the one that answered."""
    max_length: int | None = None
    """For dr_grpo: the longest that an answer may be, in tokens, the same for all batches."""
    entropy_coefficient: float = 0.0
    """Coefficient of the entropy bonus, which keeps the policy exploring: the loss falls by this much per nat."""
    sapo_temperature_positive: float | None = None
    """For sapo: how fast a token's gradient fades as its ratio leaves 1, if the advantage is positive; by default 1."""
    sapo_temperature_negative: float | None = None
    """For sapo: how fast a token's gradient fades as its ratio leaves 1, if the advantage is not positive; by default
    1.05."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.loss_type not in OPTIONS:
            raise BadInput(f"loss_type={self.loss_type!r} is unknown; {did_you_mean(self.loss_type, OPTIONS)}")
        for name in dict.fromkeys(chain.from_iterable(OPTIONS.values())):
            if getattr(self, name) is not None and name not in OPTIONS[self.loss_type]:
                readers = ", ".join(loss_type for loss_type in OPTIONS if name in OPTIONS[loss_type])
                raise BadInput(
                    f"{name}={getattr(self, name)} has no effect with loss_type={self.loss_type!r}, only with {readers}"
                    "; leave it out"
                )
        for name in ("clip_low", "clip_high", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise BadInput(f"{name}={value} must be at least 0, and finite")
        if self.clip_low is not None and self.clip_low > 1:
            raise BadInput(f"clip_low={self.clip_low} must be at most 1: a ratio is never below 0")
        if not math.isfinite(self.entropy_coefficient):
            raise BadInput(f"entropy_coefficient={self.entropy_coefficient} must be finite")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"{name}={value} must be positive")
        if self.loss_type == "dr_grpo" and (self.max_length is None or self.max_length < 1):
            raise BadInput(f"loss_type='dr_grpo' divides by max_length={self.max_length}; give the longest answer's")
        if self.kl is not None and not self.beta:
            raise BadInput(f"kl={self.kl!r} has no effect with beta=0; leave it out, or give a beta")
        if self.kl_by_ratio and not self.beta:
            raise BadInput("kl_by_ratio has no effect with beta=0; leave it out, or give a beta")
        if self.kl is not None and self.kl not in ESTIMATORS:
            raise BadInput(f"kl={self.kl!r} is unknown; {did_you_mean(self.kl, ESTIMATORS)}")

    def value(self, name: str) -> Any:
        """What was given, or the loss type's default."""
        given = getattr(self, name)
        return OPTIONS[self.loss_type][name] if given is None else given

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest ratio of the clipped surrogate."""
        low, high = self.value("clip_low"), self.value("clip_high")
        return 1 - low, 1 + (low if high is None else high)


def grpo_loss(
    logprobs: Float[Array, "B C"],
    old_logprobs: Float[Array, "B C"],
    reference_logprobs: Float[Array, "B C"] | None,
    advantages: Advantages,
    mask: Mask,
    *,
    loss_type: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    beta: float = 0.0,
    kl: str | None = None,
    kl_by_ratio: bool = False,
    max_length: int | None = None,
    entropy_coefficient: float = 0.0,
    sapo_temperature_positive: float | None = None,
    sapo_temperature_negative: float | None = None,
    entropies: Float[Array, "B C"] | None = None,
    weights: dict[str, Float[Array, ""]] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss, metrics) of B answers of up to C tokens, from the log-probabilities of their tokens, in nats.

    `logprobs` are the policy's, `old_logprobs` those it had when it sampled the answers, `reference_logprobs` the
    reference's, which beta > 0 needs; without it they only give the metric `kl`. `mask` is 1 on the tokens that count;
    values at other tokens are ignored, even NaN. Gradients flow to `logprobs` and `entropies`.

    The options up to the temperatures are those of `LossOptions`, which says what they do. Here the `max_length` of
    dr_grpo need not be given where the answers are a whole batch, and is C then; give it where batches differ in width.

    `weights`: if the answers are a micro-batch, `loss_weights` of the whole batch's mask. Losses, gradients and metrics
    of micro-batches, except those called min and max, then add up to the batch's. Value and gradient equal TRL's.

    Metrics, named as TRL's: `kl` (beside a reference); `entropy` (if given); `clip_ratio/low_mean`, `.../high_mean` and
    `.../region_mean`, the fraction of the tokens (gspo: answers) that is clipped below, above or either way, and, of
    the answers' own fractions, the least of those below, `clip_ratio/low_min`, and the greatest of those above,
    `clip_ratio/high_max`; for cispo only `cispo_clip_ratio` and for sapo none of these; with an entropy bonus
    `policy_loss`, the loss without it.

    BadInput: a loss type that is unknown, an option that it ignores or that is out of range, beta without a reference.
    """
    if loss_type == "dr_grpo" and max_length is None and weights is None:
        max_length = mask.shape[1]
    options = LossOptions(
        loss_type=loss_type,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        kl=kl,
        kl_by_ratio=kl_by_ratio,
        max_length=max_length,
        entropy_coefficient=entropy_coefficient,
        sapo_temperature_positive=sapo_temperature_positive,
        sapo_temperature_negative=sapo_temperature_negative,
    )
    if beta and reference_logprobs is None:
        raise BadInput(f"beta={beta} needs the log-probabilities of the reference model; give them, or beta=0")
    if entropy_coefficient and entropies is None:
        raise BadInput(f"entropy_coefficient={entropy_coefficient} needs the entropies; give them, or leave it out")
    weights = loss_weights(mask) if weights is None else weights
    mask = mask.astype(jnp.float32)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    logprobs = jnp.where(mask > 0, logprobs.astype(jnp.float32), 0.0)
    old_logprobs = _constant(old_logprobs, mask)

    ratio = policy_ratio(logprobs, old_logprobs, mask, sequence=options.loss_type == "gspo")
    losses = -surrogate(ratio, logprobs, advantages, options)
    metrics = clip_metrics(ratio, advantages, mask, options, weights)
    if reference_logprobs is not None:
        distance = kl_estimate(logprobs, _constant(reference_logprobs, mask), options.kl or "k3")
        if options.kl_by_ratio:
            distance *= ratio
        if beta:  # 0 times an infinite distance would be NaN
            losses += beta * distance
        metrics["kl"] = safe_divide((mask * distance).sum(), weights["tokens"])
    loss = averaged(losses, mask, options, weights)
    if entropies is not None:
        entropies = jnp.where(mask > 0, entropies, 0.0)
        metrics["entropy"] = safe_divide((mask * entropies).sum(), weights["tokens"])
        if entropy_coefficient:
            metrics["policy_loss"] = loss
            loss -= entropy_coefficient * _share(mask, weights) * safe_divide((mask * entropies).sum(), mask.sum())
    return loss, metrics


def loss_weights(mask: Mask) -> dict[str, Float[Array, ""]]:
    """What sums over a batch are divided by: its number of answers, `rows`, and of tokens that count, `tokens`. An
    answer without such tokens is counted, with loss 0."""
    return {"rows": jnp.asarray(float(len(mask))), "tokens": mask.astype(jnp.float32).sum()}


def policy_ratio(
    logprobs: Float[Array, "B C"], old_logprobs: Float[Array, "B C"], mask: Float[Array, "B C"], *, sequence: bool
) -> Float[Array, "B C"] | Float[Array, "B 1"]:
    """π / π_old of each token; or of each answer, exp(mean over its tokens of log(π / π_old)) (GSPO)."""
    log_ratio = logprobs - old_logprobs
    if sequence:
        log_ratio = _row_means(log_ratio, mask)[:, None]
    return _exp(log_ratio)


@jax.custom_vjp
def _exp(x: Array) -> Array:
    """e^x. Where it overflows and the incoming gradient is 0, its gradient is 0, not 0 · inf = NaN: tokens that are
    clipped teach nothing, however far the policy has moved from the one that answered."""
    return jnp.exp(x)


def _exp_forward(x: Array) -> tuple[Array, Array]:
    value = jnp.exp(x)
    return value, value


def _exp_backward(value: Array, grad: Array) -> tuple[Array]:
    return (jnp.where(grad == 0, 0.0, grad * value),)


_exp.defvjp(_exp_forward, _exp_backward)


def surrogate(ratio: Array, logprobs: Float[Array, "B C"], advantages: Array, options: LossOptions) -> Array:
    """What is maximised, for each token: the second column of the table above. [B, C], or [B, 1]."""
    if options.loss_type == "cispo":
        # The clip bounds how much a token weighs; unlike that of other loss types it never removes a token's gradient.
        return jax.lax.stop_gradient(jnp.minimum(ratio, options.value("clip_high"))) * advantages * logprobs
    if options.loss_type == "sapo":
        positive, negative = options.value("sapo_temperature_positive"), options.value("sapo_temperature_negative")
        temperature = jnp.where(advantages > 0, positive, negative)
        return 4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1)) * advantages
    # min(ρ A, clip(ρ) A), written as one bound for each sign of A: only a ratio that moved too far in the direction of
    # its advantage loses its gradient. So an infinite ratio is never multiplied by an advantage of 0.
    lower, upper = options.bounds
    # Not jnp.clip, which halves the gradient at a bound; torch.clamp does not.
    from_above, from_below = jnp.where(ratio > upper, upper, ratio), jnp.where(ratio < lower, lower, ratio)
    return jnp.where(advantages < 0, from_below, from_above) * advantages


def kl_estimate(
    logprobs: Float[Array, "B C"], reference_logprobs: Float[Array, "B C"], estimator: str = "k3"
) -> Float[Array, "B C"]:
    """An estimate of KL(π || π_ref) at each token, which was sampled from π (Schulman 2020, "Approximating KL
    divergence"). With d = log(π_ref / π):

        k1 = -d              unbiased, of either sign
        k2 = d² / 2          biased, positive, of less variance
        k3 = exp(d) - d - 1  unbiased, positive, of less variance: DeepSeekMath, eq. 4

    In a loss the gradients matter, not the values. On average the gradient of k1 is 0, because it is ∇log π whatever
    the reference; that of k2 is the gradient of KL(π || π_ref), that of k3 the gradient of KL(π_ref || π).
    BadInput: another estimator.
    """
    if estimator not in ESTIMATORS:
        raise BadInput(f"kl={estimator!r} is unknown; {did_you_mean(estimator, ESTIMATORS)}")
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference**2 / 2
    return jnp.expm1(difference) - difference


def averaged(
    losses: Array, mask: Float[Array, "B C"], options: LossOptions, weights: dict[str, Float[Array, ""]]
) -> Float[Array, ""]:
    """A micro-batch's part of the batch's average over tokens: the third column of the table above."""
    if options.loss_type in TOKEN_AVERAGES:
        return safe_divide((losses * mask).sum(), weights["tokens"])
    if options.loss_type == "bnpo":
        return _share(mask, weights) * safe_divide((losses * mask).sum(), mask.sum())
    if options.loss_type == "dr_grpo":
        assert options.max_length is not None
        return safe_divide((losses * mask).sum(), weights["rows"] * options.max_length)
    return safe_divide(_row_means(losses, mask).sum(), weights["rows"])


def clip_metrics(
    ratio: Array,
    advantages: Array,
    mask: Float[Array, "B C"],
    options: LossOptions,
    weights: dict[str, Float[Array, ""]],
) -> dict[str, Float[Array, ""]]:
    """Where the ratio has left its bounds in the direction of the advantage, so that clipping acts; see `grpo_loss`."""
    if options.loss_type == "sapo":
        return {}
    if options.loss_type == "cispo":
        clipped = (ratio > options.value("clip_high")) & (advantages > 0)
        return {"cispo_clip_ratio": safe_divide((clipped * mask).sum(), weights["tokens"])}
    lower, upper = options.bounds
    low, high = (ratio < lower) & (advantages < 0), (ratio > upper) & (advantages > 0)
    number = weights["tokens"]
    if options.loss_type == "gspo" and advantages.shape[1] == 1:  # one ratio and one advantage an answer
        mask, number = jnp.ones_like(ratio), weights["rows"]
    # An answer without tokens gets values that change neither extreme; where all are, both are 0 (in TRL NaN).
    tokens = mask.sum(axis=-1)
    low_rows = jnp.where(tokens > 0, _row_means(low, mask), jnp.where(weights["tokens"] > 0, 1.0, 0.0))
    high_rows = jnp.where(tokens > 0, _row_means(high, mask), 0.0)
    return {
        "clip_ratio/low_mean": safe_divide((low * mask).sum(), number),
        "clip_ratio/low_min": low_rows.min(),
        "clip_ratio/high_mean": safe_divide((high * mask).sum(), number),
        "clip_ratio/high_max": high_rows.max(),
        "clip_ratio/region_mean": safe_divide(((low | high) * mask).sum(), number),
    }


def _constant(logprobs: Array, mask: Float[Array, "B C"]) -> Array:
    return jax.lax.stop_gradient(jnp.where(mask > 0, logprobs.astype(jnp.float32), 0.0))


def _row_means(values: Array, mask: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Each row's mean over the tokens that count; 0 where none does."""
    return (values * mask).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1.0)


def _share(mask: Float[Array, "B C"], weights: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The answers of a micro-batch, as a part of the batch's."""
    return safe_divide(jnp.asarray(float(len(mask))), weights["rows"])


# ---------------------------------------------------------------------------------------------------------------------
# The objective


def can_share_prompts(model: Decoder) -> bool:
    """Whether the answers of a group can share one pass over their prompt: see `GRPO.group_size`."""
    # A length is that of prompt and answer.
    return model.experts is None and model.frozen_layers == 0 and not model.rotates_by_length


@dataclass(frozen=True)
class GRPO(LossOptions):
    """Batches hold `tokens` [B, T], prompts with their completions, padded on the right to `lengths` [B];
    `prompt_lengths` [B]; and of the completions, aligned on the left: `completion_mask` [B, C], which is 1 on the
    tokens that count, the end token included, `old_logprobs` [B, C], `advantages` [B] or [B, C], and if beta > 0
    `reference_logprobs` [B, C]. With a `group_size` above 1 they also hold `prompts` [B, W], the beginnings of
    the rows.

    Evaluation reports the loss without the entropy bonus.
    """

    model: Decoder
    temperature: float = field(default=1.0, kw_only=True)
    """Divides the policy's logits, as in sampling, so that the policy that learns is the one that answered."""
    group_size: int = field(default=1, kw_only=True)
    """This many neighbouring rows of every micro-batch answer the same prompt, which one pass reads for all of them.
    The loss is the same. Not for models with experts, whose balance counts every token of every row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size > 1 and not can_share_prompts(self.model):
            raise BadInput(
                f"group_size={self.group_size}: a model with experts, frozen layers or a RoPE that goes by the length "
                "of a row cannot share its prompts"
            )
        if not 0 < self.temperature < math.inf:
            raise BadInput(f"temperature={self.temperature} of GRPO must be positive")

    def weights(self, batch: dict[str, Array], step: Any = None) -> dict[str, Float[Array, ""]]:
        """The numbers of answers and of tokens that count, and which of them divides the loss and each metric."""
        weights = loss_weights(batch["completion_mask"])
        rows, tokens = weights["rows"], weights["tokens"]
        clipped = rows if self.loss_type == "gspo" and batch["advantages"].ndim == 1 else tokens
        return {
            **weights,
            "loss": tokens if self.loss_type in TOKEN_AVERAGES else rows,
            **{f"clip_ratio/{name}_mean": clipped for name in ("low", "high", "region")},
            **dict.fromkeys(("cispo_clip_ratio", "kl", "entropy"), tokens),
        }

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Array], weights: dict[str, Array], rng: Array | None = None
    ) -> tuple[Float[Array, ""], dict[str, Array], dict[str, Any]]:
        """(loss, metrics that add over micro-batches, except those called min and max, counts).

        `rng` is given in training: the entropy bonus and balance losses of experts are added. Dropout never acts: the
        old policy answered without it.
        """
        mask = batch["completion_mask"]
        logprobs, entropies, counts = completion_logprobs(
            self.model,
            variables,
            batch["tokens"],
            batch["lengths"],
            batch["prompt_lengths"],
            mask.shape[1],
            temperature=self.temperature,
            prompts=batch["prompts"] if self.group_size > 1 else None,
            group_size=self.group_size,
        )
        options = self if rng is not None else replace(self, entropy_coefficient=0.0)
        loss, metrics = grpo_loss(
            logprobs,
            batch["old_logprobs"],
            batch.get("reference_logprobs"),
            batch["advantages"],
            mask,
            entropies=entropies,
            weights=weights,
            **{option.name: getattr(options, option.name) for option in fields(LossOptions)},
        )
        if rng is None:
            return loss, metrics, counts
        share = _share(mask, weights)
        return with_balance_losses(loss, metrics, counts, self.model.experts, share, name="policy_loss")
