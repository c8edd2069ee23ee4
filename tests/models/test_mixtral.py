import dataclasses

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import build, fields_from_text, init, override, preset
from llmq_jax.models.mixtral import MixtralConfig
from llmq_jax.models.qwen import Qwen3MoeConfig
from llmq_jax.training.run_config import differences
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
QWEN = Qwen3MoeConfig(
    **SIZES, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
)
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


def test_a_run_from_before_dense_layers_goes_on():
    """What an older version did not know of is the same as what is not used."""
    now = dataclasses.asdict(override(TINY, experts=lq.Experts(4, 2, dense_layers=[])))
    before = {**now, "experts": {name: value for name, value in now["experts"].items() if name != "dense_layers"}}
    assert differences(before, now) == []


def test_a_dict_changes_what_the_fields_tell():
    config = override(TINY, router_aux_loss_coef=0.5, experts={"dispatch": "ragged", "num_shared": 1})
    expected = dataclasses.replace(override(TINY, router_aux_loss_coef=0.5).usual_experts, dispatch="ragged")
    assert build(config).experts == dataclasses.replace(expected, num_shared=1)


def test_the_experts_of_qwen_are_those_of_transformers_fields():
    balance = lq.Balance(load_balance=0.001, pooled=True, divide_by_top_k=False)
    assert build(QWEN).experts == lq.Experts(4, 2, 8, renormalise=False, balance=balance)
    assert build(override(QWEN, norm_topk_prob=True, mlp_only_layers=[1])).experts == lq.Experts(
        4, 2, 8, dense_layers=(1,), balance=balance
    )
    # They follow the number of layers.
    every_third = override(QWEN, decoder_sparse_step=3)
    assert build(every_third).experts.dense_layers == (0, 1)
    assert build(override(every_third, num_hidden_layers=6)).experts.dense_layers == (0, 1, 3, 4)


@pytest.mark.parametrize(
    ("name", "parameters", "experts"),
    [("mixtral-8x7b", 46_702_792_704, (8, 2)), ("qwen3-30b-a3b", 30_532_122_624, (128, 8))],
)
def test_the_published_sizes(name, parameters, experts):
    shapes = jax.eval_shape(lambda: init(preset(name)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    active = build(preset(name)).experts
    assert (active.num_experts, active.top_k) == experts


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
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_local_experts=4"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers=\(3,\) must be numbers of the 3 layers, counted from 0"),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
            r"decoder_sparse_step=2 and mlp_only_layers=\[1\] leave no layer with experts; that is a Qwen3Config",
        ),
        ({"experts": {"dense_layers": [0, 1, 2]}}, r"first_layer=0 and dense_layers=\[0, 1, 2\] leaves no expert in 3"),
        ({"experts": {"dense_layers": [-1]}}, r"dense_layers=\[-1\] must be numbers of the 3 layers, counted from 0"),
    ],
)
def test_bad_input_of_qwen(fields, message):
    with pytest.raises(BadInput, match=message):
        override(QWEN, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
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


def test_two_balances_at_once_contradict_each_other():
    for name, own in ("mixtral-10m", {"router_aux_loss_coef": 0.1}), ("deepseek-10m", {"balance": {"sequence": 0.1}}):
        for experts in ({"balance": {"router_z": 0.1}}, {"balance": None}):
            with pytest.raises(BadInput, match=f"{next(iter(own))}=.* has no effect beside experts"):
                preset(name, **own, experts=experts)
        assert preset(name, **own, experts={"dispatch": "dense"}).experts.balance is not None
    assert preset("mixtral-10m", router_aux_loss_coef=0.0, experts={"balance": {"router_z": 0.1}}).experts.balance


def test_the_base_of_rope_is_mixtrals_where_none_is_said():
    assert MixtralConfig(rope_parameters={}).rope_parameters == TINY.rope_parameters
    assert TINY.rope_parameters.rope_theta == 1e6
    assert MixtralConfig(rope_parameters={"rope_theta": 500.0}).rope_parameters.rope_theta == 500.0
