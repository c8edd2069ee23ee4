"""The one training step that all objectives share: gradients, accumulation, update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import refuse_consumed, require_variables, whole
from llmq_jax.host_copies import to_host
from llmq_jax.layers.axes import constrain_like_params, replicated
from llmq_jax.layers.moe import Experts
from llmq_jax.models.decoder import PARAMS
from llmq_jax.objectives.means import EXTREMES, combined, over_devices
from llmq_jax.training.expert_load import load_metrics, move_biases
from llmq_jax.training.parts import as_read
from llmq_jax.training.sharding import check_rows, mesh_sizes, place_batch
from llmq_jax.training.state import (
    ROUTER,
    TrainState,
    refuse_consumed_state,
    require_optimizer,
    require_state,
    routers_learn,
)

REPLICAS = "replicas"
MODES = ("jit", "pmap")


@runtime_checkable
class Objective(Protocol):
    """See objectives/next_token.py."""

    @property
    def model(self) -> Any: ...

    def weights(self, batch: dict[str, Any], step: Any = None) -> dict[str, Any]: ...

    def loss(
        self, variables: dict[str, Any], batch: dict[str, Any], weights: dict[str, Any], rng: Any
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]: ...


First = TypeVar("First")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Compiled(Generic[First, Result]):
    """A compiled function of a state or of variables, and of a batch, whose rows it first places on their devices.
    BadInput for a state or variables that a step has consumed."""

    program: Any
    """What JAX compiled. It takes a batch whose rows are on their devices already."""
    divided: Callable[[dict[str, Any]], dict[str, Any]]
    replicas: int = 1
    """Devices that take equal parts of the rows by `jax.pmap`."""

    def __call__(self, first: First, batch: dict[str, Any]) -> Result:
        (refuse_consumed_state if isinstance(first, TrainState) else refuse_consumed)(first)
        result: Result = self.program(first, self.divided(batch))
        # The devices of a CPU share a few threads. A program that is called before the one before it is done takes a
        # thread for each device, and waits; where none is left for a part of that one, they wait for ever.
        if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
            jax.block_until_ready(result)
        return result


TrainStep = Compiled[TrainState, tuple[TrainState, dict[str, Any]]]
EvalStep = Compiled[dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int = 1, mode: str = "jit"
) -> TrainStep:
    """`train_step(state, batch) -> (state, metrics)`, compiled; the state given to it is consumed (donated).

    `accumulate` cuts the batch into that many micro-batches whose gradients add up: the same loss and gradients in
    less memory. Metrics are on the device: `loss`, `grad_norm` (before the optimizer clips), the objective's own, and
    the load of experts, against which the collection "router" moves.

    `mode`: "jit", on the devices of the mesh that is set; or "pmap", the same step by `jax.pmap`, where no mesh is set:
    every device has all of the state and its part of the rows. Terms of a whole batch (the balance losses of experts)
    are then computed on each part and averaged, as with `accumulate`.

    BadInput: `accumulate` is no positive number, another mode; from the step, a batch whose rows cannot be cut into so
    many equal parts.
    """
    if whole(accumulate, "accumulate") < 1:
        raise BadInput(f"accumulate={accumulate} must be at least 1")
    if mode not in MODES:
        raise BadInput(f"mode={mode!r} is unknown; {did_you_mean(mode, MODES)}")
    _require_objective(objective)
    require_optimizer(optimizer)
    pmap = mode == "pmap"
    experts = objective.model.experts
    neighbours = getattr(objective, "group_size", 1)  # consecutive rows that the objective needs together

    def whole_batch(named: dict[str, Any]) -> dict[str, Any]:
        return over_devices(named, REPLICAS) if pmap else named

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        require_state(state)
        trained = state.trained
        weights = whole_batch(objective.weights(batch, state.step))
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if pmap:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(REPLICAS))

        def loss(trained: Any, microbatch: Any, rng: Any) -> Any:
            variables = as_read(state.with_trained(trained))
            value, metrics, counts = _loss_of(objective, variables, microbatch, weights, rng)
            return value, (metrics, counts)

        def gradients(index: Any, microbatch: Any) -> Any:
            key = jax.random.fold_in(rng, index)  # one for each micro-batch
            return jax.value_and_grad(loss, has_aux=True)(trained, microbatch, key)

        if accumulate == 1:
            (value, (metrics, counts)), grads = gradients(0, batch)
        else:
            microbatches = _split(batch, accumulate, neighbours)
            (value, (metrics, counts)), grads = _accumulated(gradients, microbatches, accumulate)
        if pmap:
            value, counts, grads = jax.lax.psum((value, counts, grads), REPLICAS)
        metrics = whole_batch(metrics)

        after, found = _updated(state, optimizer, experts, grads, counts)
        metrics = {"loss": value, **metrics, **found}
        # The state keeps its sharding, or the next step would be compiled anew.
        return constrain_like_params(after), replicated(metrics)

    if pmap:
        return _on_replicas(train_step, accumulate)
    return Compiled(jax.jit(train_step, donate_argnums=0), lambda batch: place_batch(batch, accumulate))


def _require_objective(objective: Any) -> None:
    """BadInput for what is no objective, such as a model."""
    if not (hasattr(objective, "weights") and hasattr(getattr(objective, "model", None), "experts")):
        raise BadInput(f"{objective!r:.60} is no objective of a model; give one, as lq.objectives.NextToken(lm.model)")


def _loss_of(objective: Objective, *arguments: Any) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """What the objective's `loss` returns; BadInput where it is not what `Objective` says."""
    found: Any = objective.loss(*arguments)
    three = isinstance(found, tuple | list) and len(found) == 3 and all(isinstance(each, Mapping) for each in found[1:])
    if not three or jnp.shape(found[0]) != ():
        raise BadInput(
            f"{type(objective).__name__}.loss must return (scalar, metrics, counts of experts), the last two dicts, "
            "{} where there are none"
        )
    value, metrics, counts = found
    return value, metrics, counts


def _updated(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    experts: Experts | None,
    grads: Any,
    counts: dict[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """(the state after a step with these gradients, in which the routers of experts reported `counts`; metrics: the
    gradients' norm and the load of experts)."""
    trained = state.trained
    updates, optimizer_state = optimizer.update(grads, state.optimizer_state, trained)
    trained = optax.apply_updates(trained, updates)
    metrics = {"grad_norm": optax.tree.norm(grads), **load_metrics(experts, counts)}
    variables = state.with_trained(trained)
    if routers_learn(variables, state.trainable):
        router = variables[ROUTER]
        learning = {name: tree for name, tree in router.items() if name in variables[PARAMS]}
        variables[ROUTER] = {**router, **move_biases(experts, learning, counts)}
    state = state.replace(step=state.step + 1, variables=variables, optimizer_state=optimizer_state)
    return state, metrics


def _on_replicas(train_step: Callable[..., Any], parts: int) -> TrainStep:
    """A step of equal replicas, one on each device: each sees its own rows, and their results are added up."""
    compiled = jax.pmap(train_step, axis_name=REPLICAS, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    devices = jax.local_device_count()

    def divided(array: Any) -> Any:
        check_rows(len(array), parts, mesh_sizes(f"data={devices}"))
        return array.reshape(devices, len(array) // devices, *array.shape[1:])

    return Compiled(compiled, lambda batch: {name: divided(array) for name, array in batch.items()}, devices)


def _split(batch: dict[str, Any], parts: int, neighbours: int) -> dict[str, Any]:
    """[B, ...] to [parts, B / parts, ...]; micro-batch i takes rows i, i + parts, ... (or groups of `neighbours` rows,
    which stay together), so that every device has rows of each micro-batch."""
    rows = len(next(iter(batch.values())))
    if rows % (parts * neighbours):
        groups = "" if neighbours == 1 else f" of whole groups of {neighbours}"
        raise BadInput(
            f"a batch of {counted(rows, 'row')} cannot be cut into {parts} equal micro-batches{groups}; change one of "
            "the two"
        )

    def cut(x: Any) -> Any:
        groups = x.reshape(-1, parts, neighbours, *x.shape[1:]).swapaxes(0, 1)
        return groups.reshape(parts, rows // parts, *x.shape[1:])

    return {name: cut(x) for name, x in batch.items()}


def _accumulated(gradients: Callable[..., Any], microbatches: dict[str, Any], parts: int) -> Any:
    """The sum over micro-batches of everything that `gradients` returns, except that EXTREMES stay extremes."""

    numbered = jnp.arange(parts), microbatches
    # Traced once, here: scan calls the traced program, not the function.
    program, shapes = jax.make_jaxpr(gradients, return_shape=True)(*jax.tree.map(lambda x: x[0], numbered))

    def add(total: Any, numbered: tuple[Any, Any]) -> tuple[Any, None]:
        ((value, (metrics, counts)), grads), index = total, numbered[0]
        results = jaxpr_as_fun(program)(*jax.tree.leaves(numbered))
        (next_value, (next_metrics, next_counts)), next_grads = jax.tree.unflatten(jax.tree.structure(shapes), results)
        value, counts, grads = jax.tree.map(jnp.add, (value, counts, grads), (next_value, next_counts, next_grads))
        metrics = {  # the zeros that the scan begins with are no extremes
            name: jnp.where(index == 0, new, combined(name, metrics[name], new)) for name, new in next_metrics.items()
        }
        return ((value, (metrics, counts)), grads), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, numbered)[0]


def make_eval_step(objective: Objective) -> EvalStep:
    """`eval_step(variables, batch) -> (sums, weights)`, compiled, without dropout, of the loss and of every metric that
    the objective returns without a random key. Over batches both simply add, and Σ sums / Σ weights is the mean over
    all of them, whatever their sizes; EXTREMES have no weight. Before it runs, the step raises BadInput for a metric
    that the objective's `weights` lack."""

    _require_objective(objective)

    def eval_step(variables: dict[str, Any], batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        require_variables(variables)
        weights = objective.weights(batch)
        ones = jax.tree.map(jnp.ones_like, weights)  # Divided by weights of 1, the loss and its metrics stay sums.
        value, metrics, _ = _loss_of(objective, as_read(variables), batch, ones, None)
        sums: dict[str, Any] = {"loss": value, **metrics}
        lacking = [name for name in sums if name not in weights and name not in EXTREMES]
        if lacking:
            who, what = type(objective).__name__, ", ".join(lacking)
            raise BadInput(f"{who}.weights lacks {what}: give it what the sum of each is divided by")
        return replicated(sums), replicated(weights)

    return Compiled(jax.jit(eval_step), place_batch)


def evaluate(eval_step: Callable[..., Any], variables: dict[str, Any], batches: Any) -> dict[str, float]:
    """Means by name over all of a finite sequence of batches, by a step of `make_eval_step`. BadInput where there is no
    batch."""
    if isinstance(batches, Mapping):
        raise BadInput("batches is one batch; give a list of them: [batch]")
    totals = None
    for batch in batches:
        sums, weights = eval_step(variables, batch)
        if totals is not None:
            sums = {name: combined(name, totals[0][name], value) for name, value in sums.items()}
            weights = jax.tree.map(jnp.add, totals[1], weights)
        totals = sums, weights
    if totals is None:
        raise BadInput("nothing to evaluate: there is no batch; give one or more")
    sums, weights = to_host(totals)
    # A term beside the loss may have nothing to count, such as the second token ahead in rows of two; it is left out.
    # Extremes have no weight.
    weights |= {name: 1.0 for name in sums if name in EXTREMES}
    return {name: float(value / weights[name]) for name, value in sums.items() if name == "loss" or weights[name] > 0}
