"""The bias for selection moves by the load of all devices and micro-batches: a batch over 8 of them is the same batch.

Devices are virtual, which a process must ask for before JAX starts: hence the other process.
"""

import subprocess
import sys

import pytest

from tests.devices import with_devices

PROGRAM = """
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import llmq_jax as lq

config = lq.DeepSeekV3Config(
    vocab_size=23, max_position_embeddings=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4, intermediate_size=12,
    first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, n_group=1,
    topk_group=1, initializer_range=0.3, balance={"bias_rate": 0.5, "bias_update": "proportional"},
)
tokens = np.random.default_rng(0).integers(0, 23, (16, 13)).astype(np.int32)
batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((16, 12), np.float32)}
optimizer = optax.sgd(0.1)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
results = []
for rows, whole in ((jax.devices()[0],) * 2, (NamedSharding(mesh, P("data")), NamedSharding(mesh, P()))):
    step = lq.training.make_train_step(lq.objectives.MultiToken(lq.build(config)), optimizer, accumulate=2)
    state = jax.device_put(lq.training.create_state(lq.init(config), optimizer), whole)
    state, metrics = step(state, jax.device_put(batch, rows))
    results.append(jax.device_get((state.variables, metrics)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
bias = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(results[0][0]["router"])])
print("moved", np.abs(bias).max() > 0.01, "devices", len(jax.devices()))
"""


@pytest.mark.exhaustive
def test_a_batch_over_eight_devices():
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=with_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[0] == "moved True devices 8"
