"""Experts shared among 8 devices: the same values and gradients; tokens are exchanged, and each does its share.

Of a token's choices no more go to a device than it has experts, and no more room than that is sent; of what comes back
the backward pass keeps what a token gets, not the room.

Devices are virtual, which a process must ask for before JAX starts: hence the other process.
"""

import subprocess
import sys

from tests.devices import with_devices

PROGRAM = """
from functools import partial
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from llmq_jax.layers.axes import MESH_AXES
from llmq_jax.layers.expert_dispatch import Exchange, dispatch
from llmq_jax.layers.expert_exchange import dispatch_on_mesh
from llmq_jax.layers.expert_weights import ExpertWeights
from llmq_jax.layers.recomputation import POLICIES

DEVICES, EXPERTS, CHOICES, TOKENS, WIDTH, HIDDEN = 8, 16, 3, 64, 6, 10
OWN = TOKENS // DEVICES
ROOM = OWN * min(CHOICES, EXPERTS // DEVICES)
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
experts = ExpertWeights(normal(EXPERTS, WIDTH, 2, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH), normal(EXPERTS, 2, HIDDEN))
x, weights, grad = normal(TOKENS, WIDTH), jnp.abs(normal(TOKENS, CHOICES)), normal(TOKENS, WIDTH)
ids = np.argsort(-(rng.standard_normal(EXPERTS) + rng.gumbel(size=(TOKENS, EXPERTS))), axis=1)[:, :CHOICES]
ids[5:9] = EXPERTS  # padding
ids[16:32, :2] = [4, 5]  # two devices fill the whole room of one
ids[16:32, 2] = 9
ids = jnp.asarray(ids, jnp.int32)
activate = lambda parts: jax.nn.silu(parts[..., 0, :]) * parts[..., 1, :]

all_to_all = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(AxisType.Auto,))
shared = P("expert")


def layer(name, x, ids, weights, experts):
    def on_a_device(x, ids, weights, experts):
        exchange = Exchange(DEVICES, all_to_all)
        capacity = CHOICES * TOKENS if name == "capacity" else None  # room for all
        return dispatch(x, ids, weights, experts, activate, name, capacity, exchange)[0]

    return jax.shard_map(on_a_device, mesh=mesh, in_specs=shared, out_specs=shared, check_vma=False)(
        x, ids, weights, experts
    )


def loss(mix):
    return jax.jit(jax.value_and_grad(lambda x, w, e: (mix(x, ids, w, e) * grad).sum(), (0, 1, 2)))


def kept(name):
    # Shapes of what the backward pass reads, as layers have it.
    mix = jax.checkpoint(partial(layer, name), policy=POLICIES["none"])
    learned = lambda *inputs: jax.vjp(lambda x, weights, experts: mix(x, ids, weights, experts), *inputs)[1]
    return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(learned, x, weights, experts))]


expected = loss(lambda *inputs: dispatch(*inputs, activate, "dense")[0])(x, weights, experts)
for name in ("blocks", "ragged", "grouped", "capacity"):
    compiled = loss(partial(layer, name)).lower(x, weights, experts).compile()
    found = compiled(x, weights, experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    program = compiled.as_text()
    print(name, "exchanges", len(re.findall(r" all-to-all(?:-start)?\\(", program)))
    rooms = [shape[1] for shape in kept(name) if shape[:1] + shape[2:] == (DEVICES**2, WIDTH)]
    print(name, "rooms kept", rooms == [ROOM])
    # A device holds 2 of the 16 experts, and no array of all of them is ever formed.
    print(name, "all experts", len(re.findall(rf"f32\\[{EXPERTS},{WIDTH},2,{HIDDEN}\\]", program)))
    print(name, "own experts", len(re.findall(rf"f32\\[{EXPERTS // DEVICES},{WIDTH},2,{HIDDEN}\\]", program)) > 0)

# A mesh that divides tokens, experts and hidden units; with biases and adapters.
experts = experts.replace(
    down_bias=normal(EXPERTS, WIDTH),
    up_low_rank=(normal(EXPERTS, WIDTH, 3), normal(EXPERTS, 3, 2, HIDDEN)),
    down_low_rank=(normal(EXPERTS, HIDDEN, 3), normal(EXPERTS, 3, WIDTH)),
)
expected = loss(lambda *inputs: dispatch(*inputs, activate, "dense")[0])(x, weights, experts)
with jax.set_mesh(jax.make_mesh((2, 1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)):
    found = loss(lambda *inputs: dispatch_on_mesh(*inputs, activate, "blocks")[0])(x, weights, experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    one = partial(dispatch_on_mesh, activation=activate, implementation="capacity", capacity_factor=1.0)
    print("dropped", jax.jit(one)(x, jnp.zeros((TOKENS, 1), jnp.int32), weights[:, :1], experts)[1])
    two = jnp.tile(jnp.arange(2, dtype=jnp.int32), (TOKENS, 1))
    print("dropped of two choices", jax.jit(one)(x, two, weights[:, :2], experts)[1])
"""


def test_experts_on_eight_devices():
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=with_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    for name in ("blocks", "ragged", "grouped", "capacity"):
        # Rows there and back with the loads, and the gradients of rows there and back.
        assert int(facts[f"{name} exchanges"]) >= 4
        assert facts[f"{name} rooms kept"] == "True"
        assert facts[f"{name} all experts"] == "0"
        assert facts[f"{name} own experts"] == "True"
    assert facts["dropped"] == "60"  # each half of the tokens, all for one expert, finds 2 = 32 / 16 slots
    assert facts["dropped of two choices"] == "112"  # each half, for two experts, finds 2 · 4 = 2 · (64 / 16) slots
