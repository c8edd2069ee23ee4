"""Gemma 3 and Gemma 2 against transformers: rows longer than the window, depth not a multiple of the pattern."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert.parity_reference import randomise
from llmq_jax.interop import config_from_hf, from_state_dict, to_state_dict
from llmq_jax.layers.embedding import Embedding
from llmq_jax.layers.norms import ZeroCentredRMSNorm
from llmq_jax.models import build, init
from llmq_jax.models.gemma import GLOBAL, LOCAL, Gemma2Config, Gemma3Config
from tests.models.compiled import apply
from tests.parity.decoders import (
    LOGITS,
    SameAsTransformers,
    assert_same_logits,
    assert_same_loss_and_gradients,
    draw_tokens,
    make_pair,
    their_logits,
)
from tests.parity.references import config_of_transformers

SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 10,
    "intermediate_size": 56,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "pad_token_id": None,  # transformers gives the embedding of a padding token no gradient
}
GEMMA3 = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA2 = SIZES | {
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
EVERYTHING = {
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-2,
    "hidden_activation": "gelu",
    "num_key_value_heads": 4,
}
PAIRS = {
    "gemma 3": ("gemma3_text", GEMMA3 | {"num_key_value_heads": 1}),
    "gemma 2": ("gemma2", GEMMA2 | {"num_key_value_heads": 2}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair(*PAIRS[request.param])


class TestGemma(SameAsTransformers):
    pass


PATTERN = {"num_hidden_layers": 8, "layer_types": None}  # every sixth is global
OTHERS = {
    "gemma 3, its pattern, two heads of keys": ("gemma3_text", GEMMA3 | PATTERN | {"num_key_value_heads": 2}),
    # Every field away from its default.
    "gemma 3, everything": ("gemma3_text", GEMMA3 | EVERYTHING | {"final_logit_softcapping": 4.0}),
    "gemma 2, everything": ("gemma2", GEMMA2 | EVERYTHING),
    "gemma 2, all global": ("gemma2", GEMMA2 | {"layer_types": [GLOBAL] * 3}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name):
    pair = make_pair(*OTHERS[name])
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model_type", "fields"), [("gemma3_text", GEMMA3), ("gemma2", GEMMA2)])
def test_every_part_is_seen(model_type, fields):
    """With a part changed on our side alone logits differ by far more than the tolerance: the sizes hide none."""
    theirs, ours = make_pair(model_type, fields)
    tokens = draw_tokens(ours)
    expected = their_logits(theirs, tokens)
    if model_type == "gemma3_text":
        changes = [
            {"sliding_window": 6},
            {"sliding_window": 4},
            {"rope_parameters": {"rope_theta": 1000.0}},
            {"local_rope_parameters": {"rope_theta": 110.0}},
        ]
    else:
        changes = [
            {"layer_types": ours.config.layer_kinds[1:] + ours.config.layer_kinds[:1]},
            {"query_pre_attn_scalar": 10},
            {"hidden_activation": "gelu"},
            {"attn_logit_softcapping": 3.5},
            {"final_logit_softcapping": 4.5},
        ]
    for change in changes:
        config = ours.config.__class__(**{**vars(ours.config), **change})
        if change.keys() == {"layer_types"}:  # the leaves stand elsewhere
            variables = from_state_dict(to_state_dict(ours.variables, ours.config), config)
        else:
            variables = ours.variables
        found = ours.replace(config=config, variables=variables).logits(tokens)
        assert np.abs(found - expected).max() > 10 * LOGITS, change


def test_norm_is_that_of_gemma():
    """Also in bfloat16, where the order of scaling and rounding shows."""
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm(24, eps=1e-3)
    rng = np.random.default_rng(0)
    scale, x = rng.standard_normal(24, np.float32), 0.1 * rng.standard_normal((50, 24), np.float32)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(scale))
        wide = norm(torch.tensor(x)).numpy()
        narrow = norm.bfloat16()(torch.tensor(x).bfloat16()).float().numpy()
    ours = ZeroCentredRMSNorm(1e-3)
    variables = {"params": {"scale": jnp.asarray(scale)}}
    np.testing.assert_allclose(ours.apply(variables, jnp.asarray(x)), wide, rtol=1e-6, atol=1e-6)
    variables = {"params": {"scale": jnp.asarray(scale, jnp.bfloat16)}}
    found = ours.apply(variables, jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), narrow)


@pytest.mark.parametrize(
    ("width", "wide", "narrow"), [(3072, 55.42562484741211, 55.5), (1152, 33.94112, 34.0), (640, 25.298222, 25.25)]
)
def test_embeddings_grow_by_the_root_of_the_width_in_their_own_type(width, wide, narrow):
    theirs = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(7, width, None, width**0.5)
    table = np.random.default_rng(0).standard_normal((7, width), np.float32)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(table))
        theirs = theirs.bfloat16()
        expected = theirs(torch.arange(7)).float().numpy()
    ours = Embedding(7, width, scale=width**0.5)
    for dtype, factor in ((jnp.float32, wide), (jnp.bfloat16, narrow)):
        ones = {"params": {"embedding": jnp.ones((7, width), dtype)}}
        np.testing.assert_allclose(ours.apply(ones, jnp.arange(1)).astype(jnp.float32), factor, rtol=1e-6)
        np.testing.assert_allclose(ours.apply(ones, jnp.ones((1, width), dtype), method="logits"), width)  # the head
    variables = {"params": {"embedding": jnp.asarray(table, jnp.bfloat16)}}
    np.testing.assert_array_equal(ours.apply(variables, jnp.arange(7)).astype(jnp.float32), expected)
    computed = ours.clone(dtype=jnp.bfloat16).apply({"params": {"embedding": jnp.asarray(table)}}, jnp.arange(7))
    np.testing.assert_array_equal(computed, jnp.asarray(table * np.float32(width**0.5), jnp.bfloat16))


@pytest.mark.parametrize(
    ("config_class", "theirs"),
    [(Gemma3Config, transformers.Gemma3TextConfig), (Gemma2Config, transformers.Gemma2Config)],
)
def test_kinds_of_layers_for_any_number_are_those_of_transformers(config_class, theirs):
    for layers in (5, 13):
        read = config_from_hf(theirs(num_hidden_layers=layers).to_dict())
        assert read == config_class(num_hidden_layers=layers)
        assert list(read.layer_kinds) == theirs(num_hidden_layers=layers).layer_types


ROPES = {
    "linear": {"rope_theta": 1000.0, "factor": 8.0},
    "yarn": {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("config_class", "rope_type"), [(Gemma3Config, "linear"), (Gemma2Config, "yarn"), (Gemma3Config, "dynamic")]
)
def test_exported_models_are_those_of_transformers(config_class, rope_type, tmp_path):
    """Fields away from their defaults, and the logits of what transformers makes of the export."""
    local = {"local_rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}}
    fields = {name: value for name, value in SIZES.items() if name != "pad_token_id"}
    ours = config_class(
        **fields,
        **(local if config_class is Gemma3Config else {"attn_logit_softcapping": 3.0}),
        num_hidden_layers=3,
        num_key_value_heads=2,
        layer_types=(GLOBAL, LOCAL, GLOBAL),
        rope_parameters={"rope_type": rope_type, **ROPES[rope_type]},
        hidden_activation="gelu",
        rms_norm_eps=1e-3,
        final_logit_softcapping=4.0,
        attention_bias=True,
        attention_dropout=0.2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    theirs = config_of_transformers(ours)
    assert config_from_hf(theirs.to_dict()) == ours

    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
    randomise(model)
    state = to_state_dict(init(ours, seed=3), ours)
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    tokens = np.random.default_rng(0).integers(0, 101, (2, 40))
    found = apply(build(ours), from_state_dict(state, ours), tokens)
    np.testing.assert_allclose(found, their_logits(model, tokens), rtol=0, atol=LOGITS)
