"""Llama against transformers' LlamaForCausalLM: all that decoders have in common, and every scaling of RoPE."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.interop import config_from_hf, config_to_hf, to_state_dict
from llmq_jax.models.llama3 import Llama3Config
from tests.parity.decoders import (
    LOGITS,
    SameAsTransformers,
    assert_same_logits,
    assert_same_loss_and_gradients,
    draw_tokens,
    make_pair,
    packed,
    their_logits,
)
from tests.parity.golden import LOGITS as GOLDEN_LOGITS
from tests.parity.golden import Golden
from tests.parity.references import config_of_transformers
from tests.parity.test_golden_llama3 import fields as original_fields

SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}
PAIRS = {
    # Every field away from its default, untied: all biases, a head for three heads of queries, wider than 24 / 6.
    "untied": {
        "vocab_size": 97,
        "max_position_embeddings": 48,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "intermediate_size": 40,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
}
# Trained on 16 tokens; rows have 40.
TRAINED = {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DIVISORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.8, 2.9, 4.0]}
SCALED = {
    "linear": {"rope_theta": 1000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 1000.0, "factor": 4.0},
    "llama3": {**TRAINED, "low_freq_factor": 0.5, "high_freq_factor": 2.0},
    "yarn": {**TRAINED, "beta_fast": 2.0, "beta_slow": 0.5},
    "longrope": {**TRAINED, **DIVISORS},
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair("llama", PAIRS[request.param])


class TestLlama(SameAsTransformers):
    pass


OTHERS = {
    "tied, one head of keys and values": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "a head of keys and values for each of queries": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name):
    pair = make_pair("llama", SIZES | OTHERS[name])
    assert pair[1].config.num_key_value_heads == OTHERS[name].get("num_key_value_heads")
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


def scaled_pair(rope_type: str):
    fields, ours = {"rope_parameters": {"rope_type": rope_type, **SCALED[rope_type]}}, {}
    if rope_type == "dynamic":  # to transformers, the longest context is the trained one
        fields["max_position_embeddings"] = 16
        ours["max_position_embeddings"] = 64
    return make_pair("llama", SIZES | {"num_key_value_heads": 2} | fields, **ours)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rope_type", SCALED)
def test_scaled_frequencies_beyond_the_trained_context(rope_type):
    pair = scaled_pair(rope_type)
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)
    theirs, ours = pair
    tokens = draw_tokens(ours)
    scaled = their_logits(theirs, tokens)
    plain = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(plain)
    assert np.abs(their_logits(theirs, tokens) - scaled).max() > 100 * LOGITS, "the scaling does nothing"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_by_length_are_those_of_each_document(rope_type):
    """transformers takes the longest row of a batch for all: alone, a row is what it is here among longer ones."""
    theirs, ours = scaled_pair(rope_type)
    tokens, lengths = draw_tokens(ours), np.array([40, 25, 12])
    right = ours.logits(tokens, lengths=lengths)
    shifted = np.stack([np.roll(row, 40 - length) for row, length in zip(tokens, lengths, strict=True)])
    left = ours.logits(shifted, segment_ids=(np.arange(40) >= 40 - lengths[:, None]).astype(int))
    for row, length in enumerate(lengths):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # forgets the lengths it has seen
        alone = their_logits(theirs, tokens[row : row + 1, :length])[0]
        np.testing.assert_allclose(right[row, :length], alone, rtol=0, atol=LOGITS)
        np.testing.assert_allclose(left[row, 40 - length :], alone, rtol=0, atol=LOGITS)

    tokens, segment_ids, _ = packed(ours)
    found = ours.logits(tokens, segment_ids=segment_ids)
    for start, end in ((0, 5), (5, 25), (25, 40)):  # 20 exceeds what was trained on, 5 and 15 do not
        alone = ours.logits(tokens[1:2, start:end])
        np.testing.assert_allclose(found[1:2, start:end], alone, rtol=0, atol=LOGITS)


EXPORTED = {
    "default": {"rope_theta": 500.0},
    **SCALED,
    "dynamic": TRAINED,
    "yarn": {**TRAINED, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    "longrope": {**TRAINED, **DIVISORS, "attention_factor": 1.3},
    # What transformers does not have goes out as what it has.
    "ntk": {"rope_theta": 1000.0, "factor": 4.0},
    "by_parts": {**TRAINED, "alpha": 0.5, "beta": 2.0},
    "by_parts_ntk": {**TRAINED, "alpha": 0.5, "beta": 2.0, "ntk_factor": 2.0},
}


@pytest.mark.parametrize("rope_type", EXPORTED)
def test_exported_config_is_understood_by_transformers(rope_type, monkeypatch):
    ours = Llama3Config(
        vocab_size=11,
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=17,
        hidden_act="gelu",
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": rope_type, **EXPORTED[rope_type]},
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=0.2,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(transformers.modeling_rope_utils.logger, name, pytest.fail)
    theirs = config_of_transformers(ours)
    back = config_from_hf(theirs.to_dict())
    if rope_type in ("ntk", "by_parts", "by_parts_ntk", "dynamic"):
        assert config_to_hf(back) == config_to_hf(ours)
    else:
        assert back == ours

    rotary = transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(40)[None])
    rotation = ours.rope_parameters.rotation(jnp.arange(40)[None], 8)
    np.testing.assert_allclose(rotation.cos, cos[..., :4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rotation.sin, sin[..., :4], rtol=0, atol=1e-5)


def test_the_original_s_weights_go_on_to_transformers():
    """With `attention_bias`, which makes its other biases zeros; the scaling goes out as `llama3` on another base."""
    golden = Golden("llama3_yarn_ntk", fields=lambda meta: original_fields(meta) | {"attention_bias": True})
    config = transformers.LlamaConfig(**config_to_hf(golden.config), bos_token_id=0, eos_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    state = {name: torch.tensor(array) for name, array in to_state_dict(golden.lm.variables, golden.config).items()}
    assert model.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]  # tied
    with torch.no_grad():
        logits = model(torch.tensor(golden["in/x"])).logits.numpy()
    np.testing.assert_allclose(logits, golden["out/logits"], rtol=0, atol=GOLDEN_LOGITS)
