import dataclasses
import inspect
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax import language_model
from llmq_jax.errors import BadInput
from llmq_jax.layers.linear import by_output
from llmq_jax.models import ARCHITECTURES, PRESETS, GPT2Config, abstract_variables, build, decoder, init, preset
from llmq_jax.models.llama3 import GroupedQueryAttention, Llama3Block
from tests.models.compiled import apply, decode
from tests.weights import draw_variables

TINY = GPT2Config(
    vocab_size=29,
    max_position_embeddings=32,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def variables():
    return draw_variables(TINY)


TOKENS = np.random.default_rng(0).integers(0, 29, (2, 13)).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2-124m", 124), ("gpt2-355m", 355), ("gpt2-774m", 774), ("gpt2-1558m", 1558)]
)
def test_presets_have_the_published_sizes(name, millions):
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(preset(name))))
    assert round(count / 1e6) == pytest.approx(millions, abs=1)


def test_initialisation_is_gpt2s():
    config = GPT2Config(vocab_size=2000, max_position_embeddings=512, hidden_size=64, num_hidden_layers=8,
                        num_attention_heads=4)  # fmt: skip
    params = init(config)["params"]
    block = params["group_0"]["block_0"]

    def deviation(leaf):
        return float(jnp.std(leaf))

    assert deviation(params["token_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.02)
    assert deviation(params["position_embedding"]["embedding"]) == pytest.approx(0.01, rel=0.02)
    assert deviation(block["attention"]["qkv"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert deviation(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    for residual in (block["attention"]["out"]["kernel"], block["mlp"]["down"]["kernel"]):
        assert deviation(residual) == pytest.approx(0.02 / 4, rel=0.02)
    # Layers are stacked, and each draws its own numbers.
    assert not np.allclose(block["mlp"]["up"]["kernel"][0], block["mlp"]["up"]["kernel"][1])
    for norm in ("attention_norm", "mlp_norm"):
        assert (block[norm]["scale"] == 1).all() and (block[norm]["bias"] == 0).all()


@pytest.mark.parametrize("options", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}])
def test_ways_to_run_the_layers_agree(variables, options):
    reference = apply(build(TINY), variables, TOKENS)
    np.testing.assert_allclose(apply(build(TINY, **options), variables, TOKENS), reference, atol=1e-5)


def size_of(model, layers: int):
    """Operations in the program of a loss's gradient, and how many of them are exponentials and products."""
    config = dataclasses.replace(TINY, num_hidden_layers=layers)
    model = model.clone(config=config)
    gradient = jax.grad(lambda variables: model.apply(variables, TOKENS).sum())
    lowered = jax.jit(gradient).lower(abstract_variables(config))
    program = str(jax.make_jaxpr(gradient)(abstract_variables(config)))
    return lowered.as_text().count("\n"), program.count("= exp "), program.count("dot_general[")


def test_a_scanned_program_does_not_grow_with_depth():
    assert size_of(build(TINY), 6)[0] == size_of(build(TINY), 2)[0]
    assert size_of(build(TINY, scan_layers=False), 6)[0] > 1.3 * size_of(build(TINY, scan_layers=False), 2)[0]


def test_remat_recomputes_attention_in_the_backward_pass():
    """And "full" products with weights too."""
    _, exponentials, products = zip(
        *(size_of(build(TINY, remat=remat), 2) for remat in ("none", "dots", "full")), strict=True
    )
    assert exponentials[0] < exponentials[1] and exponentials[0] < exponentials[2]
    assert products[0] <= products[1] < products[2]


def test_dropout_of_embeddings_and_of_what_each_layer_adds():
    """What stays of three quarters counts four times, of a half twice; each of two layers draws its own. All norms give
    zeros here, and each branch its bias."""
    config = dataclasses.replace(TINY, num_hidden_layers=2, embd_pdrop=0.75, attn_pdrop=0.0, resid_pdrop=0.5)
    params = jax.tree.map(jnp.zeros_like, draw_variables(config)["params"])
    block = params["group_0"]["block_0"]
    params["token_embedding"]["embedding"] += 100
    block["attention"]["out"]["bias"] += 1
    block["mlp"]["down"]["bias"] += 10
    key = {"dropout": jax.random.key(0)}
    stream = apply(build(config), {"params": params}, TOKENS, rngs=key, method="forward").before_norm
    expected = {100 * a + b + 10 * c for a in (0, 4) for b in (0, 2, 4) for c in (0, 2, 4)}
    assert set(np.unique(stream)) == expected


def test_positions_default_to_their_place_in_the_segment(variables):
    model = build(TINY)
    segments = np.array([[0] * 3 + [1] * 4 + [2] * 6, [1] * 13], np.int32)
    positions = np.array([[0, 1, 2, *range(4), *range(6)], [*range(13)]], np.int32)
    by_default = np.asarray(apply(model, variables, TOKENS, None, segments))
    np.testing.assert_array_equal(by_default, apply(model, variables, TOKENS, positions, segments))
    alone = apply(model, variables, TOKENS[:1, 7:])
    np.testing.assert_allclose(by_default[:1, 7:], alone, atol=1e-5)


@pytest.mark.parametrize("arrange", [lambda tree: tree, by_output], ids=["as they are", "by output"])
def test_decoding_over_sliced_layers_equals_the_whole_pass(variables, arrange):
    """Prefill of unequal prompts, then one token at a time at positions of each row's own."""
    model = build(TINY)
    whole = np.asarray(apply(model, variables, TOKENS))
    lengths = np.array([5, 8])
    outside, layers = model.slice_layers(variables, arrange)
    caches = model.create_caches(2, 8, jnp.float32)
    output = apply(model, variables, TOKENS[:, :8], None, None, caches, method="forward")
    caches = tuple(cache.extend(13) for cache in model.slice_caches(output.caches))
    for step in range(5):
        positions = lengths + step
        newest = TOKENS[np.arange(2), positions][:, None]
        logits, caches = decode(model, outside, layers, newest, positions[:, None], caches)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], whole[np.arange(2), positions], atol=1e-4)


def test_going_back_in_the_cache_forgets_what_was_written(variables):
    model = build(TINY)
    outside, layers = model.slice_layers(variables)
    caches = model.create_caches(2, 6, jnp.float32)
    output = apply(model, variables, TOKENS[:, :6], None, None, caches, method="forward")
    caches = tuple(cache.extend(13) for cache in model.slice_caches(output.caches))
    draft = (TOKENS[:, 6:9] + 1) % 29
    _, caches = decode(model, outside, layers, draft, np.array([[6, 7, 8]] * 2), caches)
    logits, _ = decode(model, outside, layers, TOKENS[:, 6:7], np.array([[6]] * 2), caches)
    expected = np.asarray(apply(model, variables, TOKENS))[:, 6]
    np.testing.assert_allclose(np.asarray(logits)[:, 0], expected, atol=1e-4)


def test_compute_type_and_output_type():
    model = build(TINY, dtype="bfloat16")
    variables = draw_variables(TINY)
    assert apply(model, variables, TOKENS, method="hidden").dtype == jnp.bfloat16
    logits = apply(model, variables, TOKENS)
    assert logits.dtype == jnp.float32
    reference = apply(build(TINY), variables, TOKENS)
    assert 0 < np.abs(np.asarray(logits) - np.asarray(reference)).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10}, r"num_attention_heads=12 must divide hidden_size=10"),
        ({"vocab_size": 0}, r"GPT2Config.vocab_size=0 must be at least 1"),
        ({"attn_pdrop": 1.0}, r"GPT2Config.attn_pdrop=1.0 must be at least 0 and below 1"),
        ({"activation_function": "swish"}, r"activation_function='swish' must be one of gelu_new"),
    ],
)
def test_impossible_configs_name_the_field_and_the_rule(fields, message):
    with pytest.raises(BadInput, match=message):
        GPT2Config(**fields)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(BadInput, match=r"unknown preset 'gpt2-124'; did you mean gpt2-124m"):
        preset("gpt2-124")
    with pytest.raises(BadInput, match=r"no field 'num_layers'; did you mean num_hidden_layers"):
        preset("gpt2-124m", num_layers=3)
    with pytest.raises(BadInput, match=r"remat='all' is unknown; use one of none, dots, full"):
        build(TINY, remat="all").apply(init(TINY), TOKENS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_config_field_is_read_by_the_model(model_type):
    """By the architecture's own code, a property of its config, or what all share; to be validated is not enough."""
    config_class, model_class = ARCHITECTURES[model_type]
    own = [kind for kind in model_class.mro() if issubclass(kind, decoder.Decoder) and kind is not decoder.Decoder]
    after_config = "".join(
        inspect.getsource(inspect.getmodule(kind)).split(f"class {kind.__name__}(")[1] for kind in own
    )
    shared = inspect.getsource(decoder) + inspect.getsource(language_model)
    for part in (GroupedQueryAttention, Llama3Block):
        if part.__name__ in after_config:
            shared += inspect.getsource(part)
    properties = inspect.getmembers(config_class, lambda value: isinstance(value, property))
    through_properties = "".join(inspect.getsource(value.fget) for _, value in properties)
    for field in dataclasses.fields(config_class):
        pattern = rf"(c|config)\.{field.name}\b"
        used = re.search(pattern, after_config + shared) or re.search(rf"self\.{field.name}\b", through_properties)
        assert used, f"no code reads {config_class.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("name", "field", "published"),
    [
        ("llama3.1-8b", "rope_parameters.factor", 8),
        ("llama3.2-1b", "rope_parameters.factor", 32),
        ("gemma2-27b", "query_pre_attn_scalar", 144),
        ("gemma3-12b", "sliding_window", 1024),
        ("gemma3-27b", "query_pre_attn_scalar", 168),
        ("gemma3-27b", "rope_parameters.factor", 8),
        ("mistral-7b-v0.3", "sliding_window", None),
        ("mixtral-8x7b", "router_aux_loss_coef", 0.02),
        ("moonlight-16b", "num_experts_per_tok", 6),
        ("moonlight-16b", "rms_norm_eps", 1e-5),
        ("moonlight-16b", "rope_parameters.rope_theta", 50_000),
        ("moonlight-16b", "routed_scaling_factor", 2.446),
        ("smollm2-135m", "initializer_range", 0.041666666666666664),
        ("smollm2-1.7b", "rope_parameters.rope_theta", 130_000),
    ],
)
def test_presets_have_what_their_sizes_do_not_show(name, field, published):
    assert operator.attrgetter(field)(preset(name)) == published


def test_presets_are_configs_of_known_architectures():
    for config in PRESETS.values():
        assert isinstance(config, ARCHITECTURES[config.model_type].config_class)
