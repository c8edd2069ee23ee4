"""Mistral, Ministral, Qwen 2 and Qwen 3, which are Llama with one change each, against transformers: all that decoders
have in common, with windows that are shorter than the rows; other configs; what is exported."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from llmq_jax.interop import config_from_hf
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load
from llmq_jax.models import build
from llmq_jax.models.config import GLOBAL, LOCAL
from llmq_jax.models.ministral import MinistralConfig
from llmq_jax.models.mistral import MistralConfig
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config
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
from tests.weights import draw_variables

SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FROM_THE_SECOND_LAYER_ON = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
PAIRS = {
    "mistral": ("mistral", SIZES | {"sliding_window": 7}),
    "qwen 2": ("qwen2", SIZES | FROM_THE_SECOND_LAYER_ON | {"rope_parameters": YARN}),
    "qwen 3": ("qwen3", SIZES | {"head_dim": 10, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair(*PAIRS[request.param])


class TestLlamaFamily(SameAsTransformers):
    pass


EVERYTHING = {
    "head_dim": 10,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": True,
}
IRREGULAR = {"use_sliding_window": True, "sliding_window": 7, "layer_types": [LOCAL, GLOBAL]}
OTHERS = {
    "mistral, no window": ("mistral", SIZES | EVERYTHING | {"sliding_window": None}),
    "ministral": ("ministral", SIZES | EVERYTHING | {"sliding_window": 7, "layer_types": [LOCAL, GLOBAL]}),
    "qwen 2, everything": ("qwen2", SIZES | EVERYTHING | IRREGULAR),
    "qwen 3, everything": ("qwen3", SIZES | EVERYTHING | IRREGULAR | {"attention_bias": True}),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERS)
def test_other_configs(name):
    pair = make_pair(*OTHERS[name])
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


@pytest.mark.parametrize("name", ["mistral", "qwen 2"])
def test_a_window_is_seen(name):
    """With another one on our side alone logits differ by far more than the tolerance: the rows hide none."""
    theirs, ours = make_pair(*PAIRS[name])
    tokens = draw_tokens(ours)
    expected = their_logits(theirs, tokens)
    for window in (6, 8):
        found = ours.replace(config=dataclasses.replace(ours.config, sliding_window=window)).logits(tokens)
        assert np.abs(found - expected).max() > 10 * LOGITS, window


@pytest.mark.parametrize("config_class", [MistralConfig, MinistralConfig, Qwen2Config, Qwen3Config])
def test_exported_models_are_those_of_transformers(config_class, tmp_path):
    """Fields away from their defaults, and the logits of what transformers makes of the folder."""
    fields = {} if config_class is MistralConfig else {"layer_types": (GLOBAL, LOCAL)}
    ours = config_class(
        **SIZES,
        **EVERYTHING | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
        **fields | ({"attention_bias": True} if config_class is Qwen3Config else {}),
        sliding_window=7,
        attention_dropout=0.2,
        initializer_range=0.2,
    )
    # Qwen 2's config does not declare head_dim, which its model reads.
    theirs = config_of_transformers(ours, "head_dim")
    assert config_from_hf(theirs.to_dict()) == ours

    lm = LanguageModel(ours, build(ours), draw_variables(ours, seed=3))
    folder = save_hf(lm, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(model).__name__ == theirs.architectures[0]
    tokens = draw_tokens(lm)
    np.testing.assert_allclose(lm.logits(tokens), their_logits(model, tokens), rtol=0, atol=LOGITS)

    # And back, from what transformers writes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    assert back.config == ours
    np.testing.assert_allclose(back.logits(tokens), their_logits(model, tokens), rtol=0, atol=10 * LOGITS)


def test_a_ministral_without_local_layers_is_exported_with_a_window():
    """transformers' model makes the mask of local layers even where there are none, and fails without a window."""
    ours = MinistralConfig(**SIZES, sliding_window=None)
    theirs = config_of_transformers(ours)
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
    assert np.isfinite(their_logits(model, np.arange(40)[None])).all()
    assert config_from_hf(theirs.to_dict()) == ours
