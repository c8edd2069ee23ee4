"""GPT-2 against transformers' GPT2LMHeadModel: logits, loss and gradients, padded, packed and past a cache."""

import pytest

from llmq_jax.interop import config_from_hf
from llmq_jax.models.gpt2 import GPT2Config
from tests.parity.decoders import SameAsTransformers, assert_same_logits, assert_same_loss_and_gradients, make_pair
from tests.parity.references import config_of_transformers

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TIED = {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
PAIRS = {
    # Every field away from its default.
    "untied": {
        "vocab_size": 97,
        "n_positions": 48,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 3,
        "n_inner": 40,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-2,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair("gpt2", PAIRS[request.param] | NO_DROPOUT)


class TestGPT2(SameAsTransformers):
    pass


@pytest.mark.parametrize(
    "fields", [{}, {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3}]
)
def test_a_head_that_is_the_embedding(fields):
    """The second with the scores of stanford-crfm's models."""
    pair = make_pair("gpt2", TIED | NO_DROPOUT | fields)
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


def test_exported_config_is_understood_by_transformers():
    ours = GPT2Config(
        vocab_size=11,
        max_position_embeddings=12,
        hidden_size=10,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=17,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        embd_pdrop=0.2,
        attn_pdrop=0.3,
        resid_pdrop=0.4,
        initializer_range=0.5,
        tie_word_embeddings=False,
        scale_attn_by_inverse_layer_idx=True,
    )
    assert config_from_hf(config_of_transformers(ours).to_dict()) == ours
