"""Thousands of short steps, in each of which the devices of a mesh exchange something, on one core: where one is called
before the one before it is done, they soon wait for each other for ever, which ends the process after some seconds. A
program of its own, since a process must ask for devices before JAX starts:

    python -m tests.exchange_program
"""

import os

from tests.devices import with_devices

if __name__ == "__main__":
    os.environ.update(with_devices(2))
    for timeout in ("warn_stuck", "terminate"):
        os.environ["XLA_FLAGS"] += f" --xla_cpu_collective_call_{timeout}_timeout_seconds=5"
    os.environ.pop("NPROC", None)  # with more threads they have enough
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.layers.axes import replicated
from llmq_jax.training.sharding import make_mesh, place_batch
from llmq_jax.training.step import Compiled, evaluate

STEPS = 5000


def sums(factor, batch):
    rows = jnp.tanh(replicated(batch["rows"]) @ factor)
    return {"loss": rows.sum()}, {"loss": jnp.float32(len(rows))}


if __name__ == "__main__":
    with jax.set_mesh(make_mesh("fsdp=2")):
        step = Compiled(jax.jit(sums), place_batch)
        batch = {"rows": np.ones((256, 256), np.float32)}
        print(evaluate(step, np.ones((256, 256), np.float32), [batch] * STEPS))
