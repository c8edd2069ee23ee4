"""What the tests of DeepSeek V3's weights and configs share."""

import numpy as np

from llmq_jax.models import override
from llmq_jax.models.deepseek3 import DeepSeekV3Config

# V 13, D 12, N 3, E 6: no two sizes are equal, and those of experts are multiples of 4, in which torch multiplies.
SIZES = {
    "vocab_size": 13,
    "max_position_embeddings": 64,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 11,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}
PLAIN = DeepSeekV3Config(**SIZES)
AHEAD = override(PLAIN, num_nextn_predict_layers=2)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9))
BIAS = "mlp.gate.e_score_correction_bias"
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
