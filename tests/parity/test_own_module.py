"""A torch module of one's own, as docs/own_model.md shows it: its weights go both ways, and its parity is tested."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llmq_jax.errors import BadInput
from llmq_jax.models import ARCHITECTURES
from llmq_jax.training.roles import ROLES
from tests.parity.references import randomise

PAGE = (Path(__file__).parents[2] / "docs" / "own_model.md").read_text()
SIZES = {"vocab_size": 61, "max_position_embeddings": 16, "hidden_size": 24, "num_attention_heads": 3}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


@pytest.fixture
def shown():
    """What the page defines; its entries are taken out again."""
    added = [(table, {*table}) for table in (ARCHITECTURES, ROLES)]
    scope: dict = {"__name__": "own_module"}
    marks = r"<!-- executed by tests/(?:models/test_own_model|parity/test_own_module)\.py -->"
    for code in re.findall(rf"{marks}\n```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "docs/own_model.md", "exec"), scope)
    yield scope
    for table, names in added:
        for name in table.keys() - names:
            del table[name]


def test_the_module_of_the_page_has_parity_and_comes_back(shown):
    module = shown["TorchGain"](vocabulary=61, context=16, width=24, heads=3, layers=2)
    randomise(module, 0)
    config = shown["GainConfig"](**SIZES, num_hidden_layers=2)
    found = shown["differences"](module, config, TOKENS)
    assert found.keys() == {"logits", *module.state_dict()} and max(found.values()) < 1e-4

    lm = shown["from_torch"](module, config)
    back = {name: np.array(tensor) for name, tensor in shown["TABLE"].lazy_state_dict(lm.variables, config).items()}
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
    shown["TorchGain"](61, 16, 24, 3, 2).load_state_dict({name: torch.tensor(array) for name, array in back.items()})

    with pytest.raises(BadInput, match=r"layers\.2\.gain"):
        shown["from_torch"](shown["TorchGain"](61, 16, 24, 3, 3), config)
