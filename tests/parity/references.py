"""PyTorch models to compare with: tiny, and randomised so that no fault can hide behind an initial value."""

from zlib import crc32

import numpy as np
import torch


def randomise(model: torch.nn.Module) -> None:
    """Draw every parameter anew, each from a seed that is its name.

    Norms and biases move away from 1 and 0, which hide a wrong or missing one, and matrices have a gain of about
    1/sqrt(fan in), so that attention is not flat.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        rng = np.random.default_rng(crc32(name.encode()))
        if len(shape) == 1:
            values = 0.3 * rng.standard_normal(shape) + (1.0 if "bias" not in name else 0.0)
        else:
            embedding = "wte" in name or "wpe" in name or "embed" in name
            values = rng.standard_normal(shape) * (0.5 if embedding else 1.4 / min(shape) ** 0.5)
        with torch.no_grad():
            parameter.copy_(torch.tensor(values, dtype=parameter.dtype))


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's state dict as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def numpy_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients that a backward pass left, by parameter; a tied one once, under the name it is saved by."""
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Every gradient, by name, within `tolerance` of its largest element."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        largest = np.abs(expected).max()
        assert largest > 0, f"the gradient of {name} is zero: nothing is compared"
        difference = np.abs(ours[name] - expected).max() / largest
        assert difference < tolerance, f"the gradient of {name} differs by {difference:.1e}"
