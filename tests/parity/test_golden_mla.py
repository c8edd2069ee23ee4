"""The original repository's latent attention: outputs and all gradients.

Its projections are apart where ours stand side by side: a head's content and its rotary features, of queries; the
latent and the shared rotary key; a head's keys and its values. All have biases. Its rotary key is made of x and not of
the latent, as ours and DeepSeek's. Its norm has epsilon = 1e-5 outside of the root, which no epsilon inside equals for
all x: what is left of the difference is far below the tolerance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmq_jax.layers.attention import Context
from llmq_jax.layers.caches import LatentCache
from llmq_jax.layers.positions import Rope, Rotation
from llmq_jax.models.deepseek3 import DeepSeekV3Config, latent_attention
from tests.parity.golden import read_golden

TOLERANCE = 3e-4


class Golden:
    def __init__(self, name):
        self.arrays, meta = read_golden(name)
        self.meta = meta
        self.heads, self.rotary = meta["num_heads"], meta["decoup_head_dim"]
        self.width = meta["d_out"] // self.heads
        self.layer = latent_attention(
            DeepSeekV3Config(
                num_attention_heads=self.heads,
                q_lora_rank=meta["q_rank"],
                kv_lora_rank=meta["kv_rank"],
                qk_nope_head_dim=self.width,
                qk_rope_head_dim=self.rotary,
                v_head_dim=self.width,
                # The names of its layout.
                rope_interleave=False,
                attention_bias=True,
                attention_up_bias=True,
            )
        )
        self.x = jnp.asarray(self.arrays["in/x"])

    def context(self, start=0, end=None):
        """Theirs repeat the cosines and sines of the pairs for both halves of a head."""
        batch, length, _ = self.x.shape
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))[:, start:end]
        halves = [jnp.asarray(self.arrays[f"in/{name}"][:, : self.rotary // 2])[positions] for name in ("cos", "sin")]
        return Context(positions, rotation=Rotation(*halves))

    def params(self, prefix):
        """Their weights, or gradients, as ours."""

        def kernel(name):
            return self.arrays[f"{prefix}{name}.weight"].T

        def bias(name):
            return self.arrays[f"{prefix}{name}.bias"]

        def of_heads(left, right):
            """Two projections that make heads, side by side in each head."""
            kernels, biases = (
                np.concatenate([x.reshape(*x.shape[:-1], self.heads, -1) for x in pair], axis=-1)
                for pair in ((kernel(left), kernel(right)), (bias(left), bias(right)))
            )
            return {"kernel": kernels, "bias": biases}

        return {
            "query_down": {"kernel": kernel("wq_down_proj"), "bias": bias("wq_down_proj")},
            "query_norm": {"scale": self.arrays[f"{prefix}q_rms_norm.scale"]},
            "query_up": of_heads("wq_up_proj", "wq_decoup"),
            "latent_down": {
                "kernel": np.concatenate([kernel("wkv_down_proj"), kernel("wk_decoup")], axis=1),
                "bias": np.concatenate([bias("wkv_down_proj"), bias("wk_decoup")]),
            },
            "latent_norm": {"scale": self.arrays[f"{prefix}kv_rms_norm.scale"]},
            "latent_up": of_heads("wk_up_proj", "wv_up_proj"),
            "out": {"kernel": kernel("out_proj"), "bias": bias("out_proj")},
        }


@pytest.fixture(scope="module", params=["mla", "mla_qrank1536"])
def golden(request):
    return Golden(request.param)


def test_their_tables_are_our_rotation(golden):
    cos, sin = (golden.arrays[f"in/{name}"] for name in ("cos", "sin"))
    positions = jnp.arange(len(cos))[None]
    rotation = Rope(float(golden.meta["rope_base"])).rotation(positions, golden.rotary)
    for theirs, ours in ((cos, rotation.cos), (sin, rotation.sin)):
        np.testing.assert_allclose(np.tile(ours[0], 2), theirs, rtol=0, atol=1e-6)


def test_outputs_and_gradients(golden):
    params = jax.tree.map(jnp.asarray, golden.params("param/"))

    def loss(params):
        mixed, cache = golden.layer.apply({"params": params}, golden.x, golden.context())
        assert cache is None
        return (mixed * golden.arrays["in/cotangent"]).sum(), mixed

    (value, mixed), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(mixed, golden.arrays["out/y"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(value, golden.arrays["out/loss"], rtol=0, atol=TOLERANCE)
    # Of the wide file the gradients of three matrices are cut short, to the first features of the queries' latent.
    kept = golden.meta.get("kept_of_q_rank")
    gradients["query_down"]["kernel"] = gradients["query_down"]["kernel"][:, :kept]
    gradients["query_up"]["kernel"] = gradients["query_up"]["kernel"][:kept]
    expected = golden.params("grad/")
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), gradients, expected)
    scale = golden.meta["fp32_vs_fp64"]["max_abs_grad"]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) == pytest.approx(scale, rel=1e-5)


def test_the_absorbed_form(golden):
    """A cache holds latents; what follows a prefix is computed from them."""
    variables = {"params": jax.tree.map(jnp.asarray, golden.params("param/"))}
    sizes = golden.layer.sizes
    cache = LatentCache.create(len(golden.x), golden.x.shape[1], sizes.cached_width, jnp.float32)
    apply = jax.jit(golden.layer.apply)
    start, found = 0, []
    for end in (5, 9, 10, 12):
        mixed, cache = apply(variables, golden.x[:, start:end], golden.context(start, end), cache)
        found.append(mixed)
        start = end
    np.testing.assert_allclose(np.concatenate(found, axis=1), golden.arrays["out/y"], rtol=0, atol=TOLERANCE)
    assert cache.latents.shape == (2, 12, golden.meta["kv_rank"] + golden.rotary)
