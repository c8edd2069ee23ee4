"""Mixtral and Qwen 3 with experts against transformers: what decoders have in common, dispatch, the balance loss."""

import jax
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.interop import config_from_hf, to_state_dict
from llmq_jax.layers.expert_balance import all_layers, balance_losses
from llmq_jax.models import build, override
from llmq_jax.models.mixtral import MixtralConfig
from llmq_jax.models.qwen import Qwen3MoeConfig
from llmq_jax.objectives.next_token import NextToken
from tests.parity.decoders import (
    LOGITS,
    LOSS,
    SameAsTransformers,
    assert_same_logits,
    assert_same_loss_and_gradients,
    batches,
    draw_tokens,
    make_pair,
    their_logits,
)
from tests.parity.references import assert_same_gradients, config_of_transformers, numpy_gradients

SIZES = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 4,
}
# Every field away from its default; heads are wider than 24 / 6.
OTHERS = {
    "vocab_size": 97,
    "max_position_embeddings": 48,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 40,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-2,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "tie_word_embeddings": True,
    "num_local_experts": 7,
    "num_experts_per_tok": 3,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
QWEN = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
# Widths are multiples of 8: torch multiplies the experts' matrices in bfloat16 only then.
PAIRS = {
    "three of seven": ("mixtral", OTHERS | {"sliding_window": 7}),
    # Weights that add up to less than 1, and a dense layer between two with experts.
    "qwen 3": ("qwen3_moe", SIZES | QWEN | {"num_hidden_layers": 3, "head_dim": 10, "mlp_only_layers": [1]}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return make_pair(*PAIRS[request.param])


class TestMixtral(SameAsTransformers):
    pass


OTHER_PAIRS = {
    "mixtral, two of four": ("mixtral", SIZES),
    "qwen 3, everything": (
        "qwen3_moe",
        OTHERS | QWEN | WINDOW | {"norm_topk_prob": True, "attention_bias": True, "decoder_sparse_step": 2},
    ),
    "qwen 3, every second layer but one": (
        "qwen3_moe",
        SIZES | QWEN | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [0, 5]},
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHER_PAIRS)
def test_other_configs(name):
    pair = make_pair(*OTHER_PAIRS[name])
    assert_same_logits(pair)
    assert_same_loss_and_gradients(pair)


def test_choices_are_spread_and_clear(pair):
    """What the others rely on: every expert has its tokens, and rounding decides nowhere which it is."""
    theirs, ours = pair
    top_k, experts = ours.config.num_experts_per_tok, ours.config.num_local_experts
    tokens = draw_tokens(ours)
    with torch.no_grad():
        routed = theirs(input_ids=torch.tensor(tokens), output_router_logits=True).router_logits
    for logits in routed:
        best = np.sort(logits.numpy(), axis=-1)[:, ::-1]
        assert (best[:, top_k - 1] - best[:, top_k]).min() > 10 * LOGITS
        chosen = np.argsort(logits.numpy(), axis=-1)[:, -top_k:]
        assert np.bincount(chosen.ravel(), minlength=experts).min() > tokens.size * top_k / experts / 20


@pytest.mark.parametrize(
    ("pair", "dispatch"),
    [("three of seven", "dense"), ("three of seven", "blocks"), ("qwen 3", "ragged")],
    indirect=["pair"],
)
def test_every_dispatch(pair, dispatch):
    theirs, ours = pair
    tokens = draw_tokens(ours)
    config = ours.config
    # Written out, these are the experts that the config has: no weight changes.
    experts = override(config.usual_experts, dispatch=dispatch)
    model = build(override(config, experts=experts))
    expected = their_logits(theirs, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(ours.variables, tokens), expected, rtol=0, atol=LOGITS)


COEFFICIENT = 0.5  # as much of the gradients as the rest


@pytest.mark.parametrize(
    ("pair", "kind"), [("three of seven", "plain"), ("qwen 3", "right padding")], indirect=["pair"]
)
def test_loss_and_gradients_with_the_balance_loss(pair, kind):
    theirs, ours = pair
    tokens, labels, their_inputs, our_inputs = batches(ours)[kind]
    theirs.zero_grad()
    theirs.router_aux_loss_coef = COEFFICIENT
    inputs = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in their_inputs.items()}
    expected = theirs(
        input_ids=torch.tensor(tokens),
        labels=torch.tensor(labels),
        output_router_logits=True,
        use_cache=False,
        **inputs,
    )
    expected.loss.backward()

    targets = np.append(labels[:, 1:], np.full_like(labels[:, :1], -100), axis=1)
    batch = {
        "tokens": tokens,
        "targets": np.maximum(targets, 0),
        "mask": (targets >= 0).astype(np.float32),
        **{name: value.astype(np.int32) for name, value in our_inputs.items()},
    }
    model = build(override(ours.config, router_aux_loss_coef=COEFFICIENT))
    objective, experts = NextToken(model), model.experts

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(variables, batch):
        next_token, _, _ = objective.loss(variables, batch, objective.weights(batch))
        output = model.apply(
            variables, batch["tokens"], batch.get("positions"), batch.get("segment_ids"), method="forward"
        )
        balance = balance_losses(all_layers(output.counts), experts.balance, experts.top_k)["load_balance"]
        return next_token + experts.balance.load_balance * balance

    loss, gradients = loss_and_gradients(ours.variables, batch)
    assert abs(float(loss) - expected.loss.item()) < LOSS
    found = to_state_dict(gradients, ours.config)
    assert_same_gradients(found, numpy_gradients(theirs, found))
    assert expected.aux_loss.item() > 0.1


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
def test_exported_config_is_understood_by_transformers(config_class):
    own = {
        "attention_bias": True,
        "moe_intermediate_size": 9,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": (3,),
    }
    ours = config_class(
        vocab_size=11,
        max_position_embeddings=64,
        hidden_size=20,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=17,
        hidden_act="gelu",
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        attention_dropout=0.2,
        initializer_range=0.5,
        tie_word_embeddings=True,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=7,
        router_aux_loss_coef=0.25,
        **own if config_class is Qwen3MoeConfig else {},
    )
    theirs = config_of_transformers(ours, "head_dim")
    assert config_from_hf(theirs.to_dict()) == ours
    # And of such sizes, whose heads are not hidden_size / num_attention_heads wide, a model.
    transformers.AutoModelForCausalLM.from_config(theirs)
