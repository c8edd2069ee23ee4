"""PyTorch models to compare with: tiny, and randomised so that no fault can hide behind an initial value."""

from collections.abc import Iterable

import numpy as np
import torch

from convert.parity_reference import Reference, randomise

__all__ = ["assert_same_gradients", "numpy_gradients", "numpy_state", "randomise"]


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's state dict as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def numpy_gradients(model: torch.nn.Module, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The gradients that a backward pass left, by the names in a file, which are `names`; a tied parameter's once."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Reference.of(model, names).as_saved(gradients)


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Every gradient, by name, within `tolerance` of its largest element; of experts without a token both are zero."""
    assert ours.keys() == theirs.keys()
    idle = 0
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        largest = np.abs(expected).max()
        if largest == 0 and ".experts." in name:
            assert not ours[name].any(), name
            idle += 1
            continue
        assert largest > 0, f"the gradient of {name} is zero: nothing is compared"
        difference = np.abs(ours[name] - expected).max() / largest
        assert difference < tolerance, f"the gradient of {name} differs by {difference:.1e}"
    assert idle < len(theirs) / 4
