"""The changes that docs/attention.md shows, made as it says: what trains is what generates."""

import inspect
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.layers import attention, latent_attention, scaled_dot_product
from llmq_jax.layers.caches import FullCache
from llmq_jax.models import llama3, override
from llmq_jax.models.gemma import GLOBAL, LOCAL
from tests.models.test_own_model import shown  # noqa: F401  a fixture
from tests.weights import draw_variables

PAGE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
MARK = r"<!-- executed by tests/layers/test_changed_attention.py: ([\w-]+) -->\n```python\n(.*?)```"
LINES = dict(re.findall(MARK, PAGE, re.DOTALL))
SIZES = {
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "intermediate_size": 24,
}
LLAMA = lq.Llama3Config(vocab_size=37, num_key_value_heads=2, **SIZES)
GEMMA = lq.Gemma3Config(
    vocab_size=37, num_key_value_heads=2, head_dim=4, sliding_window=6, layer_types=(LOCAL, GLOBAL), **SIZES
)
DEEPSEEK = lq.DeepSeekV3Config(
    vocab_size=37,
    q_lora_rank=None,
    attention_up_bias=True,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=8,
    first_k_dense_replace=2,
    num_nextn_predict_layers=0,
    **SIZES,
)
SOFTMAX = "weights = jax.nn.softmax("
TEXT = [3, 1, 4, 1, 5, 9, 2, 6]


def changed(module, name, *edits):
    """A function or class of a module as its source would be after edits: (beginning of a line, lines, whether they
    stand in its place or before it)."""
    source = inspect.getsource(module)
    own = inspect.getsource(getattr(module, name))
    head, tail = source[: source.index(own)], source[source.index(own) :]
    for place, lines, replace in edits:
        (found,) = re.findall(rf"^ *{re.escape(place)}.*\n", own, re.MULTILINE)
        tail = tail.replace(found, lines + ("" if replace else found), 1)
    scope = {"__name__": module.__name__}
    exec(compile(head + tail, module.__file__, "exec"), scope)
    return scope[name]


@pytest.fixture
def change(monkeypatch):
    """`change(name)` edits the library as the page says."""

    def change(name):
        if name == "value-norm":
            place = "assert context.rotation is not None"
            edited = changed(llama3, "GroupedQueryAttention", (place, LINES[name], False))
            monkeypatch.setattr(llama3, "GroupedQueryAttention", edited)
        elif name == "alibi":
            edited = changed(attention, "plain_attention", ("return (formula or attend)(", LINES[name], True))
            for module in (attention, latent_attention):
                monkeypatch.setattr(module, "plain_attention", edited)
        elif name == "sink":
            edited = changed(scaled_dot_product, "attend", (SOFTMAX, LINES[name], True))
            monkeypatch.setattr(attention, "attend", edited)
        elif name == "learned-sink":
            given = "window=self.window,", "            sink=sink,\n", False
            parameter = "mixed, cache = attention(", LINES["sink-parameter"], False
            module = changed(llama3, "GroupedQueryAttention", given, parameter)
            monkeypatch.setattr(llama3, "GroupedQueryAttention", module)
            argument = "dropout_rate: float = 0.0,", LINES["sink-argument"], False
            edited = changed(scaled_dot_product, "attend", argument, (SOFTMAX, LINES[name], True))
            monkeypatch.setattr(attention, "attend", edited)

    return change


def lm_of(config, number, implementation):
    """Compiled programs are kept by the model's config, so each case has a vocabulary of its own."""
    config = override(config, vocab_size=config.vocab_size + number)
    return lq.LanguageModel(config, lq.build(config, attention=implementation), draw_variables(config, seed=1))


CASES = [("value-norm", LLAMA, "auto", 1), ("alibi", GEMMA, "plain", 2), ("sink", DEEPSEEK, "plain", 1)]
CASES += [("alibi", LLAMA, "plain by default", 2), ("learned-sink", LLAMA, "auto", 2)]


@pytest.mark.parametrize(("name", "config", "implementation", "rows"), CASES)
def test_what_is_changed_trains_and_generates(change, name, config, implementation, rows, monkeypatch):
    """Tokens that are drawn through caches have the log-probabilities of the whole pass, which are not those of the
    model as it was."""
    number = CASES.index((name, config, implementation, rows))
    if implementation == "auto":
        change(name)
        lm = lm_of(config, number, implementation)
    else:
        lm = lm_of(config, number, "plain" if implementation == "plain" else "auto")
        change(name)
        # Nothing else computes: neither the gradient by hand nor the softmax over latents.
        monkeypatch.setattr(attention, "lean_attend", None)
        monkeypatch.setattr(latent_attention, "attend_to_latents", None)
    if implementation == "plain by default":
        monkeypatch.setitem(attention.AUTOMATIC, "cpu", ("plain", "plain"))
    texts = [TEXT, TEXT[:3]][:rows]
    made = lq.generate(lm, texts, max_new_tokens=12, sampler=lq.Sampler(temperature=1.0))
    for row, text in enumerate(texts):
        tokens = made.tokens[row].tolist()
        whole = jax.nn.log_softmax(lm.logits([text + tokens])[0, len(text) - 1 : -1])
        np.testing.assert_allclose(made.logprobs[row], whole[np.arange(12), tokens], atol=1e-4)

    def loss(variables):
        logits = lm.model.apply(variables, jnp.asarray([TEXT]))
        return jnp.square(logits).mean(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(lm.variables)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradient["params"]))
    monkeypatch.undo()
    assert np.abs(logits - lm.model.apply(lm.variables, jnp.asarray([TEXT]))).max() > 1e-2


def test_alibi_is_its_formula(change):
    """By an einsum of its own: whole rows, of which one is packed."""
    change("alibi")
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 4, 9, 8)), "float32") for _ in range(3))
    segments = np.array([[1] * 9, [1] * 4 + [2] * 5])
    positions = np.array([[*range(9)], [*range(4), *range(5)]])
    context = attention.Context(jnp.asarray(positions), jnp.asarray(segments), implementation="plain")
    found = attention.self_attention(query, key, value, context, scale=0.4)
    seen = (segments[:, :, None] == segments[:, None]) & (np.arange(9) <= np.arange(9)[:, None])
    places = np.arange(9)[:, None] - np.arange(9)
    slopes = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    scores = jnp.einsum("bnth,bnsh->bnts", query, key) * 0.4 - slopes[:, None, None] * places
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    np.testing.assert_allclose(found, jnp.einsum("bnts,bnsh->bnth", weights, value), atol=1e-5)


def test_the_page_shows_these_changes():
    edits = {"value-norm", "alibi", "sink", "sink-parameter", "sink-argument", "learned-sink"}
    assert set(LINES) == edits


def test_a_formula_of_ones_own_runs_over_a_sequence_and_over_a_cache(shown):  # noqa: F811
    """That of docs/own_model.md, with shared heads of keys and values."""
    formula = partial(shown["top_keys"], keys=4)
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 9, heads, 8)), "float32") for heads in (4, 2, 2))

    def mixed(cache, first, last):
        places = jnp.broadcast_to(jnp.arange(first, last), (2, last - first))
        rows = (x[:, first:last] for x in (query, key, value))
        return attention.attention(*rows, attention.Context(places), cache, scale=8**-0.5, formula=formula)

    found, _ = mixed(None, 0, 9)
    scores = np.einsum("btngh,bsnh->bngts", query.reshape(2, 9, 2, 2, 8), key) * 8**-0.5
    scores = np.where(np.tril(np.ones((9, 9), bool)), scores, -np.inf)
    scores = np.where(scores < np.sort(scores)[..., -4, None], -np.inf, scores)
    expected = np.einsum("bngts,bsnh->btngh", jax.nn.softmax(scores), value).reshape(2, 9, 4, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)

    cache = FullCache.create(2, 12, 2, 8, jnp.float32)
    beginning, cache = mixed(cache, 0, 7)
    end, _ = mixed(cache, 7, 9)
    np.testing.assert_allclose(jnp.concatenate([beginning, end], axis=1), expected, atol=1e-5)


def test_only_the_formula_takes_arguments_of_its_own():
    rows = jnp.ones((1, 4, 2, 8))
    context = attention.Context(jnp.arange(4)[None], implementation="blocked")
    with pytest.raises(BadInput, match=r"attention='blocked' does not compute with sink; take 'plain' or 'auto'"):
        attention.attention(rows, rows, rows, context, scale=1.0, sink=jnp.zeros(2))
    with pytest.raises(BadInput, match=r"attention takes no 'windw'; did you mean window\?"):
        attention.attention(rows, rows, rows, context, scale=1.0, windw=3)
    attention.attention(rows, rows, rows, context, scale=1.0, formula=None)  # the default of a module's field
    plain = context.replace(implementation="plain")
    attention.attention(rows, rows, rows, plain, scale=1.0, formula=scaled_dot_product.attend)
