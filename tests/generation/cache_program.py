"""Run with 8 devices: greedy tokens on a mesh and on one device, and where the caches lie. A line of JSON each."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

import llmq_jax as lq
from llmq_jax.generation.decoding import advance, prefill
from llmq_jax.interop import from_state_dict, to_state_dict
from llmq_jax.training import make_mesh

SHARED = {"vocab_size": 31, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": lq.Llama3Config(**SHARED, **HEADS),
    "gemma": lq.Gemma3Config(**SHARED, **HEADS, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "deepseek": lq.DeepSeekV3Config(
        **SHARED, **LATENT, **EXPERTS, hidden_size=16, num_attention_heads=4, intermediate_size=24
    ),
}
PROMPTS, NEW, LENGTH = np.arange(48).reshape(8, 6) % 31, 6, 12
GREEDY = lq.Sampler(temperature=0.0)


PENALISED = lq.Sampler(temperature=0.0, repetition_penalty=1.3)


def tokens_of(lm: lq.LanguageModel) -> list:
    samplers = (GREEDY, PENALISED)
    return [lq.generate(lm, PROMPTS.tolist(), max_new_tokens=NEW, sampler=each).tokens.tolist() for each in samplers]


for name, config in CONFIGS.items():
    alone = lq.LanguageModel(config, lq.build(config), lq.init(config, seed=3))
    expected, weights = tokens_of(alone), to_state_dict(alone.variables, config)
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
        lm = alone.replace(variables=from_state_dict(weights, config))
        equal = tokens_of(lm) == expected
        rows = {"prompt_lengths": jnp.full(8, 6), "seeds": jnp.zeros(8, jnp.uint32)}
        choices = {"sampler": GREEDY, "end_tokens": ()}
        room = {"length": LENGTH, "new_tokens": NEW, "pad": 0}
        state, _ = prefill(lm.model, lm.variables, jnp.asarray(PROMPTS), **rows, **choices, **room)
        program = advance.lower(lm.model, *lm.sliced(8), state, jnp.int32(NEW), **choices).compile().as_text()
    caches = [leaf for leaf in jax.tree.leaves(state.caches) if leaf.ndim > 2]
    whole = {",".join(map(str, leaf.shape)) for leaf in caches}
    result = {
        "name": name,
        "equal": equal,
        "parts": [leaf.size // leaf.addressable_shards[0].data.size for leaf in caches],
        "gathered": sorted(whole & set(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program))),
    }
    print(json.dumps(result))
