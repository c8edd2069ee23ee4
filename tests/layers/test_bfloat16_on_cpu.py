"""Products in bfloat16 are those of the same numbers in float32, and compiled programs hold no others."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import llmq_jax as lq
from llmq_jax.objectives import NextToken

SIZES = {"b": 3, "m": 24, "k": 32, "n": 40, "t": 8, "h": 16}
NARROW = ("bf16", "bf16")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def compiled(function: Callable[..., Any], *arguments: Any) -> str:
    program: str = jax.jit(function).lower(*arguments).compile().as_text()
    return program


def products(program: str) -> list[tuple[str, str]]:
    """The types of both operands of each product in a compiled program."""
    found = []
    for computation in re.split(r"\n(?=\S)", program):
        types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", computation))
        found += [(types[a], types[b]) for a, b in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", computation)]
    return found


@pytest.mark.parametrize("result", [None, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "form",
    [
        *("mk,kn->mn", "mk,nk->mn", "km,kn->mn", "km,nk->mn"),  # with weights, and the gradients of these
        *("bmk,bkn->bmn", "bmk,bnk->bmn", "bkm,bkn->bmn", "mbk,nbk->bmn"),  # with a batch
        *("btk,kn->btn", "btk,btn->kn", "bthk,bkn->bthn", "bthk,bthn->bkn"),  # with several axes
        *("k,kn->n", "k,nk->n", "bk,bkn->bn", "bk,bnk->bn"),  # of a vector
    ],
)
def test_products(form, result):
    left, right = (normal(*map(SIZES.get, axes), seed=i) for i, axes in enumerate(form.split("->")[0].split(",")))

    def multiply(left, right):
        return jnp.einsum(form, left, right, preferred_element_type=result)

    found = jax.jit(multiply)(left, right)
    assert found.dtype == (result or jnp.bfloat16)
    exact = np.einsum(form, np.float64(left), np.float64(right))
    np.testing.assert_allclose(np.float64(found), exact, rtol=1e-6 if result else 2**-8, atol=1e-5)
    by_xla = form in ("k,kn->n", "bk,bkn->bn", "bk,bnk->bn")  # products of vectors that gain nothing
    assert products(compiled(multiply, left, right)) == [("f32", "f32") if by_xla else NARROW]


@pytest.mark.parametrize("form", ["km,kn->mn", "mk,kn->mn", "k,k->", "mk,k->m"])
@pytest.mark.parametrize("size", [0, 1, 7, 33])
def test_products_of_any_size(form, size):
    """Of sizes that the library does not take, XLA's own product remains."""
    left, right = (normal(*(size for _ in axes), seed=i) for i, axes in enumerate(form.split("->")[0].split(",")))
    exact = np.einsum(form, np.float64(left), np.float64(right))
    found = jax.jit(lambda left, right: jnp.einsum(form, left, right))(left, right)
    np.testing.assert_allclose(np.float64(found), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("result", [None, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("function", [lambda x: jnp.where(x > 0, x, 0), lambda x: jax.nn.silu(x) * x])
def test_transposition_that_moves_into_a_product(function, result):
    """Through `where`, which XLA overlooks when it decides which products to compute in bfloat16."""
    x, weights = normal(32, 64), normal(32, 48, seed=1)
    multiply = jax.jit(lambda x, weights: jnp.matmul(function(x.T), weights, preferred_element_type=result))
    found = multiply(x, weights)
    exact = np.float64(function(x)).T @ np.float64(weights)
    np.testing.assert_allclose(np.float64(found), exact, rtol=2**-8, atol=0.05)


def test_products_that_keep_jax_s_own_rule():
    """Of sizes that are not known, and on a mesh with explicit axes."""
    x, weights = normal(8, 6), normal(8, 10, seed=1)

    def multiply(x, weights):
        return jnp.einsum("km,kn->mn", x, weights)

    exact = multiply(x, weights)
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("k, m"), jnp.bfloat16)
    exported = jax.export.export(jax.jit(lambda x: multiply(x, x)))(symbolic)
    np.testing.assert_allclose(np.float32(exported.call(x)), np.float32(multiply(x, x)), rtol=2**-7)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, weights = (jax.device_put(a, jax.NamedSharding(mesh, jax.P(None, "data"))) for a in (x, weights))
        found = jax.jit(lambda x, weights: jnp.einsum("km,kn->mn", x, weights, out_sharding=jax.P("data", None)))
        np.testing.assert_allclose(np.float32(found(x, weights)), np.float32(exact), rtol=2**-7)


def test_other_types():
    """float32 and float16 are multiplied as ever, and so is bfloat16 whose precision is prescribed."""
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.float16, 2**-10)):
        x = normal(24, 24).astype(dtype)
        assert (x.T @ x).dtype == dtype
        np.testing.assert_allclose(np.float64(x.T @ x), np.float64(x).T @ np.float64(x), rtol=bound, atol=1e-5)
    x = normal(24, 24)
    prescribed = jnp.matmul(x.T, x, precision="BF16_BF16_F32", preferred_element_type=jnp.float32)
    np.testing.assert_allclose(prescribed, np.float64(x).T @ np.float64(x), rtol=1e-6, atol=1e-5)


MOVES = {
    "a layer of a stack": lambda x, i: lax.dynamic_index_in_dim(x, i),
    "a layer into a stack": lambda x, i: lax.dynamic_update_index_in_dim(x, -x[1], i, 0),
    "rows of a table": lambda x, i: x[jnp.array([2, 0, 2])],
    "rows of a table, or fill": lambda x, i: x.at[jnp.array([2, 9])].get(mode="fill", fill_value=3.0),
    "rows of a table, or NaN": lambda x, i: x.at[jnp.array([2, 9])].get(mode="fill"),
    "rows into a cache": lambda x, i: x.at[jnp.array([2, 0])].set(3.0),
    "rows into a cache, or drop": lambda x, i: x.at[jnp.array([2, 9])].set(-x[:2], mode="drop"),
    "a function of rows": lambda x, i: x.at[jnp.array([2, 0])].apply(jnp.abs),
    "rows into a cache, or clip": lambda x, i: x.at[jnp.array([2, 9])].set(-x[:2], mode="clip"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    x, i = normal(4, 6, 8), jnp.int32(2)
    found = jax.jit(MOVES[name])(x, i)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found), np.float32(MOVES[name](x.astype(jnp.float32), i)))


@pytest.mark.parametrize("name", ["a layer of a stack", "rows of a table", "rows into a cache"])
def test_moves_of_bits(name):
    """Nothing of the array's size is converted."""
    assert not re.search(r"f32\[4,6,8\]", compiled(MOVES[name], normal(4, 6, 8), jnp.int32(2)).replace("bf16", ""))


@pytest.mark.parametrize("name", ["a layer of a stack", "rows of a table"])
def test_what_a_loop_reads_is_not_copied_before_it(name):
    def total(x, ids):
        read = {"a layer of a stack": lambda i: lax.dynamic_index_in_dim(x, i), "rows of a table": lambda i: x[ids + i]}
        return lax.fori_loop(0, len(ids), lambda i, total: total + read[name](i).astype(jnp.float32).sum(), 0.0)

    program = compiled(total, normal(64, 24), jnp.arange(3))
    before, _, main = program.partition("\nENTRY ")
    assert "u16[64,24]" in before and "u16[64,24]" not in main


def test_gradients():
    x, weights = normal(24, 32), normal(32, 40, seed=1)

    def loss(x, weights):
        return jnp.square(jnp.tanh(x @ weights).astype(jnp.float32)).mean()

    exact = jax.grad(loss, (0, 1))(x.astype(jnp.float32), weights.astype(jnp.float32))
    for ours, theirs in zip(jax.jit(jax.grad(loss, (0, 1)))(x, weights), exact, strict=True):
        np.testing.assert_allclose(np.float32(ours), theirs, atol=0.02 * np.abs(theirs).max())
    assert products(compiled(jax.grad(loss, (0, 1)), x, weights)) == [NARROW] * 3
    curvature = jax.jit(jax.hessian(lambda x: loss(x, weights[:, :2])))(x[:2])  # forward over reverse
    assert np.isfinite(np.float32(curvature)).all()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_training_step(scan_layers):
    """All products with weights, of queries with keys and of weights with values, both ways."""
    config = lq.preset(
        "llama3.2-1b",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = lq.build(config, dtype="bfloat16", scan_layers=scan_layers)
    optimizer = lq.training.adamw(1e-3)
    state = lq.training.create_state(lq.init(config), optimizer)
    tokens = np.arange(2 * 16).reshape(2, 16)
    batch = {"tokens": tokens, "targets": tokens, "mask": np.ones((2, 16), np.float32)}
    step = lq.training.make_train_step(NextToken(model), optimizer)
    found = products(step.program.lower(state, batch).compile().as_text())
    layers = 1 if scan_layers else 2
    assert found.count(NARROW) == len(found) >= layers * 3 * 9 + 3
