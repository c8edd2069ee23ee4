"""config.json, read and written."""

import warnings

import pytest

from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.models.gpt2 import GPT2Config

# The config.json of the hub's gpt2, written years ago and never changed.
ORIGINAL = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_original_file():
    assert config_from_hf(ORIGINAL) == GPT2Config()


def test_there_and_back():
    config = GPT2Config(
        vocab_size=13, hidden_size=20, num_attention_heads=5, num_hidden_layers=3, intermediate_size=7,
        max_position_embeddings=9, attn_pdrop=0.0, tie_word_embeddings=False, activation_function="gelu",
    )  # fmt: skip
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("inner", [{}, {"n_inner": None}, {"n_inner": 80}])
def test_inner_width_defaults_to_four_times_the_width(inner):
    assert config_from_hf({"model_type": "gpt2", "n_embd": 20, "n_head": 5, **inner}).mlp_width == 80


def test_our_names_are_read_too():
    """transformers' GPT2Config has them as other names of the same fields."""
    config = config_from_hf({"model_type": "gpt2", "hidden_size": 20, "num_attention_heads": 5})
    assert (config.hidden_size, config.num_attention_heads) == (20, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("activation_function", "relu"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(field, value):
    with pytest.raises(BadInput, match=field) as caught:
        config_from_hf({**ORIGINAL, field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("reorder_and_upcast_attn", True), ("use_cache", False), ("pruned_heads", {}), ("dtype", "x")]
)
def test_what_does_not_is_passed_over(field, value):
    assert config_from_hf({**ORIGINAL, field: value}) == GPT2Config()


@pytest.mark.parametrize(
    ("theirs", "ours"), [("gelu_fast", "gelu_new"), ("gelu_python", "gelu"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh")]
)
def test_spellings_of_gelu(theirs, ours):
    assert config_from_hf({**ORIGINAL, "activation_function": theirs}).activation_function == ours


def test_unknown_fields_are_named_in_one_warning():
    with pytest.warns(UserWarning, match="unknown fields are ignored: frobnicate, zap") as caught:
        config_from_hf({**ORIGINAL, "zap": 1, "frobnicate": 2})
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("value", ["768", 768.0, None, True])
def test_a_value_of_another_type(value):
    with pytest.raises(BadInput, match=r"n_embd=.* is not of the type int"):
        config_from_hf({**ORIGINAL, "n_embd": value})


def test_values_that_do_not_fit_together():
    with pytest.raises(BadInput, match="num_attention_heads=7 must divide hidden_size=768"):
        config_from_hf({**ORIGINAL, "n_head": 7})


def test_unknown_architecture():
    with pytest.raises(BadInput, match="model_type 'bert' is not supported; supported: gpt2"):
        config_from_hf({"model_type": "bert"})
    with pytest.raises(BadInput, match="no model_type"):
        config_from_hf({})
