"""From logits to a token: penalty on repetition, then temperature, top-k, top-p and min-p, in transformers' order."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmq_jax.defaults import TEMPERATURE, TOP_P
from llmq_jax.errors import BadInput
from llmq_jax.field_types import check_fields
from llmq_jax.layers.axes import target_platform
from llmq_jax.option_names import meant_by

F = TypeVar("F", bound=Callable[..., Any])

NEVER = float("-inf")
LEAST_TEMPERATURE = 1e-30
"""Logits divided by less could be infinite."""
# Tokens of a block: see `draw`.
BLOCK = 128
PROBABILITY_BITS = 30
"""Of a float from 0 to 1, or a rounding error above, the lower ones; the two above are 0."""


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token (greedy). At least 1e-30 otherwise."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p (nucleus, arXiv:1904.09751); 1 keeps all, 0 the
    most probable one."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the most probable one (arXiv:2407.01082); 0 keeps all."""
    repetition_penalty: float = 1.0
    """Of tokens that the prompt or the new text holds, positive logits are divided by it and negative ones multiplied
    (CTRL, arXiv:1909.05858), before the temperature and also at 0; below 1 they become likelier."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, allowed, rule in (
            ("temperature", 0.0 <= self.temperature < float("inf"), "must be 0 (greedy) or positive"),
            ("temperature", not 0.0 < self.temperature < LEAST_TEMPERATURE, f"is below {LEAST_TEMPERATURE}; take 0"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or positive"),
            ("top_p", 0.0 <= self.top_p <= 1.0, "must be between 0 and 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "must be positive; 1 changes nothing"),
        ):
            if not allowed:
                raise BadInput(f"{name}={getattr(self, name)!r} {rule}")
        if self.temperature == 0.0 and (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0):
            raise BadInput("top_k, top_p and min_p have no effect at temperature 0; drop them or raise the temperature")

    @property
    def remembers(self) -> bool:
        """Whether the next token depends on which tokens the text holds already."""
        return self.repetition_penalty != 1.0

    def penalise(self, logits: Float[Array, "*batch V"], seen: Bool[Array, "*batch V"]) -> Float[Array, "*batch V"]:
        """The logits under the penalty on repetition; `seen` are the tokens that the text before holds."""
        penalised = jnp.where(logits < 0.0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return jnp.where(seen, penalised, logits)

    def filter(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits at the sampler's temperature, with -inf in place of every token that may not be drawn. Override it
        for a sampler of your own; it is not called at temperature 0."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, NEVER, logits)
        if self.top_p < 1.0:
            probabilities = jax.nn.softmax(logits, axis=-1)
            logits = jnp.where(probabilities < nucleus_edge(probabilities, self.top_p), NEVER, logits)
        if self.min_p > 0.0:
            probabilities = jax.nn.softmax(logits, axis=-1)
            least = self.min_p * probabilities.max(axis=-1, keepdims=True)
            logits = jnp.where(probabilities < least, NEVER, logits)
        return logits


DEFAULT = Sampler(temperature=TEMPERATURE, top_p=TOP_P)
"""How text is drawn where no sampler is given."""


def takes_sampler(function: F) -> F:
    """The function, with BadInput for an argument that it does not have: for a field of `Sampler`, which other
    libraries take there, the sampler to give."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        unknown = [name for name in given if name not in known]
        if drawing := ", ".join(f"{name}={given[name]!r}" for name in unknown if hasattr(DEFAULT, name)):
            raise BadInput(f"{drawing} belongs to the sampler; give sampler=lq.Sampler({drawing})")
        for name in unknown:
            hint = meant_by(name, known, lambda field, value="": field)
            raise BadInput(f"there is no argument {name!r}; {hint or 'choose from ' + ', '.join(known)}")
        return function(*args, **given)

    return cast(F, checked)


as_floats = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)


def nucleus_edge(probabilities: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The least probability in the nucleus: the largest one below which tokens hold at most 1 - p in all.

    Found bit by bit, from the highest: non-negative floats are ordered as their bits are. On a CPU the 30 passes over
    the vocabulary take a fortieth of the time that sorting takes. On a GPU, where a pass takes as long as launching it,
    each of 10 finds three bits. Equally probable tokens stay together.
    """
    at_once, unroll = (3, True) if target_platform() == "gpu" else (1, False)
    digits = jnp.arange(1, 2**at_once)

    def next_bits(index: Array, found: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        shift = PROBABILITY_BITS - at_once * (index + 1)
        edges = as_floats(found + (digits << shift))  # rising
        below = jnp.where(probabilities[:, None] < edges[..., None], probabilities[:, None], 0.0).sum(axis=-1)
        return found + ((below <= 1.0 - top_p).sum(axis=-1, keepdims=True) << shift)

    nothing = jnp.zeros((len(probabilities), 1), jnp.int32)
    edge = as_floats(jax.lax.fori_loop(0, PROBABILITY_BITS // at_once, next_bits, nothing, unroll=unroll))
    return jnp.minimum(edge, probabilities.max(axis=-1, keepdims=True))  # The most probable token always stays.


def marked(seen: Bool[Array, "B V"], tokens: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """Which tokens each row has seen, after one more."""
    return seen | jax.nn.one_hot(tokens, seen.shape[-1], dtype=bool)


def sample(
    logits: Float[Array, "B V"], keys: Array, sampler: Sampler, seen: Bool[Array, "B V"] | None = None
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(token, its log-probability) per row, each row with a random key of its own. `seen` are the tokens that each
    row's text holds, for a sampler that remembers.

    The log-probability is taken at the temperature (at temperature 0: at 1), without the penalty on repetition and
    before top-k, top-p and min-p, so that a policy's own log-probabilities can be compared with it.
    """
    logits = logits.astype(jnp.float32)
    scaled = logits / (sampler.temperature or 1.0)
    largest = scaled.max(axis=-1, keepdims=True)
    if seen is not None:
        logits = sampler.penalise(logits, seen)
    if sampler.temperature == 0.0:
        tokens = first_largest(logits)
    else:
        kept = sampler.filter(logits)
        tokens = draw(jnp.exp(kept - kept.max(axis=-1, keepdims=True)), keys)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)
    return tokens, (chosen - largest - jnp.log(jnp.exp(scaled - largest).sum(axis=-1, keepdims=True)))[:, 0]


def draw(masses: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """One token of each row with a chance proportional to its mass, by the row's key; never one without mass.

    By inverse transform sampling, in two stages: first a block of neighbouring tokens, by the blocks' sums, then a
    token in it. That takes two uniform numbers per row and one pass over the vocabulary, an eighth of the time of the
    Gumbel-max trick, which draws noise for every token. A single uniform number, of 23 random bits, could not tell
    improbable tokens apart.
    """
    rows, vocabulary = masses.shape
    blocks = jnp.pad(masses, ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    for_block, for_token = jax.vmap(lambda key: jax.random.uniform(key, (2, 1)))(keys).swapaxes(0, 1)
    block = _where_reached(blocks.sum(axis=-1), for_block)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = block * BLOCK + _where_reached(inside, for_token)
    return jnp.minimum(token, vocabulary - 1)  # an id of the vocabulary, even where the masses are NaN


def _where_reached(masses: Float[Array, "B N"], share: Float[Array, "B 1"]) -> Int[Array, " B"]:
    """The first index with mass at which the running sum exceeds `share` of the total. Rounding may let the sum grow
    where there is no mass, or keep it from getting that far: in the latter case, the last index with mass."""
    sums, some = jnp.cumsum(masses, axis=-1), masses > 0
    reached = some & (sums > share * sums[:, -1:])
    last = masses.shape[-1] - 1 - some[:, ::-1].argmax(axis=-1)
    return jnp.where(reached.any(axis=-1), reached.argmax(axis=-1), last).astype(jnp.int32)


def row_seed(seed: int, row: int) -> int:
    """The seed that one of several rows draws from: for row 0 the seed itself, for others a hash of seed and row. With
    seed + row, neighbouring seeds would draw almost the same rows."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1)[0]) if row else seed


def first_largest(scores: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """`jnp.argmax` over the last axis, five times as fast on a CPU: two passes that vectorise instead of one."""
    last = scores.shape[-1] - 1
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    return jnp.where(scores == scores.max(axis=-1, keepdims=True), index, last).min(axis=-1)
