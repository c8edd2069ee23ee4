"""How the tests of weights ask for what is refused."""

import pytest

from llmq_jax.errors import BadInput


def refused(call, *arguments, **named) -> str:
    """The one line with which the call is refused."""
    with pytest.raises(BadInput) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)
