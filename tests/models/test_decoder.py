"""What all architectures share: how attention runs, by name, and caches of both kinds."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import MESH_AXES
from llmq_jax.layers.caches import FullCache, RingCache
from llmq_jax.layers.linear import by_output
from llmq_jax.layers.moe import Experts
from llmq_jax.models import Gemma3Config, GPT2Config, MixtralConfig, abstract_variables, build, override
from llmq_jax.models.layer_groups import layers_in_groups
from tests.models.compiled import apply, decode
from tests.weights import draw_variables

LOCAL, GLOBAL = "sliding_attention", "full_attention"
CONFIG = Gemma3Config(
    vocab_size=29,
    max_position_embeddings=160,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    intermediate_size=16,
    sliding_window=7,
    layer_types=(LOCAL, LOCAL, GLOBAL),
    query_pre_attn_scalar=6,
    initializer_range=0.3,
)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 150)).astype(np.int32)


@pytest.fixture(scope="module")
def variables():
    return draw_variables(CONFIG)


def test_implementations_of_attention_agree(variables):
    """Forward and back, in layers with a window and without."""

    def value_and_gradient(attention):
        model = build(CONFIG, attention=attention)
        return jax.jit(jax.value_and_grad(lambda v: jnp.square(model.apply(v, TOKENS)).mean()))(variables)

    found, expected = value_and_gradient("blocked"), value_and_gradient("masked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("blokced", "attention='blokced' is unknown; did you mean blocked?"),
        ("fused", "attention='fused' cannot run: it is a kernel of NVIDIA GPUs"),
    ],
)
def test_attention_that_cannot_be(variables, attention, message):
    with pytest.raises(BadInput) as error:
        build(CONFIG, attention=attention).apply(variables, TOKENS)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_no_token_is_told(variables, shape):
    with pytest.raises(BadInput, match=re.escape(f"tokens of the shape {shape} are none; give one row or more")):
        build(CONFIG).apply(variables, np.zeros(shape, np.int32))


def test_the_choice_in_a_line():
    gpt2 = GPT2Config(num_hidden_layers=2, attn_pdrop=0.1)
    assert build(gpt2).attention_choice() == "attention: blocked"
    assert build(gpt2).attention_choice(training=True) == "attention: masked"
    assert build(CONFIG).attention_choice() == "attention: blocked in windows of 7, blocked elsewhere"
    local = override(CONFIG, layer_types=(LOCAL,) * 3)
    assert build(local, attention="masked").attention_choice() == "attention: masked in windows of 7"
    with pytest.raises(BadInput, match="cannot run"):
        build(CONFIG, attention="fused").attention_choice()


def test_the_choice_says_what_keeps_auto_from_the_fused_kernel(monkeypatch):
    """On a GPU, where it would be taken: elsewhere, and of another one asked for by name, there is nothing to say."""
    gpt2 = GPT2Config(num_hidden_layers=2, attn_pdrop=0.1)
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    why = "the fused kernel cannot run: it computes in bfloat16 (--dtype bfloat16) or float16, not in float32"
    assert build(gpt2).attention_choice() == f"attention: masked; {why}"
    assert build(CONFIG).attention_choice() == f"attention: blocked in windows of 7, masked elsewhere; {why}"
    assert build(gpt2, attention="masked").attention_choice() == "attention: masked"
    half = build(gpt2, dtype=jnp.bfloat16)
    assert half.attention_choice() == "attention: fused"
    assert "masked; the fused kernel cannot run: it has no dropout" in half.attention_choice(training=True)
    whole = build(override(gpt2, attn_pdrop=0.0), dtype=jnp.bfloat16)
    assert whole.attention_choice(training=True) == "attention: fused"
    capped = build(override(CONFIG, attn_logit_softcapping=50.0), dtype=jnp.bfloat16)
    assert "masked elsewhere; the fused kernel cannot run: it has no softcap" in capped.attention_choice()
    mesh = AbstractMesh((1, 1, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        shared = build(override(CONFIG, head_dim=8), dtype=jnp.bfloat16)
        assert "tensor=2 divides 2, not 1" in shared.attention_choice()


def test_padding_on_the_right_alone_leaves_the_fused_kernel_without_a_mask(monkeypatch):
    masked = []

    def kernel(query, key, value, *, mask, **options):
        masked.append(mask is not None)
        return query

    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    config = override(CONFIG, head_dim=8)
    model, variables = build(config, dtype="bfloat16"), abstract_variables(config)
    for told in ({"lengths": np.array([150, 9])}, {"segment_ids": np.ones_like(TOKENS)}):
        jax.eval_shape(lambda v, told=told: model.apply(v, TOKENS, method="forward", **told).hidden, variables)
        assert masked and set(masked) == {"segment_ids" in told}
        masked.clear()


@pytest.mark.parametrize("lookahead", [0, 2])
def test_decoding_past_the_window_equals_the_whole_pass(variables, lookahead):
    """Prompts shorter and longer than the window, padded; then a piece of three and one token at a time."""
    model, lengths = build(CONFIG), np.array([5, 22])
    whole = np.asarray(apply(model, variables, TOKENS[:, :40]))
    real = (np.arange(24) < lengths[:, None]).astype(np.int32)
    caches = model.create_caches(2, 24, jnp.float32, lookahead)
    output = apply(model, variables, TOKENS[:, :24], None, real, caches, method="forward")
    caches = tuple(cache.extend(40) for cache in model.slice_caches(output.caches))
    assert [type(cache) for cache in caches] == [RingCache, RingCache, FullCache]
    assert [cache.values.shape[2] for cache in caches] == [7 + lookahead, 7 + lookahead, 40]
    outside, layers = model.slice_layers(variables)
    for count in (3, *[1] * 12):
        positions = lengths[:, None] + np.arange(count)
        newest = np.take_along_axis(TOKENS, positions, axis=1)
        logits, caches = decode(model, outside, layers, newest, positions, caches)
        np.testing.assert_allclose(logits, np.take_along_axis(whole, positions[..., None], axis=1), atol=1e-4)
        lengths = lengths + count


def test_the_type_of_caches_is_that_of_most_weights():
    """In sliced layers too: a block may have no parameter, and joined kernels count once."""
    model = build(CONFIG)
    joined = by_output({name: {"kernel": jnp.ones((4, 4), jnp.bfloat16)} for name in ("query", "key", "value")})
    assert model.compute_dtype({"params": {"embedding": jnp.ones((5, 8))}}, ({}, {"params": joined})) == jnp.bfloat16
    assert model.compute_dtype({"params": {"embedding": jnp.ones((7, 8))}}, ({}, {"params": joined})) == jnp.float32


def test_caches_of_a_long_context_are_small():
    """At 32,768 tokens, with five local layers to a global one."""

    def size(**changes):
        changes = {"num_hidden_layers": 24, "max_position_embeddings": 32768, "sliding_window": 512, **changes}
        model = build(override(CONFIG, **changes))
        leaves = jax.eval_shape(lambda: jax.tree.leaves(model.create_caches(1, 32768, jnp.bfloat16)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert size(layer_types=None) < size(layer_types=(GLOBAL,) * 24) / 4


def test_layers_differ_in_the_arguments_that_are_given_by_layer():
    """A window of most layers and experts from the second on; None leaves a block's default."""
    by_layer = {"window": (7, 7, None, 7, None), "turns": (True,) * 5}
    groups = layers_in_groups(SimpleNamespace, 5, Experts(first_layer=1), **by_layer)
    found = [(tuple(block() for block in group.blocks), group.repeats) for group in groups]
    experts = {"experts": Experts(first_layer=1), "turns": True}
    pattern = (SimpleNamespace(window=7, **experts), SimpleNamespace(**experts))
    assert found == [((SimpleNamespace(window=7, turns=True),), 1), (pattern, 2)]


def test_frozen_layers_cut_the_group_that_they_end_in():
    """Of twice a pattern of six and twice a pattern of one."""
    model = build(override(CONFIG, num_hidden_layers=14, layer_types=None))
    for layers, repeats in (
        (0, {"group_0": 2, "group_1": 2}),
        (6, {"group_0": 1, "group_0_upper": 1, "group_1": 2}),
        (12, {"group_0": 2, "group_1": 2}),
        (13, {"group_0": 2, "group_1": 1, "group_1_upper": 1}),
    ):
        groups = model.clone(frozen_layers=layers).groups()
        assert {name: group.repeats for name, group in groups.items()} == repeats


def test_padding_is_told_in_one_way(variables):
    with pytest.raises(BadInput, match="lengths and segment_ids both say what is padding"):
        build(CONFIG).apply(variables, TOKENS, None, np.ones_like(TOKENS), lengths=np.full(2, 9), method="forward")


def loops(config, **options):
    """(those in the forward pass, those in the backward pass): of a training loss's loop over layers, the stacked
    results, and the loops in its body, by name."""
    model, variables = build(config, **options), abstract_variables(config)
    gradient = jax.grad(lambda params: model.apply({**variables, "params": params}, TOKENS).sum())
    found = {}
    for equation in jax.make_jaxpr(gradient)(variables["params"]).jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == config.num_hidden_layers:
            body = equation.params["jaxpr"]
            results = zip(equation.outvars, body.jaxpr.outvars, strict=True)
            stacked = [inner.aval for v, inner in results if len(v.aval.shape) > len(inner.aval.shape)]
            names = re.findall(r"= (scan|while)\[", str(body))
            found[equation.params["reverse"]] = stacked, names
    return found[False], found[True]


def test_the_backward_pass_recomputes_what_is_elementwise_and_nothing_else():
    """Of an activation, its argument is kept alone; of a norm, its mean and variance; of loops, their results."""
    sizes = {"vocab_size": 29, "max_position_embeddings": 160, "hidden_size": 12, "num_attention_heads": 2}
    config = GPT2Config(**sizes, num_hidden_layers=3, **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0))
    (kept, _), _ = loops(config, attention="masked")
    rows, length = TOKENS.shape

    def numbers(kept):
        """Those kept for each token, but for what attention keeps of pairs of tokens."""
        return sum(x.size for x in kept if x.shape.count(length) < 2) / (rows * length)

    mixed, statistics = 12, 2 * (2 + 2)  # largest and total of each head's scores; mean and variance of each norm
    assert numbers(kept) <= 12 + 3 * 12 + mixed + 12 + 48 + statistics  # the stream, and results of products but `down`
    (fewer, _), _ = loops(config, attention="masked", remat="full")
    assert numbers(fewer) == 12
    (kept, _), _ = loops(config, attention="masked", dtype="bfloat16")
    assert {x.dtype.name for x in kept if x.shape.count(length) == 2} == {"bfloat16"}

    window = dataclasses.replace(CONFIG, layer_types=(LOCAL,) * 3)
    for other in (
        window,
        MixtralConfig(**sizes, num_hidden_layers=3, intermediate_size=16, num_key_value_heads=1, num_local_experts=4),
    ):
        (_, forward), (_, backward) = loops(other)
        assert len(backward) == 1 and backward[0] in forward  # its own loop, and not the forward pass's again
