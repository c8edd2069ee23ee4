"""Muon on meshes of 8 virtual devices updates as on one, and leaves everything where it lies. As a program:

python -m tests.training.test_muon_on_devices
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.devices import with_devices

MESHES = {"gpt2": "data=2,fsdp=2,tensor=2", "mixtral": "fsdp=2,expert=2,tensor=2", "deepseek3": "fsdp=4,expert=2"}


def test_updates_are_those_of_one_device():
    command = [sys.executable, "-m", "tests.training.test_muon_on_devices"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = list(map(json.loads, done.stdout.splitlines()))
    assert [line["architecture"] for line in found] == list(MESHES)
    for line in found:
        assert line["moved"] > 1e-2 and line["apart"] < 1e-5, line
        assert line["places_kept"], line
        assert line["exchanges"] and line["largest_gathered"] <= line["largest"] / 2, line
        assert line["state_bytes"] < 1.4 / 4, line  # of one device's; what is small is whole


def main() -> None:
    import jax
    import numpy as np
    import optax

    from llmq_jax.models import override
    from llmq_jax.training.optimizer import muon
    from llmq_jax.training.sharding import make_mesh
    from llmq_jax.training.state import create_state
    from tests.mesh_program import CONFIGS, drawn

    optimizer = muon(0.02)

    def trained(variables, grads):
        state = create_state(variables, optimizer)
        params, held = state.variables["params"], state.optimizer_state
        step = jax.jit(optimizer.update).lower(grads[0], held, params).compile()
        for gradient in grads:
            updates, held = step(gradient, held, params)
            params = optax.apply_updates(params, updates)
        return params, held, state, step.as_text()

    def on_first(tree):
        shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
        return sum(shard.nbytes for shard in shards)

    for architecture, mesh in MESHES.items():
        layers = 3 if architecture == "deepseek3" else 8  # there they are no multiple of the devices
        variables = drawn(override(CONFIGS[architecture](), num_hidden_layers=layers))
        rng = np.random.default_rng(0)
        grads = [
            jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), variables["params"])  # noqa: B023
            for _ in range(3)
        ]
        one, one_held, _, _ = trained(variables, grads)
        with jax.set_mesh(make_mesh(mesh)):
            many, held, start, program = trained(variables, grads)
        pairs = list(zip(*map(jax.tree.leaves, (one, many, variables["params"])), strict=True))
        places = zip(*map(jax.tree.leaves, (held, start.optimizer_state)), strict=True)
        gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
        facts = {
            "architecture": architecture,
            "apart": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b, _ in pairs),
            "moved": min(float(np.abs(np.asarray(a) - c).max()) for a, _, c in pairs),
            "places_kept": all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in places),
            # Layers are exchanged, not gathered: of what is, half has its place beside (copies along data).
            "exchanges": program.count(" all-to-all("),
            "largest_gathered": max((math.prod(map(int, shape.split(","))) for shape in gathered), default=0),
            "largest": max(leaf.size for _, leaf, _ in pairs),
            "state_bytes": on_first(held) / on_first(one_held),
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    os.environ.update(with_devices(8))
    main()
