"""Gradients compared, whoever computed them."""

import numpy as np


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
