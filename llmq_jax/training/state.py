"""Everything a run needs to go on: one pytree, saved and restored whole."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from llmq_jax.errors import BadInput, warn
from llmq_jax.field_types import is_consumed, refuse_consumed, require_variables, whole
from llmq_jax.layers.lora import LORA, trained_whole
from llmq_jax.models import parameter_count
from llmq_jax.models.decoder import PARAMS
from llmq_jax.training.sharding import place

ROUTER = "router"
"""The collection that a step updates without gradients, where `params` train: the routers' biases for selection."""


class TrainState(struct.PyTreeNode):
    """Everything a run needs to go on. Immutable: `state.replace(step=...)` gives another one."""

    # Any, because leaves may also be shapes (jax.eval_shape), shardings or numpy arrays.
    step: Any
    """int32: the number of finished updates."""
    variables: dict[str, Any]
    """All collections; those that a step changes are in float32."""
    optimizer_state: Any
    key: Any
    """uint32 [2]: step s draws its dropout from fold_in(key, s)."""
    carried: Any = None
    """Whatever arrays a recipe adds to be saved with the state; the step does not touch them. Of a dict, checkpoints
    hold each entry by itself, which is written where it has changed since the checkpoint before."""
    trainable: tuple[str, ...] = struct.field(pytree_node=False, default=("params",))
    """The collections that gradients and the optimizer see."""

    def __repr__(self) -> str:
        """The sizes of arrays in their place; what stands for them in a tree of shardings, or in a prefix, as it is."""
        held = isinstance(self.variables, dict) and jax.tree.leaves(self.variables)
        if not held or not all(hasattr(leaf, "size") for leaf in held):
            fields = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
            return f"TrainState({', '.join(fields)})"
        sizes = ", ".join(f"{name} {parameter_count(tree):,}" for name, tree in self.variables.items())
        step = "consumed by a step" if is_consumed(self.step) else f"step={self.step}"
        return f"TrainState({step}; values: {sizes}; training: {', '.join(self.trainable)})"

    @property
    def trained(self) -> dict[str, Any]:
        """What the optimizer sees: the collection that trains, or a dict of several."""
        return one_or_all({name: self.variables[name] for name in self.trainable})

    @property
    def changing(self) -> tuple[str, ...]:
        """The collections that a step may change."""
        return tuple(name for name in (*self.trainable, ROUTER) if name in self.variables)

    def with_trained(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The variables with `trained`, in the form of the property of that name, in place of what trains."""
        return {**self.variables, **({self.trainable[0]: trained} if len(self.trainable) == 1 else trained)}


def one_or_all(trees: dict[str, Any]) -> dict[str, Any]:
    return next(iter(trees.values())) if len(trees) == 1 else trees


def with_updates(state: TrainState, updates: int) -> TrainState:
    """The state with this number of finished updates, by which a schedule gives the learning rate. The moments keep the
    number of their own."""
    count = updates - int(state.step)
    if count == 0:
        return state

    def counted(part: Any) -> Any:
        return part._replace(count=part.count + count) if isinstance(part, optax.ScaleByScheduleState) else part

    optimizer_state = jax.tree.map(
        counted, state.optimizer_state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState)
    )
    return state.replace(step=state.step + count, optimizer_state=optimizer_state)


def routers_learn(variables: dict[str, Any], trainable: tuple[str, ...]) -> bool:
    """Whether steps move the biases for selection of those routers that are among `params`."""
    return ROUTER in variables and PARAMS in trainable


def create_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    trainable: str | tuple[str, ...] = ("params",),
) -> TrainState:
    """State of step 0. What trains, and the routers' biases that move with it, is held in float32, whatever type it
    came in. On a mesh (`training.sharding`) every device gets its part.

    `variables` are those of `init` or of a LanguageModel. Arrays in float32 are not copied, and the first step consumes
    them (they are donated): that LanguageModel cannot be used afterwards. `optimizer` makes its state for the
    collections `trainable`; `seed` is that of dropout. BadInput for variables that a step has consumed already, or that
    lack one of these collections.
    """
    require_variables(variables)
    refuse_consumed(variables)
    require_optimizer(optimizer)
    names = (trainable,) if isinstance(trainable, str) else trainable
    for name in names:
        if name not in variables:
            raise BadInput(f"trainable={name!r} is none of these variables' collections: {', '.join(variables)}")
    if LORA in names and PARAMS not in names and (left := trained_whole(variables)):
        warn(
            f"{', '.join(sorted(left))}: trains whole beside the adapters, but stays as it is with trainable={names!r};"
            " take what training.parts.train_adapters returns"
        )
    learns = (*names, ROUTER) if routers_learn(variables, names) else names
    trained = {name: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables[name]) for name in learns}
    variables = place({**variables, **trained})
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        optimizer_state=optimizer.init(one_or_all({name: variables[name] for name in names})),
        key=jax.random.key_data(jax.random.key(whole(seed, "seed"))),
        trainable=names,
    )
    placed: TrainState = bound_alike(place(state))
    return placed


def require_optimizer(optimizer: Any) -> None:
    """BadInput for what is no optimizer, such as the name of one."""
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise BadInput(
            f"{optimizer!r:.60} is no optimizer; give one, as lq.training.adamw(1e-3), or any other of optax's"
        )


def require_state(state: Any) -> None:
    """BadInput for what is no state of training, such as the variables of a model."""
    if not hasattr(state, "step"):
        raise BadInput(
            f"{state!r:.60} stands where a state of training is wanted; give what lq.training.create_state returns"
        )


def refuse_consumed_state(state: Any) -> None:
    """BadInput for a state that a step has consumed, or whose arrays are those of one that it has."""
    if is_consumed(state):
        raise BadInput(
            "a step has consumed this state, or another of the same arrays (create_state does not copy them); go on "
            "with the one that it returned: state, metrics = train_step(state, batch)"
        )


def bound_alike(tree: Any) -> Any:
    """A tree of arrays, all of them bound to the one device that some are bound to ("committed" in JAX's terms). The
    tree is unchanged if none is, if it is spread over several devices, and while a function is traced.

    Arrays of a checkpoint are bound to their device, fresh ones are not. From such a mixture a step returns arrays that
    are all bound, and the next step would be compiled a second time for these.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return tree
    devices = {device for leaf in leaves if leaf.committed for device in leaf.devices()}
    if len(devices) != 1:
        return tree
    (device,) = devices

    def bound(leaf: Any) -> Any:
        # A bound array is returned itself: a second one beside it would keep a step from reusing its memory.
        fresh = isinstance(leaf, jax.Array) and not leaf.committed
        return jax.device_put(leaf, device) if fresh else leaf

    return jax.tree.map(bound, tree)
