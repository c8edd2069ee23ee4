"""Checks of values, from JSON or from callers in Python, against the annotations of dataclass fields."""

import contextlib
import dataclasses
import functools
import operator
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar

from llmq_jax.errors import BadInput, did_you_mean

T = TypeVar("T")

LARGEST_FLOAT = 2**1023
"""Integers below it can be converted to floats."""


def has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value suits a field's annotation: an int is a fine float, a list a tuple, a bool is no int."""
    if isinstance(hint, UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if (kind := typing.get_origin(hint)) is dict:
        return type(value) is dict
    if kind in (list, tuple):
        return type(value) in (kind, list) and all(has_type(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint or (hint is float and type(value) is int and abs(value) < LARGEST_FLOAT)


def as_type(value: Any, hint: Any) -> Any:
    """A value that suits the annotation, in its type: JSON may write a float without a point, and has no tuples."""
    options = _options(hint)
    kinds = {typing.get_origin(option): typing.get_args(option) for option in options}
    if type(value) is list and tuple in kinds and list not in kinds:
        return tuple(as_type(item, kinds[tuple][0]) for item in value)
    return float(value) if type(value) is int and float in options and int not in options else value


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)


def type_name(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " | ".join("None" if option is type(None) else type_name(option) for option in typing.get_args(hint))
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))


def create(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of these fields; BadInput where there is no such field, or its value is of another type."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
    all_hints = typing.get_type_hints(kind)  # those of class variables too
    hints = {field.name: all_hints[field.name] for field in fields}
    for name, value in values.items():
        if name not in hints:
            known = did_you_mean(name, list(hints), count=1)
            raise BadInput(f"{kind.__name__.lower()}: there is no field {name!r}; {known}")
        if not has_type(value, hints[name]):
            raise BadInput(f"{kind.__name__.lower()}: {name}={value!r} is not of the type {type_name(hints[name])}")
    for entry in fields:
        if entry.init and entry.name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise BadInput(f"{kind.__name__.lower()}: lacks {entry.name}")
    return kind(**{name: as_type(value, hints[name]) for name, value in values.items()})


PLAIN = (int, float, bool, str, type(None))


def check_fields(instance: Any) -> None:
    """For `__post_init__`: BadInput for a field that by its annotation is a number, a bool or a string, but has a value
    of another type. Scalars of NumPy and JAX become Python's, and integers floats where the field is one. Fields of
    other types are not checked."""
    kind: Any = type(instance)
    for name, hint in _plain_hints(kind).items():
        value = scalar(getattr(instance, name))
        if not has_type(value, hint):
            raise BadInput(f"{kind.__name__}.{name}={value!r} is not of the type {type_name(hint)}")
        object.__setattr__(instance, name, as_type(value, hint))


@functools.cache
def _plain_hints(kind: Any) -> dict[str, Any]:
    hints = {field.name: field.type for field in dataclasses.fields(kind)}
    with contextlib.suppress(NameError):  # for a type that is imported for type checkers alone
        hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in hints}
    return {name: hint for name, hint in hints.items() if set(_options(hint)) <= set(PLAIN)}


def require_model(lm: Any) -> None:
    """BadInput for what is no LanguageModel, such as the name of one, and for one whose arrays a step has consumed."""
    # In this order: a Flax module, such as lm.model, has no tokenizer, and raises an error of its own for `variables`.
    if not (hasattr(lm, "config") and hasattr(lm, "tokenizer") and hasattr(lm, "variables")):
        name = repr(lm) if isinstance(lm, str) else "name"
        raise BadInput(f"{lm!r:.60} stands where a loaded model is wanted; give what lq.load({name}) returns")
    refuse_consumed(lm.variables)


def require_module(model: Any) -> None:
    """BadInput for what is no Flax module, such as a LanguageModel."""
    if not hasattr(model, "apply"):
        raise BadInput(
            f"{model!r:.60} stands where a model is wanted, a Flax module; give lm.model, or lq.build(config)"
        )


def require_variables(variables: Any) -> None:
    """BadInput for what is no dict of collections, such as a LanguageModel, or the parameters alone."""
    if not (isinstance(variables, Mapping) and "params" in variables):
        raise BadInput(
            f"{variables!r:.60} stands where variables are wanted, a dict with 'params' among its collections; give "
            "lm.variables, or what lq.init returns"
        )


def refuse_consumed(variables: Any, whose: str = "this model") -> None:
    """BadInput for variables of which training has consumed (donated) an array: no computation can read them."""
    if is_consumed(variables):
        raise BadInput(
            f"{whose}'s weights are gone: training took over their memory (create_state does not copy them); "
            "go on with what it returned, lm.replace(variables=state.variables), or load the model again"
        )


def is_consumed(tree: Any) -> bool:
    """Whether an array of a pytree is deleted, as those are that a step was given and has donated."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return any(not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted() for leaf in leaves)


def scalar(value: Any) -> Any:
    """A scalar of NumPy or JAX as Python's, any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def require_numbers(**values: Any) -> None:
    """BadInput for a text, or None, where a number is wanted, or a function or an array in its place."""
    for name, value in values.items():
        if value is None or isinstance(value, str):
            advice = "; YAML reads 1e-3 as a text, and 1.0e-3 as a number" if value else ""
            raise BadInput(f"{name}={value!r} must be a number{advice}")


def float_type(dtype: Any) -> Any:
    """A floating type, np.dtype, from its name or any other form of it; None stays None. BadInput: any other type, and
    those of one byte, whose range weights exceed without scales beside them."""
    import jax.numpy as jnp

    if dtype is None:
        return None
    with contextlib.suppress(TypeError):
        known = jnp.dtype(dtype)
        if jnp.issubdtype(known, jnp.floating) and known.itemsize > 1:
            return known
    raise BadInput(f"dtype={dtype!r} is not a floating type of 2 bytes or more; use float32, bfloat16 or float16")


def whole(value: Any, name: str) -> int:
    """The value as Python's integer, from an integer of any kind. BadInput, which names `name`, for anything else."""
    try:
        return operator.index(scalar(value))
    except TypeError:
        raise BadInput(f"{name}={value!r} must be an integer") from None
