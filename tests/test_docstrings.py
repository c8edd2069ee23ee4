"""Whatever is public says what it is."""

import inspect
from types import FunctionType

import pytest

import llmq_jax as lq

PACKAGES = (lq, lq.data, lq.generation, lq.interop, lq.objectives, lq.training)
PUBLIC = {f"{package.__name__}.{name}": getattr(package, name) for package in PACKAGES for name in package.__all__}
TYPES = {"llmq_jax.data.Batch"}  # which are explained where they stand


def members(kind):
    """The public functions and properties that a class defines."""
    kinds = FunctionType, property, classmethod, staticmethod
    return [name for name, member in vars(kind).items() if name[0] != "_" and isinstance(member, kinds)]


def test_the_package_lists_public_names_alone():
    assert dir(lq) == sorted([*lq.__all__, "__version__"])


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in TYPES])
def test_it_has_a_docstring(name):
    value = PUBLIC[name]
    assert value.__doc__ and not value.__doc__.startswith(f"{name.rpartition('.')[2]}("), "a dataclass writes its own"
    if inspect.isclass(value):
        without = [member for member in members(value) if not inspect.getdoc(getattr(value, member))]
        assert not without, without
