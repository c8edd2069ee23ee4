"""Golden arrays of the original repository, and our model with its weights.

`data/*.npz` were computed by the original's own code, on CPU in float32: `param/` its state dict, `in/` and `out/` what
went in and came out, `grad/` gradients, `meta` the rest.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.interop import config_from_state_dict, from_state_dict, to_state_dict
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import build
from llmq_jax.objectives.next_token import NextToken

DATA = Path(__file__).parent / "data"
LOGITS = 3e-4


def read_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """(the arrays of a file, its `meta`)."""
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("meta")))


class Golden:
    """One file of golden arrays, and our model with its weights.

    `state` is the prefix of the state dict; `fields` gives, from `meta`, what its shapes do not tell of the config.
    """

    def __init__(self, name: str, state: str = "param/", fields: Callable[[dict], dict] = lambda meta: {}):
        self.arrays, self.meta = read_golden(name)
        self.state = self.under(state)
        heads = self.meta["cfg"]["n_heads"]
        self.config = config_from_state_dict(self.state, "original", num_attention_heads=heads, **fields(self.meta))
        variables = from_state_dict(self.state, self.config, "original")
        self.lm = LanguageModel(self.config, build(self.config), variables)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        found = {name: array for name, array in self.arrays.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): array for name, array in found.items()}

    def inputs(self) -> dict[str, np.ndarray]:
        """Our arguments for theirs. Their mask hides keys and leaves positions alone."""
        if "in/attn_mask" not in self.arrays:
            return {}
        mask = self["in/attn_mask"]
        positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
        return {"segment_ids": mask.astype(np.int32), "positions": positions}

    def difference(self) -> float:
        """The largest difference of logits at real positions: what a padded one attends to differs, and counts not."""
        inputs = {name: jnp.asarray(array) for name, array in self.inputs().items()}
        logits = self.lm.model.apply(self.lm.variables, jnp.asarray(self["in/x"]), **inputs)
        differences = np.abs(logits - self["out/logits"])
        return differences[self.arrays.get("in/attn_mask", np.ones(self["in/x"].shape, bool))].max()

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Ours, gradients under the original's names."""
        targets = self["in/y"]
        batch = {
            "tokens": self["in/x"],
            "targets": np.maximum(targets, 0),
            "mask": (targets >= 0).astype(np.float32),  # -100 counts nowhere
            **self.inputs(),
        }
        batch = {key: jnp.asarray(value) for key, value in batch.items()}
        objective = NextToken(self.lm.model)

        @jax.jit
        @jax.value_and_grad
        def compute(variables):
            return objective.loss(variables, batch, objective.weights(batch))[0]

        loss, gradients = compute(self.lm.variables)
        return float(loss), to_state_dict(gradients, self.config, "original")
