import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from llmq_jax.errors import BadInput
from llmq_jax.layers.attention import Choice, Context, attention, choose, query_blocks, reads_plainly, self_attention
from llmq_jax.layers.axes import MESH_AXES
from llmq_jax.layers.latent_attention import attend_to_latents
from llmq_jax.layers.recomputation import POLICIES
from llmq_jax.layers.scaled_dot_product import attend, lean_attend, visible
from llmq_jax.layers.window_attention import window_block, window_blocks
from llmq_jax.models.decoder import segments_of


def places(context: Context):
    return context.positions, context.segment_ids


def draw(seed: int, heads: int = 4, groups: int = 2, length: int = 11):
    rng = np.random.default_rng(seed)
    shapes = [(2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    return [jnp.asarray(2.0 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def by_hand(query, key, value, positions, segments, scale, window=None, softcap=None):
    """Row by row in NumPy: softmax over the keys that the definition allows."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    repeat = query.shape[1] // key.shape[1]
    for b, n, t in np.ndindex(query.shape[:3]):
        allowed = [
            s
            for s in range(key.shape[2])
            if segments[b][s] == segments[b][t]
            and positions[b][s] <= positions[b][t]
            and (window is None or positions[b][s] > positions[b][t] - window)
        ]
        scores = np.array([query[b, n, t] @ key[b, n // repeat, s] for s in allowed]) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, n, t] = sum(w * value[b, n // repeat, s] for w, s in zip(weights, allowed, strict=True))
    return out


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
ROWS = Context(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
PLAIN = {"scale": 0.4, "softcap": None, "dropout_rate": 0.0}


def assert_equal_with_gradients(found, expected, inputs, weights=1.0):
    """Two functions of (query, key, value), where `weights` asks."""

    def measure(function):
        return jax.jit(jax.value_and_grad(lambda inputs: jnp.sum(weights * jnp.sin(function(*inputs)))))(inputs)

    (value, grads), (reference, wanted) = measure(found), measure(expected)
    np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-4)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("block", [3, 4, 11])
def test_packed_and_padded_rows_equal_the_definition(block):
    inputs = draw(0)
    found = jax.jit(lambda *inputs: query_blocks(*inputs, ROWS, block, **PLAIN))(*inputs)
    np.testing.assert_allclose(found, by_hand(*inputs, POSITIONS, SEGMENTS, 0.4), atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (2, 3.0), (4, None), (4, 3.0), (11, 3.0), (20, None)])
@pytest.mark.parametrize("implementation", ["plain", "masked"])
def test_windows_and_softcaps_equal_the_definition(implementation, window, softcap):
    inputs, rows = draw(0), ROWS.replace(implementation=implementation)
    mixed = jax.jit(lambda *inputs: self_attention(*inputs, rows, scale=0.4, window=window, softcap=softcap))
    found = mixed(*inputs)
    expected = by_hand(*inputs, POSITIONS, SEGMENTS, 0.4, window, softcap)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("groups", "block", "softcap"), [(1, 4, None), (2, 11, 3.0), (4, 4, 3.0), (4, 11, None)])
def test_lean_blocks_equal_the_formula_with_gradients(groups, block, softcap):
    mask = visible(ROWS.positions, ROWS.positions, ROWS.segment_ids, ROWS.segment_ids)
    assert_equal_with_gradients(
        lambda *inputs: query_blocks(*inputs, ROWS, block, **{**PLAIN, "softcap": softcap}),
        lambda *inputs: attend(*inputs, mask, scale=0.4, softcap=softcap),
        draw(1, groups=groups),
    )


def long_rows(kind: str) -> Context:
    """Rows of 37 tokens: one document; three, the last one padded; padding before a document and after it."""
    if kind == "plain":
        return Context(jnp.broadcast_to(jnp.arange(37), (2, 37)))
    runs = {"packed": [(1, 20), (2, 3), (3, 11), (0, 3)], "padded": [(0, 6), (1, 27), (0, 4)]}[kind]
    segments = np.repeat(*np.array(runs).T)
    positions = np.concatenate([np.arange(count) for _, count in runs])
    other = np.r_[0:33, 0:4], np.where(np.arange(37) < 33, 1, 0)
    pairs = zip((positions, segments), other, strict=True)
    return Context(*(jnp.asarray(np.stack(pair), jnp.int32) for pair in pairs))


@pytest.mark.parametrize(
    ("kind", "window", "block", "groups", "softcap"),
    [
        ("plain", 1, 4, 2, None),
        ("packed", 5, 4, 1, 3.0),
        ("padded", 16, 8, 4, None),
        ("packed", 9, 64, 2, 3.0),
        ("plain", 37, 8, 2, None),
        ("padded", 50, 16, 1, None),
        ("packed", 1, 4, 2, None),
        ("plain", 5, 4, 1, 3.0),
        ("packed", 16, 8, 4, None),
    ],
)
@pytest.mark.product
def test_window_blocks_equal_the_mask_with_gradients(kind, window, block, groups, softcap):
    """Any length, longer and shorter than the window. What padding sees is nobody's business."""
    context = long_rows(kind)
    real = 1.0 if context.segment_ids is None else (context.segment_ids != 0)[:, None, :, None]
    masked = context.replace(implementation="masked")
    assert_equal_with_gradients(
        lambda *inputs: window_blocks(*inputs, places(context), block, window, **{**PLAIN, "softcap": softcap}),
        lambda *inputs: self_attention(*inputs, masked, scale=0.4, window=window, softcap=softcap),
        draw(4, groups=groups, length=37),
        real,
    )


@pytest.mark.parametrize("length", [40, 150, 200])
def test_implementations_by_name_are_equal(length):
    """Shorter than a block, a few windows long, and many."""
    inputs = draw(5, length=length)
    context = Context(jnp.broadcast_to(jnp.arange(length), (2, length)))

    def mixed(implementation, window):
        chosen = context.replace(implementation=implementation)
        return lambda *inputs: self_attention(*inputs, chosen, scale=0.4, window=window)

    for window in (None, 66, 70):  # of 66 tokens, the last two of which are in the block before the one before
        for implementation in ("masked", "blocked"):
            assert_equal_with_gradients(mixed(implementation, window), mixed("plain", window), inputs)


def test_plain_packed_and_padded_rows_have_the_gradients_of_masked():
    """Padding included: both have it see itself."""
    context = long_rows("packed")

    def mixed(implementation):
        rows = context.replace(implementation=implementation)
        return lambda *inputs: self_attention(*inputs, rows, scale=0.4, window=9, softcap=3.0)

    assert_equal_with_gradients(mixed("plain"), mixed("masked"), draw(4, length=37))


def test_plain_drops_the_weights_that_masked_drops():
    options = {"scale": 0.3, "window": 6, "dropout_rate": 0.25, "dropout_key": jax.random.key(3)}
    plain, masked = (
        self_attention(*draw(2), ROWS.replace(implementation=name), **options) for name in ("plain", "masked")
    )
    np.testing.assert_array_equal(plain, masked)


def test_a_bias_is_added_to_the_scores_of_each_head():
    """After the softcap, which would bound it."""
    query, key, value = draw(1, groups=2)
    bias = jnp.broadcast_to(-jnp.arange(1.0, 5.0)[:, None, None] * jnp.arange(11.0), (2, 4, 11, 11))
    found = attend(query, key, value, jnp.ones((2, 11, 11), bool), scale=0.4, softcap=3.0, bias=bias)
    keys, values = (jnp.repeat(x, 2, axis=1) for x in (key, value))
    scores = 3.0 * jnp.tanh(jnp.einsum("bnth,bnsh->bnts", query, keys) * 0.4 / 3.0)
    expected = jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores + bias), values)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_window_blocks_in_bfloat16():
    inputs = [x.astype(jnp.bfloat16) for x in draw(3, length=37)]
    context = long_rows("packed")
    found = window_blocks(*inputs, places(context), 8, 5, **PLAIN)
    assert found.dtype == jnp.bfloat16
    expected = self_attention(
        *(x.astype(jnp.float32) for x in inputs), context.replace(implementation="masked"), scale=0.4, window=5
    )
    real = np.asarray(context.segment_ids != 0)[:, None, :, None]
    np.testing.assert_allclose(real * found.astype(jnp.float32), real * expected, atol=0.1)


@pytest.mark.parametrize("narrow", [(0, 1, 2), (1, 2)])
def test_gradients_of_window_blocks_in_bfloat16(narrow):
    """Of all inputs, or of keys and values alone; a key's is a sum over four blocks."""
    exact = draw(3, length=37)
    inputs = [x.astype(jnp.bfloat16) if place in narrow else x for place, x in enumerate(exact)]
    context = long_rows("plain")

    def gradients(inputs, mix):
        return jax.jit(jax.grad(lambda inputs: jnp.square(mix(*inputs).astype(jnp.float32)).sum()))(inputs)

    def masked(*inputs):
        return self_attention(*inputs, context.replace(implementation="masked"), scale=0.4, window=9)

    found = gradients(inputs, lambda *inputs: window_blocks(*inputs, places(context), 3, 9, **PLAIN))
    for ours, theirs, true, given in zip(
        found, gradients(inputs, masked), gradients(exact, masked), inputs, strict=True
    ):
        assert ours.dtype == given.dtype
        assert jnp.abs(ours - true).mean() < 1.5 * jnp.abs(theirs - true).mean()


def test_memory_of_a_window_is_linear_in_the_length():
    """Forward and back, in what the compiled program allocates."""

    def temporary(length, window):
        rows = Context(jnp.broadcast_to(jnp.arange(length), (1, length)), implementation="blocked")
        shape = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
        loss = jax.grad(lambda *x: self_attention(*x, rows, scale=1.0, window=window).sum(), (0, 1, 2))
        return jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(512, 16), temporary(2048, 16)
    assert long < 4.4 * short
    assert long < temporary(2048, None) / 5


@pytest.mark.parametrize(("window", "most"), [(16, 4 * 2 * 256 * 8), (None, 2 * 2 * 256 * 256)])
def test_what_a_layer_keeps_for_its_backward_pass(window, most):
    """Of a window nothing for each block, and else the exponentials in the type of the values."""
    rows = Context(jnp.arange(256)[None], implementation="blocked" if window else "masked")
    mix = jax.checkpoint(lambda *x: self_attention(*x, rows, scale=1.0, window=window), policy=POLICIES["none"])
    inputs = [jax.ShapeDtypeStruct((1, 2, 256, 8), jnp.bfloat16)] * 3
    kept = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(mix, *inputs)[1], *inputs))
    assert max(leaf.size * leaf.dtype.itemsize for leaf in kept) == most


def test_first_and_second_derivatives_of_lean_attention_equal_the_formulas():
    """With a softcap, keys that a query does not see, and a query that sees none."""
    query, *rows = draw(5, length=5)
    mask = jnp.tril(jnp.ones((2, 5, 5), bool)).at[0, 3].set(False)

    def derivatives(formula):
        first = jax.grad(lambda query: jnp.sin(formula(query, *rows, mask, scale=0.4, softcap=3.0)).sum())
        return jax.jit(first)(query), jax.jit(jax.grad(lambda query: jnp.square(first(query)).sum()))(query)

    for found, expected in zip(derivatives(lean_attend), derivatives(attend), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_lean_attention_in_bfloat16_is_about_as_near_as_the_formula():
    inputs = [x.astype(jnp.bfloat16) for x in draw(3)]
    mask = jnp.tril(jnp.ones((2, 11, 11), bool))

    def gradients(function, inputs):
        return jax.jit(jax.grad(lambda inputs: function(inputs).astype(jnp.float32).sum()))(inputs)

    for softcap in (None, 3.0):

        def plain(inputs, softcap=softcap):
            return attend(*inputs, mask, scale=0.3, softcap=softcap)

        def lean(inputs, softcap=softcap):
            return lean_attend(*inputs, mask, 0.3, softcap)

        exact = gradients(plain, [x.astype(jnp.float32) for x in inputs])
        for ours, theirs, true in zip(gradients(lean, inputs), gradients(plain, inputs), exact, strict=True):
            assert ours.dtype == jnp.bfloat16
            assert jnp.abs(ours - true).mean() < 2 * jnp.abs(theirs - true).mean()


def test_scores_of_arrays_in_bfloat16_are_not_rounded():
    """To 8 bits, those of 100 would be off by a quarter."""
    inputs, mask = [x.astype(jnp.bfloat16) for x in draw(3)], jnp.tril(jnp.ones((2, 11, 11), bool))
    exact = attend(*(x.astype(jnp.float32) for x in inputs), mask, scale=3.0)
    for found in (attend(*inputs, mask, scale=3.0), lean_attend(*inputs, mask, 3.0)):
        np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.04)
    query, latents = inputs[0].swapaxes(1, 2), inputs[1][:, 0]
    exact = attend_to_latents(query.astype(jnp.float32), latents.astype(jnp.float32), mask, 3.0)
    np.testing.assert_allclose(attend_to_latents(query, latents, mask, 3.0).astype(jnp.float32), exact, atol=0.04)


def test_dropout_keeps_the_mean_and_follows_its_key():
    query, key, value = draw(2)
    context = Context(jnp.broadcast_to(jnp.arange(11), (2, 11)))

    def dropped(seed):
        return self_attention(
            query, key, value, context, scale=0.3, dropout_rate=0.25, dropout_key=jax.random.key(seed)
        )

    plain = self_attention(query, key, value, context, scale=0.3)
    assert not np.allclose(dropped(0), plain)
    np.testing.assert_array_equal(dropped(0), dropped(0))
    mean = jax.jit(lambda: jax.lax.map(dropped, jnp.arange(4000)).mean(0))()
    np.testing.assert_allclose(mean, plain, atol=0.15)


def test_each_block_of_queries_drops_weights_of_its_own(monkeypatch):
    keys = []

    def noted(query, key, value, mask, *, dropout_key, **options):
        keys.append(tuple(jax.random.key_data(dropout_key).tolist()))
        return query

    monkeypatch.setattr("llmq_jax.layers.attention.attend", noted)
    query_blocks(*draw(2), ROWS, 4, dropout_key=jax.random.key(0), scale=0.3, dropout_rate=0.25)
    assert len(set(keys)) == 3


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_in_window_blocks_drops_weights_of_the_band(softcap):
    """Against the whole band with the very weights dropped that the blocks draw, forward and back."""
    context, block, window, rate = long_rows("plain"), 8, 12, 0.3
    root = jax.random.key(7)
    keep = np.zeros((2, 2, 2, 40, 56), bool)  # queries in whole blocks, keys behind two more
    for index in range(5):
        draws = jax.random.bernoulli(jax.random.fold_in(root, index), 1 - rate, (2, 2, 2, 8, 24))
        keep[..., index * 8 : index * 8 + 8, index * 8 : index * 8 + 24] = draws
    keep = keep[..., :37, 16 : 16 + 37]
    mask = visible(context.positions, context.positions, window=window)[:, None, None]

    def by_mask(query, key, value):
        scores = jnp.einsum("bkgth,bksh->bkgts", query.reshape(2, 2, 2, 37, 8), key) * 0.4
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bkgts,bksh->bkgth", jnp.where(keep, weights / (1 - rate), 0.0), value)
        return mixed.reshape(2, 4, 37, 8)

    options = {"scale": 0.4, "softcap": softcap, "dropout_rate": rate}
    assert_equal_with_gradients(
        lambda *inputs: window_blocks(*inputs, places(context), block, window, root, **options),
        by_mask,
        draw(6, length=37),
    )


# Which implementation.

LAYER = {"widths": (64, 64), "dtype": jnp.bfloat16}
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
TPU_V4 = SimpleNamespace(platform="tpu", device_kind="TPU v4")
OLD_TPU = SimpleNamespace(platform="tpu", device_kind="TPU v3")
OTHER = SimpleNamespace(platform="METAL", device_kind="Metal")
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
AMPERE = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
BLACKWELL = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")
RUNS_ON = "it is a kernel of NVIDIA GPUs from Ampere and of TPUs from v4 on"
OTHER_GPU = SimpleNamespace(platform="gpu", device_kind="AMD", compute_capability="gfx942")


@pytest.mark.parametrize(
    ("expected", "device", "window", "more"),
    [
        ("blocked", CPU, None, {}),
        ("blocked", CPU, 64, {}),
        ("masked", CPU, None, {"dropout": True}),
        ("blocked", CPU, 64, {"dropout": True}),
        ("fused", HOPPER, None, {}),
        ("masked", HOPPER, None, {"dtype": jnp.float32}),
        ("masked", HOPPER, None, {"dropout": True}),
        ("masked", HOPPER, None, {"softcap": 50.0}),
        ("masked", OTHER_GPU, None, {}),
        ("fused", HOPPER, 64, {}),
        ("fused", HOPPER, 64, {"widths": (256, 256)}),
        ("blocked", AMPERE, 64, {"widths": (256, 256)}),
        ("fused", BLACKWELL, 64, {"widths": (128, 128)}),
        ("blocked", BLACKWELL, 64, {"widths": (256, 256)}),
        ("masked", BLACKWELL, None, {"widths": (192, 128)}),
        ("blocked", HOPPER, 64, {"dropout": True}),
        ("blocked", HOPPER, 64, {"softcap": 50.0}),
        ("blocked", HOPPER, 64, {"dtype": jnp.float32}),
        ("blocked", OTHER_GPU, 64, {}),
        ("fused", TPU_V4, 64, {}),
        ("fused", TPU, None, {"dtype": jnp.float32, "softcap": 50.0, "widths": (80, 96)}),
        ("masked", TPU, None, {"dropout": True}),
        ("masked", TPU, None, {"dtype": jnp.float16}),
        ("masked", OLD_TPU, None, {}),
        ("blocked", OLD_TPU, 64, {}),
        ("masked", OTHER, None, {}),
        ("blocked", OTHER, 64, {}),
    ],
)
def test_what_auto_takes(expected, device, window, more):
    assert choose("auto", window=window, device=device, **{**LAYER, **more}).name == expected


@pytest.mark.parametrize("device", [CPU, HOPPER, TPU])
def test_auto_is_plain_where_someone_writes_so(device, monkeypatch):
    """Dropout or not, in prompts and where caches are read."""
    monkeypatch.setattr("llmq_jax.layers.attention.AUTOMATIC", dict.fromkeys(("cpu", "gpu", "tpu"), ("plain", "plain")))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    for window in (None, 64):
        for dropout in (False, True):
            assert choose("auto", window=window, dropout=dropout, **LAYER).name == "plain"
        assert reads_plainly("auto", window is not None) and not reads_plainly("masked", window is not None)


@pytest.mark.parametrize(
    ("device", "more", "message"),
    [
        (CPU, {}, f"attention='fused' cannot run: {RUNS_ON}, and this is cpu; take 'blocked' or 'auto'"),
        (OTHER_GPU, {}, f"{RUNS_ON}, and this is AMD"),
        (OLD_TPU, {}, f"{RUNS_ON}, and this is TPU v3"),
        (TPU, {"dropout": True}, "it has no dropout"),
        (TPU, {"dtype": jnp.float16}, "it computes in bfloat16 or float32, not in float16"),
        (HOPPER, {"dtype": jnp.float32}, "it computes in bfloat16 (--dtype bfloat16) or float16, not in float32"),
        (HOPPER, {"softcap": 50.0}, "it has no softcap"),
        (HOPPER, {"dropout": True}, "it has no dropout"),
        (HOPPER, {"widths": (12, 12)}, "a multiple of 8 features, here at most 256, not 12"),
        (AMPERE, {"widths": (256, 256)}, "a multiple of 8 features, here at most 128, not 256"),
    ],
)
def test_the_fused_kernel_asked_for_by_name_runs_or_fails(device, more, message):
    assert choose("fused", window=64, device=HOPPER, **LAYER).name == "fused"
    with pytest.raises(BadInput) as error:
        choose("fused", window=64, device=device, **{**LAYER, **more})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_fused_kernel_wants_keys_divided_as_queries_are():
    """On a mesh whose tensor axis divides the heads of queries alone JAX would refuse its call."""
    for parts, heads, expected in (
        (2, (4, 2), "fused"),
        (2, (4, 1), "masked"),
        (3, (4, 2), "fused"),
        (1, (4, 1), "fused"),
    ):
        mesh = AbstractMesh((1, 1, 1, parts), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
        with jax.sharding.use_abstract_mesh(mesh):
            assert choose("auto", window=None, device=HOPPER, heads=heads, **LAYER).name == expected
            if expected == "masked":
                with pytest.raises(BadInput, match="divided alike, and tensor=2 divides 4, not 1"):
                    choose("fused", window=None, device=HOPPER, heads=heads, **LAYER)


def test_a_layer_asks_for_what_it_computes(monkeypatch):
    asked = []
    monkeypatch.setattr("llmq_jax.layers.attention.choose", lambda _, **facts: asked.append(facts) or Choice("plain"))
    query, key, value = draw(0)
    self_attention(query, key, value[..., :4], ROWS, scale=0.4, window=5, softcap=3.0)
    facts = {"window": 5, "widths": (8, 4), "dtype": jnp.float32, "softcap": 3.0, "dropout": False, "heads": (4, 2)}
    assert asked == [facts]


def test_an_unknown_implementation():
    with pytest.raises(BadInput, match="attention='blokced' is unknown; did you mean blocked"):
        choose("blokced", window=None, **LAYER)


@pytest.mark.parametrize(
    ("kind", "window", "length"),
    [("plain", None, 36), ("plain", 5, 35), ("packed", 5, 36), ("packed", 5, 35), ("padded on the right", 5, 35)],
)
def test_what_the_fused_kernel_is_asked_for(kind, window, length, monkeypatch):
    """The call with another implementation in the kernel's place: masks, window and scale mean the same. Its masks have
    even lengths, and padding on the right needs none."""
    if kind == "padded on the right":
        segments, context = segments_of(np.array([35, 21]), 35), long_rows("plain")
        context = context.replace(positions=context.positions[:, :35], segment_ids=segments, padded_on_the_right=True)
        real = segments[..., None, None] != 0
    else:
        context, real = jax.tree.map(lambda fact: fact[:, :length], long_rows(kind)), True
    inputs = [x.swapaxes(1, 2).astype(jnp.bfloat16) for x in draw(8, length=length)]
    expected, _ = attention(*inputs, context.replace(implementation="masked"), scale=0.4, window=window)
    kernel, calls, unused = jax.nn.dot_product_attention, [], jax.random.key(0)  # a key alone drops nothing

    def other(*args, implementation, mask, **options):
        calls.append((implementation, mask is not None and mask.shape[-2:]))
        return kernel(*args, implementation="xla", mask=mask, **options)

    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr(jax.nn, "dot_product_attention", other)
    fused = context.replace(implementation="fused")
    found, _ = attention(*inputs, fused, scale=0.4, window=window, dropout_key=unused)
    assert calls == [("cudnn", kind == "packed" and (36, 36))]
    difference = jnp.where(real, found.astype(jnp.float32) - expected.astype(jnp.float32), 0)
    np.testing.assert_allclose(difference, 0, atol=0.06)


def test_narrow_values_are_filled_up_for_the_fused_kernel(monkeypatch):
    """As MLA's are; the call with another implementation in the kernel's place."""
    context = jax.tree.map(lambda fact: fact[:, :36], long_rows("plain"))
    query, key, value = (x.swapaxes(1, 2).astype(jnp.bfloat16) for x in draw(8, length=36))
    narrow = value[..., : value.shape[-1] // 2]
    expected, _ = attention(query, key, narrow, context.replace(implementation="masked"), scale=0.4)
    kernel, widths = jax.nn.dot_product_attention, []

    def other(*args, implementation, **options):
        widths.append([x.shape[-1] for x in args])
        return kernel(*args, implementation="xla", **options)

    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr(jax.nn, "dot_product_attention", other)
    newer = SimpleNamespace()  # of a JAX that has not what is changed for the call
    monkeypatch.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", newer)
    found, _ = attention(query, key, narrow, context.replace(implementation="fused"), scale=0.4)
    assert not vars(newer)
    assert widths == [[query.shape[-1]] * 3] and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.06)


@pytest.mark.parametrize(("kind", "length"), [("plain", 36), ("plain", 35), ("packed", 36), ("packed", 35)])
def test_the_fused_kernel_is_in_the_program_for_a_gpu(kind, length, monkeypatch):
    """Forward and back, with its window, and without a gradient of its mask; lowered here, not run."""
    context = jax.tree.map(lambda fact: fact[:, :length], long_rows(kind)).replace(implementation="fused")
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def loss(*inputs):
        return attention(*inputs, context, scale=0.4, window=5)[0].astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, length, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in program.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2 and "Backward" in calls[1]
    for call in calls:
        plain = call.replace("\\22", "")
        assert "sliding_window_length: 5" in plain and "mask_type: CAUSAL" in plain, plain
    results = calls[1].rpartition("->")[2]
    assert results.count("tensor<") == 4, results  # of queries, keys and values, and cuDNN's own
    assert sys.modules["jax._src.cudnn.fused_attention_stablehlo"].should_export_dbias.__name__ != "<lambda>"


def test_blocks_of_a_window():
    assert [window_block(window) for window in (1, 100, 200, 512, 4096)] == [64, 64, 100, 256, 256]
