"""The one training step that all objectives share: gradients, accumulation, clipping, update."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import in_place
from llmq_jax.objectives.expert_balance import load_metrics, move_biases
from llmq_jax.training.parts import PARAMS, as_read
from llmq_jax.training.sharding import place_batch
from llmq_jax.training.state import TrainState

ROUTER = "router"
EXTREMES = {
    "min_reward": jnp.minimum,
    "max_reward": jnp.maximum,
    "clip_ratio/low_min": jnp.minimum,
    "clip_ratio/high_max": jnp.maximum,
}
"""Metrics that do not add over batches, but are the least or the greatest of them."""


@runtime_checkable
class Objective(Protocol):
    """See objectives/next_token.py."""

    model: Any

    def weights(self, batch: dict, step: Any = None) -> dict: ...

    def loss(self, variables: dict, batch: dict, weights: dict, rng: Any) -> tuple[jax.Array, dict, dict]: ...


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`train_step(state, batch) -> (state, metrics)`, compiled; the state given to it is consumed (donated).

    `accumulate` cuts the batch into that many micro-batches whose gradients add up: the same loss and gradients in
    less memory. Metrics are on the device: `loss`, `grad_norm` (before clipping), the objective's own, and the load of
    experts, against which the collection "router" moves.
    """

    experts = objective.model.experts

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        trained = state.trained
        weights = objective.weights(batch, state.step)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss(trained, microbatch, rng):
            variables = as_read(state.with_trained(trained))
            value, metrics, counts = objective.loss(variables, microbatch, weights, rng)
            return value, (metrics, counts)

        def gradients(index, microbatch):
            # One random key a micro-batch.
            key = jax.random.fold_in(rng, index)
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained, microbatch, key)
            return value, aux, grads

        if accumulate == 1:
            value, (metrics, counts), grads = gradients(0, batch)
        else:
            value, (metrics, counts), grads = _accumulated(gradients, _split(batch, accumulate), accumulate)

        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, trained)
        trained = optax.apply_updates(trained, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics, **load_metrics(experts, counts)}
        variables = state.with_trained(trained)
        if ROUTER in variables and PARAMS in state.trainable:  # A router's bias learns where the router does.
            router = variables[ROUTER]
            learning = {name: tree for name, tree in router.items() if name in variables[PARAMS]}
            variables[ROUTER] = {**router, **move_biases(experts, learning, counts)}
        state = state.replace(step=state.step + 1, variables=variables, optimizer_state=optimizer_state)
        return in_place(state), metrics  # where it was: or the next step would be another program

    return _with_batch_in_place(jax.jit(train_step, donate_argnums=0), accumulate)


def _with_batch_in_place(compiled: Callable, parts: int | None = None) -> Callable:
    """A compiled function of something and a batch, whose rows go to the devices of the mesh that is set."""

    def call(first: Any, batch: dict) -> Any:
        return compiled(first, place_batch(batch, parts))

    call.program = compiled
    return call


def _split(batch: dict, parts: int) -> dict:
    """[B, ...] to [parts, B / parts, ...]; micro-batch i takes rows i, i + parts, ...: the same mix on every device."""
    rows = len(next(iter(batch.values())))
    if rows % parts:
        raise BadInput(f"a batch of {rows} rows cannot be cut into {parts} equal micro-batches; change one of the two")
    return {name: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


def _accumulated(gradients: Callable, microbatches: dict, parts: int):
    """The sum over micro-batches of everything `gradients` returns, but for metrics that are extremes."""

    def add(total, numbered):
        (value, (metrics, counts), grads), index = total, numbered[0]
        next_value, (next_metrics, next_counts), next_grads = gradients(*numbered)
        sums = jax.tree.map(jnp.add, (value, counts, grads), (next_value, next_counts, next_grads))
        both = {
            name: jnp.where(index == 0, new, combined(name, metrics[name], new)) for name, new in next_metrics.items()
        }
        return (sums[0], (both, sums[1]), sums[2]), None

    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, 0, first))
    return jax.lax.scan(add, zeros, (jnp.arange(parts), microbatches))[0]


def combined(name: str, a: Any, b: Any) -> Any:
    """A metric of two batches: the lesser or greater one of EXTREMES, the sum of all others."""
    return EXTREMES.get(name, jnp.add)(a, b)


def make_eval_step(objective: Objective) -> Callable[[dict, dict], tuple[dict, dict]]:
    """`eval_step(variables, batch) -> (sums, weights)`, compiled, without dropout: over batches both simply add, and
    Σ sums / Σ weights is the mean over all of them, however ragged. Of the loss and of every metric that the objective
    gives when it is given no random key; EXTREMES have no weight."""

    def eval_step(variables: dict, batch: dict) -> tuple[dict, dict]:
        weights = objective.weights(batch)
        ones = jax.tree.map(jnp.ones_like, weights)
        value, metrics, _ = objective.loss(as_read(variables), batch, ones, None)
        return {"loss": value, **metrics}, weights

    return _with_batch_in_place(jax.jit(eval_step))


def evaluate(eval_step: Callable, variables: dict, batches: Any) -> dict[str, float]:
    """Means over all of a finite sequence of batches."""
    totals = None
    for batch in batches:
        sums, weights = eval_step(variables, batch)
        if totals is not None:
            sums = {name: combined(name, totals[0][name], value) for name, value in sums.items()}
            weights = jax.tree.map(jnp.add, totals[1], weights)
        totals = sums, weights
    if totals is None:
        raise BadInput("nothing to evaluate: there is no batch")
    sums, weights = jax.device_get(totals)
    # Of the terms beside the loss one may have had nothing to count, as the second token ahead in rows of two. Extremes
    # have no weight.
    weights |= {name: 1.0 for name in sums if name in EXTREMES}
    return {name: float(value / weights[name]) for name, value in sums.items() if name == "loss" or weights[name] > 0}
