"""The linear layer in the layout of decoding, in attention that someone has changed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import llmq_jax as lq
from llmq_jax.layers.attention import attention
from llmq_jax.layers.embedding import Embedding
from llmq_jax.layers.linear import (
    JOINED_KERNELS,
    KERNEL_BY_OUTPUT,
    Linear,
    by_output,
    flat_by_output,
    rounded,
    side_by_side,
    times_transposed,
)
from llmq_jax.layers.repetition import repeated
from llmq_jax.models import llama3, override
from tests.weights import draw_variables

CONFIG = lq.Llama3Config(
    vocab_size=37,
    max_position_embeddings=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    initializer_range=0.3,
)


def other_keys(x, heads):
    """Keys see another input."""
    return heads(4, "query")(x), heads(2, "key")(jnp.tanh(x)), heads(2, "value")(x)


def narrower_keys(x, heads):
    """And one of fewer features: kernels that cannot be joined."""
    return heads(4, "query")(x), heads(2, "key")(x[..., :6]), heads(2, "value")(x)


def two_of_three(x, heads):
    query, value = side_by_side(x, heads(4, "query"), heads(2, "value"))
    return query, heads(2, "key")(jnp.tanh(x)), value


def in_another_order(x, heads):
    value, key, query = side_by_side(x, heads(2, "value"), heads(2, "key"), heads(4, "query"))
    return query, key, value


CHANGED = (other_keys, narrower_keys, two_of_three, in_another_order)


@pytest.mark.parametrize("projections", CHANGED)
def test_changed_attention_generates_what_the_whole_pass_says(projections, monkeypatch):
    """One row is decoded by kernels that are joined by their names, however the module calls them."""

    class Changed(nn.Module):
        config: lq.Llama3Config
        dtype: None = None
        window: None = None

        @nn.compact
        def __call__(self, x, context, cache=None):
            def heads(count, name):
                return Linear((count, 4), True, nn.initializers.normal(0.3), self.dtype, name=name)

            query, key, value = projections(x, heads)
            query, key = context.rotation.apply(query), context.rotation.apply(key)
            mixed, cache = attention(query, key, value, context, cache, scale=0.5)
            return Linear(16, True, nn.initializers.normal(0.3), name="out")(mixed.reshape(*x.shape[:2], 16)), cache

    monkeypatch.setattr(llama3, "GroupedQueryAttention", Changed)
    # Compiled programs are kept by the model's config, so each case has one of its own.
    config = override(CONFIG, vocab_size=37 + CHANGED.index(projections))
    lm = lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=3))
    text = [3, 1, 4, 1, 5]
    made = lq.generate(lm, [text], max_new_tokens=8, sampler=lq.Sampler(temperature=1.0))
    tokens = made.tokens[0].tolist()
    whole = jax.nn.log_softmax(lm.logits([text + tokens])[0, len(text) - 1 : -1])
    np.testing.assert_allclose(made.logprobs[0], whole[np.arange(8), tokens], atol=1e-4)
    assert len(set(tokens)) > 4


def test_joined_kernels_are_one_array_and_each_layer_knows_its_rows():
    rng = np.random.default_rng(1)
    shapes = {"query": (6, 4, 3), "key": (6, 2, 3), "value": (6, 2, 3)}
    params = {name: {"kernel": jnp.asarray(rng.standard_normal(shape), "float32")} for name, shape in shapes.items()}
    arranged = by_output(params)
    joined = [arranged[name][JOINED_KERNELS] for name in shapes]
    assert all(part.kernels is joined[0].kernels for part in joined) and joined[0].kernels.shape == (24, 6)
    for name, leaf in params.items():
        np.testing.assert_array_equal(flat_by_output(arranged[name]), leaf["kernel"].reshape(6, -1).T)


def test_what_chooses_experts_is_not_rounded():
    """Routers compute in float32 whatever the others do."""
    tree = {name: {"kernel": jnp.ones((2, 3))} for name in ("router", "noise", "query")}
    types = jax.tree.map(lambda leaf: leaf.dtype.name, rounded({"params": tree}, jnp.bfloat16, tied=False)["params"])
    assert {name: leaf["kernel"] for name, leaf in types.items()} == {
        "router": "float32",
        "noise": "float32",
        "query": "bfloat16",
    }


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"width": 5}])
def test_kernels_of_other_widths_or_types_stay_apart(change):
    width, dtype = change.get("width", 6), change.get("dtype", "float32")
    arranged = by_output({"gate": {"kernel": jnp.ones((6, 4))}, "up": {"kernel": jnp.ones((width, 4), dtype)}})
    assert [list(leaf) for leaf in arranged.values()] == [[KERNEL_BY_OUTPUT]] * 2
    assert arranged["up"][KERNEL_BY_OUTPUT].dtype == dtype


@pytest.mark.parametrize("way", [jnp.add, jnp.multiply])
def test_what_all_tokens_share_has_a_gradient_summed_in_float32_on_a_gpu(way, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    draw = np.random.default_rng(0)
    x, grad = (jnp.asarray(draw.uniform(0.5, 1.5, (4096, 8)), jnp.bfloat16) for _ in range(2))

    @jax.jit
    def pulled_back(parameter, x, grad):
        return jax.vjp(lambda parameter: way(x, repeated(parameter, x)), parameter)[1](grad)[0]

    found = pulled_back(jnp.ones(8), x, grad)
    times = np.asarray(x if way is jnp.multiply else jnp.ones_like(x), np.float64)
    np.testing.assert_allclose(found, (times * np.asarray(grad, np.float64)).sum(0), rtol=0.004)


def test_decoding_takes_joined_kernels_on_a_cpu_and_for_one_row_on_a_gpu(monkeypatch):
    lm = lq.LanguageModel(CONFIG, lq.build(CONFIG), lq.init(CONFIG))
    for backend, joined in (("cpu", (True, True)), ("gpu", (True, False)), ("tpu", (False, False))):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for rows, expected in enumerate(joined, 1):
            assert ("JoinedKernels" in str(jax.tree.structure(lm.replace().sliced(rows)))) == expected


@pytest.mark.parametrize(("rows", "first"), [(1, "rows"), (2, "matrix"), (64, "matrix"), (65, "rows")])
def test_of_a_product_with_few_rows_the_matrix_is_the_first_operand(rows, first):
    """In the compiled program too: XLA would swap the operands of a transposed product."""
    x, matrix = (jax.random.normal(jax.random.key(i), (size, 16)) for i, size in enumerate((rows, 96)))
    program = jax.jit(times_transposed).lower(x, matrix).compile()
    np.testing.assert_allclose(program(x, matrix), x @ matrix.T, atol=1e-5)
    assert (f"f32[96,{rows}]" in program.as_text()) == (first == "matrix")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_on_a_gpu_rows_of_odd_length_are_filled_up(tied, dtype, monkeypatch):
    """A vocabulary of 37: logits of many rows, their gradient and that of the head are products of arrays whose rows
    start at multiples of 16 bytes. Few rows, as in decoding, read the head as it is."""
    module = Embedding(37, 16, dtype=dtype) if tied else Linear(37, dtype=dtype, use_bias=False)
    names = {"method": "logits"} if tied else {}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(96, 16)), dtype)
    variables = module.init(jax.random.key(0), x, **names)

    def squares(variables, x):
        return (module.apply(variables, x, **names) ** 2).sum(dtype=jnp.float32)

    def of(rows):
        return jax.value_and_grad(squares, (0, 1))(variables, x[:rows])

    expected = of(96)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for rows, width in ((96, 64), (8, 37)):
        lines = jax.jit(of, static_argnums=0).lower(rows).as_text().splitlines()
        products = "".join(line.partition(" : ")[2] for line in lines if "dot_general" in line)
        assert {int(size) for size in re.findall(r"\d+(?=x)", products)} == {rows, 16, width}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), of(96), expected)
