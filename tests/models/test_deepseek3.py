import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.layers.experts_apart import by_expert
from llmq_jax.layers.latent_attention import attend_to_latents
from llmq_jax.layers.linear import by_output
from llmq_jax.models import abstract_variables, build, fields_from_text, init, override, preset
from llmq_jax.models.decoder import slice_modules
from llmq_jax.models.deepseek3 import PAPER_BALANCE, DeepSeekV3Config
from llmq_jax.training.roles import roles
from tests.weights import draw_variables

TINY = DeepSeekV3Config(
    vocab_size=29,
    max_position_embeddings=32,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=7,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=11,
    intermediate_size=20,
    first_k_dense_replace=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    n_group=3,
    topk_group=2,
    num_nextn_predict_layers=2,
    initializer_range=0.2,
    rope_parameters={
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 8,
    },
)
CONFIGS = {
    "compressed queries": TINY,
    "compressed queries, biases, half-split": override(
        TINY, attention_bias=True, attention_up_bias=True, rope_interleave=False
    ),
    "direct queries, biases": override(TINY, q_lora_rank=None, attention_bias=True, attention_up_bias=True),
}
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 14)).astype(np.int32)


drawn = cache(partial(draw_variables, seed=1))


@partial(jax.jit, static_argnums=0)
def whole_pass(model, variables, dropout=None):
    """Over TOKENS, of the model and its modules."""
    rngs = None if dropout is None else {"dropout": dropout}
    return model.apply(variables, TOKENS, method="forward_and_ahead", rngs=rngs)


@partial(jax.jit, static_argnums=0)
def prefill(model, variables, tokens, segment_ids, caches):
    return model.apply(variables, tokens, None, segment_ids, caches, method="forward")


@partial(jax.jit, static_argnums=0)
def decode(model, outside, layers, tokens, positions, caches):
    output = model.decode(outside, layers, tokens, positions, caches)
    return output.hidden, output.caches


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """(model, variables, its pass over TOKENS and what its modules give for them)."""
    config = CONFIGS[request.param]
    model, variables = build(config), drawn(config)
    return model, variables, *whole_pass(model, variables)


@pytest.fixture(scope="module")
def variables():
    return drawn(TINY)


def count(config, collection="params"):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(config).get(collection, {})))


@pytest.mark.parametrize(
    ("name", "parameters", "with_a_module"),
    [
        ("deepseek-v3", 671_026_404_352, 682_636_472_320),  # the published 671B
        ("moonlight-16b", 15_960_108_544, 16_553_351_168),
        ("deepseek-10m", 8_977_920, 11_801_536),
    ],
)
def test_presets_have_the_published_sizes(name, parameters, with_a_module):
    assert count(preset(name, num_nextn_predict_layers=0)) == parameters
    config = preset(name, num_nextn_predict_layers=1)
    assert count(config) == with_a_module
    layers = config.num_hidden_layers - config.first_k_dense_replace + 1
    assert count(config, "router") == layers * config.n_routed_experts


def test_what_the_presets_are():
    assert preset("deepseek-v3") == DeepSeekV3Config(
        max_position_embeddings=163840, rope_parameters=preset("deepseek-v3").rope_parameters
    )
    assert preset("deepseek-v3").num_nextn_predict_layers == preset("deepseek-10m").num_nextn_predict_layers == 1
    assert preset("moonlight-16b").num_nextn_predict_layers == 0
    # YaRN's temperature is in the scale: (0.1 ln 40 + 1)² / sqrt(128 + 64).
    assert preset("deepseek-v3").score_scale == pytest.approx(1.3688879**2 / 192**0.5, rel=1e-6)
    assert preset("moonlight-16b").score_scale == 192**-0.5


def test_the_experts_are_those_of_the_fields():
    assert build(TINY).experts == lq.Experts(
        6,
        2,
        intermediate_size=8,
        first_layer=1,
        num_shared=1,
        score="sigmoid",
        scaling_factor=2.5,
        selection_bias=True,
        num_groups=3,
        top_groups=2,
        balance=lq.Balance(bias_rate=0.001, sequence=0.0001),
    )
    own = lq.Experts(6, 2, dispatch="dense")
    assert build(override(TINY, experts=own)).experts == own
    # A dict changes what the fields tell.
    changed = build(override(TINY, experts={"dispatch": "dense"})).experts
    assert changed == dataclasses.replace(build(TINY).experts, dispatch="dense")
    fields = fields_from_text(DeepSeekV3Config, ['balance={"device": 0.1, "devices": 3}', "n_group=null"])
    config = override(TINY, **fields, topk_group=None)
    assert config.balance == lq.Balance(device=0.1, devices=3)
    assert (config.n_group, config.topk_group) == (1, 1)
    # As many devices as the experts have, whatever their default number is.
    assert DeepSeekV3Config(balance={"device": 0.1, "devices": 16}).balance.devices == 16


def test_without_a_layer_of_experts_all_are_dense():
    config = override(TINY, first_k_dense_replace=5)
    shapes = abstract_variables(config)
    assert shapes.keys() == {"params"} and build(config).experts is None
    blocks = [shapes["params"][group]["block_0"] for group in ("group_0", "mtp")]
    assert all("mlp" in block and "moe" not in block for block in blocks)
    assert override(config, n_group=5).n_group == 5  # of what there is not, nothing is checked
    with pytest.raises(BadInput, match=r"balance=.* has no effect on a model without experts"):
        override(config, balance={"load_balance": 0.1})


def test_initialisation():
    config = override(TINY, vocab_size=2000, hidden_size=64, initializer_range=0.02)
    variables = init(config)
    params, module = variables["params"], variables["params"]["mtp"]["block_0"]
    assert not np.any(jax.tree.leaves(variables["router"])[0])
    for kernel in (params["token_embedding"]["embedding"], module["projection"]["kernel"], module["moe"]["up_kernel"]):
        assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.05)
    kernel = module["projection"]["kernel"]
    assert kernel.shape == (2, 128, 64) and not np.allclose(kernel[0], kernel[1])
    norms = ("embedding_norm", "hidden_norm", "attention_norm", "mlp_norm", "final_norm")
    assert all((module[name]["scale"] == 1).all() for name in norms)


@pytest.mark.exhaustive
def test_a_laptop_s_preset_starts_from_chance():
    config = preset("deepseek-10m", num_hidden_layers=2)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 16)).astype(np.int32)
    variables = init(config)
    logits = jax.jit(build(config, dtype="bfloat16").apply)(variables, tokens)
    losses = -jax.nn.log_softmax(logits[:, :-1])
    loss = jnp.take_along_axis(losses, tokens[:, 1:, None], axis=-1).mean()
    assert float(loss) == pytest.approx(np.log(257), abs=0.3)


def test_a_model_is_kept_and_read_again(variables, tmp_path):
    config = override(TINY, mtp_hidden="before_norm", balance={"bias_rate": 0.5})
    lm = lq.LanguageModel(config, build(config), variables)
    lq.save(lm, tmp_path / "kept")
    again = lq.load(tmp_path / "kept")
    assert again.config == config
    assert variables["router"].keys() == {"group_1", "mtp"}
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)
    for found, expected in zip(again.mtp_logits(TOKENS), lm.mtp_logits(TOKENS), strict=True):
        np.testing.assert_array_equal(found, expected)
    # A bias that moves by thousandths keeps its type.
    narrow = lq.load(tmp_path / "kept", dtype="bfloat16").variables
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow["router"])} == {jnp.dtype("float32")}


# Decoding.


@pytest.mark.parametrize(
    ("case", "arrange"),
    list(zip(CONFIGS, (lambda tree: tree, by_output, lambda tree: by_expert(by_output(tree))), strict=True)),
    indirect=["case"],
    ids=CONFIGS,
)
def test_absorbed_decoding_equals_the_expanded_pass(case, arrange):
    """From unequal prompts, in pieces of several tokens and of one."""
    model, variables, whole, _ = case
    outside, layers = model.slice_layers(variables, arrange)
    prompts = model.create_caches(2, 8, jnp.float32)
    output = prefill(model, variables, TOKENS[:, :8], None, prompts)
    np.testing.assert_allclose(output.hidden, whole.hidden[:, :8], atol=1e-5)
    caches = tuple(cache.extend(14) for cache in model.slice_caches(output.caches))
    starts = np.array([5, 8])
    for size in (1, 4, 1):
        positions = starts[:, None] + np.arange(size)
        rows = np.arange(2)[:, None]
        hidden, caches = decode(model, outside, layers, TOKENS[rows, positions], positions, caches)
        np.testing.assert_allclose(hidden, whole.hidden[rows, positions], atol=1e-4)
        starts = starts + size


def test_latents_are_attended_to_on_a_gpu_as_on_a_cpu(monkeypatch):
    draw = np.random.default_rng(0).standard_normal
    query, latents = (jnp.asarray(draw(shape), jnp.float32) for shape in ((2, 3, 4, 5), (2, 7, 5)))
    given = query, latents, jnp.asarray(draw((2, 3, 7)) < 1), 0.4
    expected = attend_to_latents(*given)
    monkeypatch.setattr("llmq_jax.layers.latent_attention.target_platform", lambda: "gpu")
    np.testing.assert_allclose(attend_to_latents(*given), expected, atol=1e-6)


def test_a_row_s_padding_is_not_written(case):
    """Prompts padded on the left and on the right, where positions begin again, then one piece."""
    model, variables, whole, _ = case
    real = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    tokens = np.stack([np.append([0, 0, 0], TOKENS[0, :5]), TOKENS[1, :8]]).astype(np.int32)
    caches = model.create_caches(2, 14, jnp.float32)
    caches = prefill(model, variables, tokens, real.astype(np.int32), caches).caches
    outside, layers = model.slice_layers(variables)
    positions = np.array([[5], [6]]) + np.arange(4)
    rows = np.arange(2)[:, None]
    hidden, _ = decode(model, outside, layers, TOKENS[rows, positions], positions, model.slice_caches(caches))
    np.testing.assert_allclose(hidden, whole.hidden[rows, positions], atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["compressed queries, biases, half-split"], indirect=True)
def test_modules_decode_as_they_look_ahead(case):
    """The first tokens at once, into empty caches; the others in pieces, absorbed."""
    model, variables, output, ahead = case
    outside, _ = model.slice_layers(variables)
    modules = slice_modules(variables, model.all_layer_paths()[model.config.num_hidden_layers :])
    caches = list(model.create_ahead_caches(2, 12, jnp.float32))
    decode = jax.jit(model.decode_ahead)
    segments, start = np.ones((2, 12), np.int32), 0
    for end in (6, 9, 10, 12):
        fed = output.hidden[:, start:end]
        positions = np.broadcast_to(np.arange(start, end), (2, end - start))
        for depth, module in enumerate(modules):
            seen = TOKENS[:, start + depth + 1 : end + depth + 1]
            arguments = (jnp.asarray(x) for x in (seen, positions, segments[:, start:end]))
            hidden, fed, caches[depth] = decode(outside, module, fed, *arguments, caches[depth])
            np.testing.assert_allclose(hidden, ahead.hidden[depth, :, start:end], atol=1e-4)
        start = end


def test_what_a_cache_holds(case):
    """The latent and the rotated key that all heads share: 11 numbers a token and layer, not 3 · (9 + 11)."""
    model, *_ = case
    caches = model.create_caches(2, 10, jnp.bfloat16)
    leaves = jax.tree.leaves(caches)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert sum(leaf.size for leaf in leaves) == 3 * 2 * 10 * (7 + 4)
    assert [cache.latents.shape for cache in model.create_ahead_caches(2, 10, jnp.float32)] == [(2, 10, 11)] * 2
    big = build(preset("deepseek-v3"))
    assert sum(leaf.size for leaf in jax.tree.leaves(big.create_caches(1, 1, jnp.bfloat16))) == 61 * (512 + 64)


# Ways to run it.


def value_and_gradient(model, variables):
    """Of the model and its modules."""

    @jax.jit
    @jax.value_and_grad
    def compute(variables):
        output, ahead = model.apply(variables, TOKENS, method="forward_and_ahead")
        return jnp.square(output.hidden - 0.3).mean() + jnp.square(ahead.hidden + 0.7).mean()

    return compute(variables)


@pytest.fixture(scope="module")
def expected(variables):
    return value_and_gradient(build(TINY), variables)


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_ways_to_run_the_layers_agree(variables, expected, options):
    """Forward and back."""
    found = value_and_gradient(build(TINY, **options), variables)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-5), found, expected)


def test_dropout_is_of_attention_weights(variables):
    model = build(override(TINY, attention_dropout=0.5))
    plain, found = (whole_pass(m, variables)[0].hidden for m in (build(TINY), model))
    np.testing.assert_array_equal(found, plain)
    first, second = (whole_pass(model, variables, jax.random.key(seed))[0].hidden for seed in (0, 1))
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3


def test_dynamic_tanh_in_the_place_of_the_norm():
    """Of all but the latents; embeddings have their factor for the modules too."""
    config = override(TINY, norm="dyt")
    variables = drawn(config)
    params = variables["params"]
    module = params["mtp"]["block_0"]
    names = ("embedding_norm", "hidden_norm", "attention_norm", "mlp_norm", "final_norm")
    for norm in (params["final_norm"], *(module[name] for name in names)):
        assert norm.keys() == {"alpha", "scale", "bias"}
    assert module["attention"]["latent_norm"].keys() == {"scale"}
    assert params["embedding_scale"]["scale"].shape == ()
    loss, grads = value_and_gradient(build(config), variables)
    assert np.isfinite(loss)
    flat, _ = jax.tree_util.tree_flatten_with_path(grads["params"])
    for path, grad in flat:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 0 or "lm_head" in name, name
    assert set(jax.tree.leaves(roles(params))) == {"kernel", "embedding", "norm", "bias"}


# Bad input.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even and above 0"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim=0 must be even and above 0"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1; None makes queries without a latent"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim=0 must be at least 1"),
        ({"v_head_dim": -1}, "v_head_dim=-1 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
        ({"n_group": 4}, "n_group=4 must divide n_routed_experts=6"),
        ({"n_group": 0}, "n_group=0 must be at least 1"),
        ({"topk_group": 4}, "topk_group=4 is more than n_group=3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts of topk_group=2 groups"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
        ({"n_routed_experts": 0}, "n_routed_experts=0 must be at least 1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be positive"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be at least 0"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 must be at least 0"),
        ({"mtp_hidden": "norm"}, "mtp_hidden='norm' must be one of after_norm, before_norm"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' must be one of"),
        ({"norm": "rms"}, "norm='rms' must be one of"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "rope_parameters.rope_type='yarm' is unknown"),
        (
            {"experts": {"num_experts": 12}},
            "experts has num_experts=12 and top_k=2, and n_routed_experts and num_experts_per_tok say 6 and 2; change",
        ),
        ({"experts": {"num_experts": 6, "first_layer": 3}}, "first_layer=3 leaves no expert in 3 layers"),
        ({"balance": {"bias_speed": 0.1}}, "balance: there is no field 'bias_speed'"),
        ({"balance": {"device": 0.1, "devices": 4}}, "balance: devices=4 must divide 6 experts"),
    ],
    ids=str,
)
def test_bad_input(fields, message):
    with pytest.raises(BadInput) as caught:
        override(TINY, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mtp_logits_need_modules_and_tokens(variables):
    lm = lq.LanguageModel(TINY, build(TINY), variables)
    with pytest.raises(
        BadInput, match="a row of 2 tokens is too short for 2 modules of multi-token prediction; give 3 or more"
    ):
        lm.mtp_logits(TOKENS[:, :2])
    assert [logits.shape for logits in lm.mtp_logits(TOKENS[:, :3])] == [(2, 2, 29), (2, 1, 29)]
    plain = lm.replace(config=override(TINY, num_nextn_predict_layers=0))
    with pytest.raises(BadInput, match="this deepseek_v3 has no modules of multi-token prediction"):
        plain.mtp_logits(TOKENS)


def test_the_paper_s_balance_is_the_default():
    assert DeepSeekV3Config().balance == PAPER_BALANCE
    assert build(override(TINY, balance=None)).experts.balance is None
