"""Chunked losses on 8 virtual devices, for which a process must ask before JAX starts: a program of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import with_devices

MESHES = ("data=8", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2")
EXCHANGE = r" (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
ROWS, LENGTH, WIDTH, VOCABULARY, CHUNK = 16, 6, 24, 40, 4


def program() -> None:
    """Of each mesh: how far value and gradients are from one device's, the rows of logits that a device computes in a
    round of its loop, exchanges in loops."""
    import jax
    import numpy as np

    import llmq_jax as lq
    from llmq_jax.layers.axes import constrain
    from llmq_jax.objectives import logprobs
    from llmq_jax.objectives.cross_entropy import chunked_cross_entropy
    from llmq_jax.training.sharding import make_mesh, place, place_batch

    draw = np.random.default_rng(0)
    head = {"lm_head": {"kernel": draw.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)}}
    batch = {
        "hidden": draw.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        "targets": draw.integers(VOCABULARY, size=(ROWS, LENGTH)).astype(np.int32),
        "mask": (draw.random((ROWS, LENGTH)) < 0.7).astype(np.float32),
    }

    # Groups of devices differ in how many tokens count: the first of eight has none, the last all of them.
    batch["mask"][:2], batch["mask"][-2:] = 0, 1

    def loss(head, hidden, targets, mask):
        def unembed(head, rows):
            return rows @ head["lm_head"]["kernel"]

        return chunked_cross_entropy(unembed, head, constrain(hidden, "batch"), targets, mask, chunk_size=CHUNK)

    config = lq.GPT2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
    )
    model = lq.build(config)
    variables = jax.tree.map(np.asarray, lq.init(config))
    logprobs.CHUNK_ELEMENTS, logprobs.SHORTEST_CHUNK = {"cpu": CHUNK * VOCABULARY}, CHUNK

    def scores(variables, hidden, targets, mask):
        return logprobs.token_logprobs(model, variables, targets, mask).sum()

    def measured(loss, head):
        step = jax.jit(jax.value_and_grad(loss))
        given = place(head), *place_batch(batch).values()
        text = step.lower(*given).compile().as_text()
        loops = [part for part in re.split(r"\n(?=\S)", text) if not part.startswith("ENTRY")]
        exchanges = [found for part in loops for found in re.findall(EXCHANGE, part)]
        rows = {int(n) for part in loops for n in re.findall(rf"f32\[(?:1,)?(\d+),{VOCABULARY}\]\S* dot\(", part)}
        return jax.tree.map(np.asarray, step(*given)), sorted(rows), exchanges

    for name, function, weights in (("cross-entropy", loss, head), ("log-probabilities", scores, variables)):
        expected, _, _ = measured(function, weights)
        for mesh in MESHES:
            with jax.set_mesh(make_mesh(mesh)):
                found, rows, exchanges = measured(function, weights)
            both = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            apart = max(float(np.abs(a - b).max() / (np.abs(b).max() or 1)) for a, b in both)
            facts = {"name": name, "mesh": mesh, "apart": apart, "rows": rows, "exchanges": exchanges}
            print(json.dumps(facts), flush=True)


@pytest.mark.exhaustive
def test_every_device_goes_through_its_own_rows():
    command = [sys.executable, "-m", "tests.objectives.test_loss_on_mesh"]
    environment = with_devices(8, optimized=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = list(map(json.loads, done.stdout.splitlines()))
    assert [facts["mesh"] for facts in found] == [*MESHES, *MESHES]
    for facts in found:
        assert facts["apart"] < 3e-6, facts
        if "tensor" not in facts["mesh"]:  # whose devices share a row's logits
            assert facts["rows"] == [CHUNK], facts
            assert not facts["exchanges"], facts


if __name__ == "__main__":
    program()
