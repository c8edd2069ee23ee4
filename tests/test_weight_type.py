"""Models whose parameters have two types, as GGUF files have them: matrices in 16 bits, vectors in float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.generation.request import Request
from llmq_jax.weight_type import weight_type
from tests.weights import draw_variables

GREEDY = lq.Sampler(temperature=0.0)


def small_model():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = lq.Llama3Config(vocab_size=64, max_position_embeddings=32, num_key_value_heads=1, head_dim=8, **sizes)
    return lq.LanguageModel(config, lq.build(config), draw_variables(config))


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def mixed(request):
    """(a model of both types, the type of its matrices). Norms come first among the parameters."""
    lm = small_model()
    dtype = jnp.dtype(request.param)

    def cast(path, leaf):
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    lm = lm.replace(variables=jax.tree_util.tree_map_with_path(cast, lm.variables))
    assert jax.tree.leaves(lm.params)[0].dtype == jnp.float32
    return lm, dtype


def test_most_elements_decide():
    few, many = np.ones(3, np.float32), np.ones((2, 2), np.float16)
    assert weight_type([few, many]) == np.float16
    assert weight_type([few, many, few]) == np.float32
    assert weight_type([np.ones(4, np.float16), np.ones(4, np.float32)]) == np.float32


def test_it_generates_with_caches_of_the_matrices_type(mixed):
    lm, dtype = mixed
    state = Request.create(lm, [[1, 2, 3]], 4, GREEDY, (), 0).start()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.caches)} == {dtype}
    found = lq.generate(lm, [[1, 2, 3]], max_new_tokens=4, sampler=GREEDY)
    assert found.logprobs.dtype == np.float32
    assert np.isfinite(found.logprobs).all() and found.lengths.tolist() == [4]


def test_it_says_so(mixed, tmp_path):
    lm, dtype = mixed
    assert f"parameters in {dtype}" in repr(lm)
    lq.save_hf(lm, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype.name
    assert {leaf.dtype for leaf in jax.tree.leaves(lq.load(tmp_path / "hf").params)} == {dtype, jnp.dtype("float32")}
