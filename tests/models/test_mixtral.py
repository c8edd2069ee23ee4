import dataclasses

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import build, fields_from_text, init, override, preset
from llmq_jax.models.mixtral import MixtralConfig
from tests.models.compiled import apply
from tests.weights import draw_variables

SIZES = {
    "vocab_size": 31,
    "max_position_embeddings": 32,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 10,
}
TINY = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
EXPERTS = lq.Experts(4, 2, first_layer=1, num_shared=1, selection_bias=True)
OTHERS = {
    "gpt2": lq.GPT2Config(**SIZES, experts=EXPERTS),
    "llama": lq.Llama3Config(**SIZES, experts=EXPERTS),
    "gemma": lq.Gemma3Config(
        **SIZES,
        num_key_value_heads=1,
        head_dim=6,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        experts=EXPERTS,
    ),
}


def test_the_experts_are_those_of_transformers_fields():
    assert build(TINY).experts == lq.Experts(
        4, 2, balance=lq.Balance(load_balance=0.001, pooled=True, divide_by_top_k=False)
    )
    assert build(override(TINY, num_local_experts=6, router_aux_loss_coef=0.0)).experts == lq.Experts(6, 2)
    own = lq.Experts(4, 2, dispatch="dense")
    assert build(override(TINY, experts=own)).experts == own


def test_a_dict_changes_what_the_fields_tell():
    config = override(TINY, router_aux_loss_coef=0.5, experts={"dispatch": "ragged", "num_shared": 1})
    expected = dataclasses.replace(override(TINY, router_aux_loss_coef=0.5).classic_experts, dispatch="ragged")
    assert build(config).experts == dataclasses.replace(expected, num_shared=1)


def test_the_sizes_of_mixtral_8x7b():
    shapes = jax.eval_shape(lambda: init(preset("mixtral-8x7b")))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 46_702_792_704
    active = build(preset("mixtral-8x7b")).experts
    assert (active.num_experts, active.top_k) == (8, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_any_decoder_takes_experts_from_a_layer_on(config):
    variables, model = draw_variables(config, seed=1), build(config)
    blocks = [
        block for group in variables["params"].items() if group[0].startswith("group") for block in group[1].items()
    ]
    with_experts = sum("moe" in block for _, block in blocks)
    assert with_experts and with_experts < len(blocks)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 20))
    whole = apply(model, variables, tokens)
    written_out = apply(build(config, scan_layers=False), variables, tokens)
    np.testing.assert_allclose(written_out, whole, atol=1e-5)
    dense = build(dataclasses.replace(config, experts=dataclasses.replace(EXPERTS, dispatch="dense")))
    np.testing.assert_allclose(apply(dense, variables, tokens), whole, atol=1e-5)
    # Decoding goes through the experts one token at a time.
    lm = lq.LanguageModel(config, model, variables)
    found = lq.generate(lm, tokens[:, :4].tolist(), max_new_tokens=8, sampler=lq.Sampler(temperature=0.0), stop=())
    for row in range(2):
        text = np.concatenate([tokens[row, :4], found.tokens[row]])
        np.testing.assert_array_equal(apply(model, variables, text[None])[0, 3:-1].argmax(-1), found.tokens[row])


def test_a_model_with_experts_is_kept_and_read_again(tmp_path):
    config = OTHERS["llama"]
    variables = draw_variables(config)
    variables["router"] = jax.tree.map(lambda leaf: leaf + 0.25, variables["router"])
    lq.save(lq.LanguageModel(config, build(config), variables), tmp_path / "kept")
    again = lq.load(tmp_path / "kept")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)


def test_experts_from_the_command_line():
    fields = fields_from_text(lq.Llama3Config, ['experts={"num_experts": 4, "balance": {"router_z": 0.001}}'])
    config = override(preset("llama-10m"), **fields)
    assert config.experts == lq.Experts(4, balance=lq.Balance(router_z=0.001))
    (coefficient,) = fields_from_text(lq.MixtralConfig, ["router_aux_loss_coef=0"]).values()
    assert type(coefficient) is float  # JSON may write one without a point


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 9}, "top_k=9 is more than num_experts=8"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 must be at least 0"),
        (
            {"experts": {"num_experts": 4}},
            "experts has num_experts=4 and top_k=2, and num_local_experts .* say 8 and 2; change these",
        ),
        ({"experts": {"first_layer": 40}}, "first_layer=40 leaves no expert in 32 layers"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(BadInput, match=message):
        MixtralConfig(**fields)


def test_the_base_of_rope_is_mixtrals_where_none_is_said():
    assert MixtralConfig(rope_parameters={}).rope_parameters == TINY.rope_parameters
    assert TINY.rope_parameters.rope_theta == 1e6
    assert MixtralConfig(rope_parameters={"rope_theta": 500.0}).rope_parameters.rope_theta == 500.0
