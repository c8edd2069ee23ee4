"""Mistral's weights and config.

- `hf`: transformers' `MistralForCausalLM`, whose names are Llama's.
"""

from llmq_jax.interop import llama3
from llmq_jax.interop.configs import GROUPED, ConfigTable
from llmq_jax.interop.rope import read_rope
from llmq_jax.interop.tables import KEEP
from llmq_jax.models.mistral import MistralConfig

LAYOUTS = {"hf": llama3.LAYOUTS["hf"]}

CONFIG = ConfigTable(
    config_class=MistralConfig,
    architecture="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    shared=GROUPED | {"hidden_act", "sliding_window"},
    own=llama3.OWN | {"attention_bias": (False, KEEP), "mlp_bias": (False, KEEP)},
    read=read_rope,
    write=llama3.write_sizes,
)
