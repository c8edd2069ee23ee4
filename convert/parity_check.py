"""A whole parity check: both models on the same tokens, in float32 place by place, in bfloat16 by what they predict."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert import parity_reference, parity_trace, parity_weights
from convert.parity_reference import Reference
from convert.parity_trace import Place
from convert.parity_weights import Gradient, Unmatched
from llmq_jax.errors import BadInput
from llmq_jax.interop.architectures import weight_table
from llmq_jax.interop.tables import WeightTable
from llmq_jax.models import build
from llmq_jax.models.decoder import Decoder


class Parity(NamedTuple):
    """What a check in float32 found."""

    places: tuple[Place, ...]
    """In the order of computation: embeddings, layers, final norm, logits, loss."""
    gradients: list[Gradient]
    unmatched: Unmatched
    weights: dict[str, float]
    """The largest difference of each parameter itself, by its name in a file: shown beside differences of what was
    computed, not in place of these."""

    def output(self, name: str) -> Place:
        """The place of this name outside the layers: "logits", "loss", ..."""
        return next(place for place in self.places if place.layer is None and place.name == name)


class Distribution(NamedTuple):
    """How far a model's next-token distributions are from the reference's."""

    name: str
    mean: float
    """Mean KL divergence over tokens, in nats."""
    largest: float
    agreement: float
    """The fraction of tokens at which both have the same likeliest successor."""


def compare_models(
    model: Any,
    config: Any,
    tokens: np.ndarray,
    *,
    table: WeightTable | None = None,
    inject: str | None = None,
    seed: int = 0,
) -> Parity:
    """Compare transformers' `model` with ours, of that config and with its weights, on tokens [B, T].

    `table` takes the place of the architecture's own; `inject` names a parameter of ours to perturb first.
    """
    table = table or weight_table(config.model_type)
    ours = build(config)
    placements, layer_paths = table.placements(config), ours.layer_paths()
    reference = Reference.of(model, [placement.key for placement in placements])
    state = reference.state()
    variables, unmatched = parity_weights.fill(config, table, state)
    if inject is not None:
        variables = parity_weights.perturb(variables, parity_weights.find(inject, placements), seed)
    pairs = parity_trace.pair_modules(placements, layer_paths, reference.owners, reference.modules())
    names = [pair.theirs for pair in pairs]
    theirs = reference.run(tokens, names)
    with parity_reference.nudged(model, seed):
        nudged = reference.run(tokens, names)
    blocks = {pair.layer: pair.theirs for pair in pairs if pair.layer is not None and not pair.path}
    given = {layer: theirs.inputs[name] for layer, name in blocks.items() if name in theirs.inputs}
    # On a GPU products would otherwise be in TensorFloat-32, good to three digits.
    with jax.default_matmul_precision("highest"):
        traced = parity_trace.trace(ours, variables, tokens, given)
        logits = np.asarray(_logits(ours, variables, tokens))
        loss, gradients = parity_weights.loss_and_gradients(ours, variables, tokens)
    places = parity_trace.compare(pairs, traced, logits, theirs, nudged, tokens)
    of_loss, moved = (
        parity_weights.elements_difference(np.float32(value), np.float32(theirs.loss)) for value in (loss, nudged.loss)
    )
    of_loss = of_loss._replace(rounding=parity_weights.IN_ALL_LAYERS * moved.relative)
    named = parity_weights.named(variables, placements)
    return Parity(
        (*places, Place(None, ("loss",), "", (), of_loss)),
        parity_weights.compare_gradients(gradients, theirs.gradients, nudged.gradients, placements, layer_paths),
        unmatched,
        {
            key: float(np.abs(ours - state[key]).max())
            for key, ours in named.items()
            if key in state and ours.shape == state[key].shape
        },
    )


def compare_distributions(
    folder: Path, config: Any, tokens: np.ndarray, *, inject: str | None = None, seed: int = 0
) -> tuple[Distribution, Distribution]:
    """How far bfloat16 takes transformers, and how far it takes us, from transformers in float32."""
    exact = parity_reference.load(folder)
    table, ours = weight_table(config.model_type), build(config)
    placements = table.placements(config)
    reference = Reference.of(exact, [placement.key for placement in placements])
    variables, unmatched = parity_weights.fill(config, table, reference.state())
    if any(unmatched):
        raise BadInput(f"{folder}: not all parameters are on both sides; compare in float32 first, which names them")
    if inject is not None:
        variables = parity_weights.perturb(variables, parity_weights.find(inject, placements), seed)
    # Values that gradients do not train (a router's balance) stay in float32 on both sides.
    narrow = variables | {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])}
    expected = parity_reference.logits(exact, tokens)
    theirs = parity_reference.logits(parity_reference.load(folder, "bfloat16"), tokens)
    return (
        _distribution("transformers in bfloat16", theirs, expected),
        _distribution("ours in bfloat16", np.asarray(_logits(ours, narrow, tokens)), expected),
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Decoder, variables: dict, tokens: Any) -> Any:
    return model.apply(variables, tokens)


def _distribution(name: str, logits: np.ndarray, expected: np.ndarray) -> Distribution:
    exact, found = jax.nn.log_softmax(expected), jax.nn.log_softmax(logits)
    divergence = (jnp.exp(exact) * (exact - found)).sum(-1)
    agreement = (expected.argmax(-1) == logits.argmax(-1)).mean()
    return Distribution(name, float(divergence.mean()), float(divergence.max()), float(agreement))
