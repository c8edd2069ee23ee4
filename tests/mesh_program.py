"""Train steps on meshes of 8 virtual devices beside one device, told as JSON. A process must ask for devices before JAX
starts, hence a program of its own:

    python -m tests.mesh_program llama3 data=8 data=2,fsdp=2,tensor=2
"""

import json
import os
import re
import sys

from tests.devices import with_devices

if __name__ == "__main__":
    os.environ.update(with_devices(8))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llmq_jax as lq
from llmq_jax.layers import attention, window_attention
from llmq_jax.objectives import MultiToken, NextToken
from llmq_jax.training.out_of_memory import bytes_on_a_device
from llmq_jax.training.sharding import make_mesh, place_batch
from llmq_jax.training.state import create_state
from llmq_jax.training.step import make_train_step

PMAP = "pmap"
ROWS, TOKENS, STEPS, RATE, ACCUMULATE = 16, 12, 20, 0.02, 2
SHARED = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "gpt2": lambda: lq.GPT2Config(**SHARED, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "llama3": lambda: lq.Llama3Config(**SHARED, num_key_value_heads=2, intermediate_size=24),
    "gemma3": lambda: lq.Gemma3Config(
        **SHARED,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=("sliding_attention", "full_attention"),
    ),
    "mixtral": lambda: lq.MixtralConfig(
        **SHARED, num_key_value_heads=2, intermediate_size=24, router_aux_loss_coef=0.01, **EXPERTS
    ),
    "qwen3-moe": lambda: lq.Qwen3MoeConfig(
        **{**SHARED, "num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        router_aux_loss_coef=0.01,
        **EXPERTS,
    ),
    "deepseek3": lambda: lq.DeepSeekV3Config(
        **{**SHARED, "num_hidden_layers": 3},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=24,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
    ),
}
RECORDS = optax.GradientTransformation(
    lambda params: jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), params),  # no program
    lambda grads, _, params=None: (jax.tree.map(lambda g: -RATE * g, grads), grads),
)
"""Gradient descent whose state is the last gradient."""


def batches() -> list[dict]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        tokens = rng.integers(0, SHARED["vocab_size"], (ROWS, TOKENS + 1)).astype(np.int32)
        mask = (rng.random((ROWS, TOKENS)) < 0.8).astype(np.float32)
        made.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask})
    return made


def perturbed(variables: dict) -> dict:
    """Biases and norms away from 0: of a leaf that begins there the last parameters are but gradients, and differ as
    gradients do."""
    rng = np.random.default_rng(2)

    def moved(leaf: np.ndarray) -> np.ndarray:
        return leaf + 0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(moved, jax.device_get(variables))


def drawn(config: object) -> dict:
    return perturbed(lq.init(config, seed=1))


def run(config: object, variables: dict, pmap: bool = False) -> dict:
    """Losses, the gradient of the first step, parameters of the last, and facts of the program and its arrays: of a
    device, bytes of parameters and work (loops counted once)."""
    model = lq.build(config)
    more = getattr(config, "num_nextn_predict_layers", 0)
    objective = MultiToken(model, 0.3) if more else NextToken(model)
    step = make_train_step(objective, RECORDS, accumulate=ACCUMULATE, mode="pmap" if pmap else "jit")
    state = create_state(jax.tree.map(jnp.array, variables), RECORDS)  # a copy, which the first step consumes
    # How pmap compiles is its own affair.
    compiled = None if pmap else step.program.lower(state, place_batch(batches()[0])).compile()
    held = max(
        sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state.variables)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        for device in jax.devices()
    )
    assert bytes_on_a_device(state.variables) == held
    losses, gradient = [], None
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        gradient = jax.device_get(state.optimizer_state) if gradient is None else gradient
    return {
        "losses": losses,
        "gradient": gradient,
        "params": jax.device_get(state.variables["params"]),
        "bytes": held,
        "programs": 1 if pmap else step.program._cache_size(),
        "flops": compiled.cost_analysis()["flops"] if compiled else 0.0,
        "exchanges": len(re.findall(r" all-to-all(?:-start)?\(", compiled.as_text())) if compiled else 0,
    }


class Draws:
    """An objective that draws one number where it is asked once: for a micro-batch, or on a replica."""

    model = lq.build(CONFIGS["gpt2"]())

    def weights(self, batch: dict, step: object = None) -> dict:
        return {"loss": jnp.ones(())}

    def loss(self, variables: dict, batch: dict, weights: dict, rng: jax.Array) -> tuple:
        drawn = jax.random.uniform(rng)
        return variables["params"]["kernel"].sum(), {"sum": drawn, "squares": drawn**2}, {}


def spread_of_draws(count: int, **options: object) -> float:
    """The variance of the numbers that a step draws, so many: 0 if they are one number."""
    state = create_state({"params": {"kernel": jnp.ones(3)}}, RECORDS)
    _, metrics = make_train_step(Draws(), RECORDS, **options)(state, {"x": np.ones((count, 1), np.float32)})
    return float(metrics["squares"] / count - (metrics["sum"] / count) ** 2)


def main(architecture: str, *meshes: str) -> None:
    """Variables are drawn on one device and again, in parts, on the last mesh: their program takes seconds."""
    config = CONFIGS[architecture]()
    variables = drawn(config)
    alone = run(config, variables)
    for text in meshes:
        if text == PMAP:
            found = run(config, variables, pmap=True) | {"spread": spread_of_draws(8, mode="pmap")}
        else:
            with jax.set_mesh(make_mesh(text)):
                found = run(config, drawn(config) if text == meshes[-1] else variables)
        print(json.dumps({"mesh": text, **compared(found, alone)}), flush=True)


def compared(found: dict, alone: dict) -> dict:
    """The greatest differences: of losses relative to them, of gradients relative to the greatest element."""

    def apart(name: str) -> float:
        both = zip(jax.tree.leaves(found[name]), jax.tree.leaves(alone[name]), strict=True)
        return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1)) for a, b in both)

    losses = max(abs(a - b) / b for a, b in zip(found["losses"], alone["losses"], strict=True))
    return {
        "losses": losses,
        "gradient": apart("gradient"),
        "params": apart("params"),
        "bytes": found["bytes"] / alone["bytes"],
        "flops": found["flops"] / alone["flops"],
        "programs": found["programs"],
        "exchanges": found["exchanges"],
        "spread": found.get("spread"),
    }


if __name__ == "__main__":
    # So short that a row has several blocks, and a loop over those of a window several steps.
    attention.SHORTEST_QUERY_BLOCK = window_attention.SHORTEST_BLOCK = 4
    window_attention.QUERIES_OF_A_STEP = 8
    main(*sys.argv[1:])
