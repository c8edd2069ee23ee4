"""Log-probabilities of tokens, against the plain form; what does not count is not computed."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.objectives import logprobs
from llmq_jax.objectives.logprobs import completion_logprobs, greedy_logprobs, sequence_logprobs, token_logprobs
from tests.weights import draw_variables

CONFIG = lq.Llama3Config(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def lm(request):
    config = lq.models.override(CONFIG, tie_word_embeddings=request.param)
    return lq.build(config), draw_variables(config, seed=3)


def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (3, 20)).astype(np.int32)
    lengths = np.asarray([20, 7, 13], np.int32)
    mask = (rng.random((3, 20)) > 0.4).astype(np.float32)
    return tokens, mask, lengths


def plain(model, variables, tokens, temperature=1.0):
    """(log p(token), entropy) of all tokens but the first, with all logits at once."""
    logits = model.apply(variables, tokens)[:, :-1] / temperature
    all_logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(all_logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen, -(jnp.exp(all_logprobs) * all_logprobs).sum(-1)


@pytest.fixture
def small_chunks(monkeypatch):
    """Four tokens at a time."""
    monkeypatch.setattr(logprobs, "SHORTEST_CHUNK", 4)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", {"cpu": 1})


def test_values_and_gradients_are_those_of_the_plain_form(lm, small_chunks):
    model, variables = lm
    temperature = 0.7 if model.config.tie_word_embeddings else 1.0
    _, mask, lengths = rows()
    counted = (mask * (np.arange(20) < lengths[:, None]))[:, 1:]
    grads = np.random.default_rng(1).standard_normal((3, 19)).astype(np.float32)

    def ours(variables, tokens, mask, lengths):
        values = token_logprobs(model, variables, tokens, mask, lengths=lengths, temperature=temperature)
        return (grads * values).sum(), values

    def expected(variables, tokens):
        all_values = plain(model, variables, tokens, temperature)[0]
        values = all_values * counted
        return (grads * values).sum(), (values, all_values)

    @jax.jit
    def everything_of(variables, tokens, mask, lengths):
        return (
            jax.value_and_grad(ours, has_aux=True)(variables, tokens, mask, lengths),
            jax.value_and_grad(expected, has_aux=True)(variables, tokens),
            sequence_logprobs(model, variables, tokens, mask, lengths=lengths),
            token_logprobs(model, variables, tokens, temperature=temperature),
        )

    first, second, sums, everything = jax.tree.map(np.asarray, everything_of(variables, *rows()))
    ((_, values), gradients), ((_, (wanted, all_wanted)), wanted_gradients) = first, second
    assert 10 < (values != 0).sum() < 57
    np.testing.assert_allclose(values, wanted, atol=1e-6, rtol=0)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), gradients, wanted_gradients)
    if temperature == 1.0:
        np.testing.assert_allclose(sums, wanted.sum(-1), atol=1e-5, rtol=0)
    np.testing.assert_allclose(everything, all_wanted, atol=1e-6, rtol=0)


def test_completions_have_their_part_of_the_row(lm):
    model, variables = lm
    tokens, _, lengths = rows()
    prompts = np.asarray([4, 2, 9], np.int32)

    counted = (np.arange(1, 20) >= prompts[:, None]) & (np.arange(1, 20) < lengths[:, None])

    def found_of(variables, tokens, *lengths):
        found = completion_logprobs(model, variables, tokens, *lengths, 16)
        return found[1].sum(), found

    def expected_of(variables, tokens):
        expected = plain(model, variables, tokens)
        return (expected[1] * counted).sum(), expected

    @jax.jit
    def both(variables, tokens, *lengths):
        gradient_of = partial(jax.grad, has_aux=True)
        return gradient_of(found_of)(variables, tokens, *lengths), gradient_of(expected_of)(variables, tokens)

    (gradient, found), (wanted_gradient, expected) = jax.tree.map(np.asarray, both(variables, tokens, lengths, prompts))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), gradient, wanted_gradient)  # of entropies
    (values, entropies, counts), (wanted, wanted_entropies) = found, expected
    assert values.shape == entropies.shape == (3, 16)
    assert counts == {"group_0": {"block_0": {}}}
    for row, (start, end) in enumerate(zip(prompts, lengths, strict=True)):
        count = int(end - start)
        np.testing.assert_allclose(values[row, :count], wanted[row, start - 1 : end - 1], atol=1e-6, rtol=0)
        np.testing.assert_allclose(
            entropies[row, :count], wanted_entropies[row, start - 1 : end - 1], atol=1e-5, rtol=0
        )
        assert not values[row, count:].any()
        assert not entropies[row, count:].any()


def test_entropies_that_need_no_gradient_are_not_differentiated(lm):
    """Beside log-probabilities that learn, they cost an exponential forward, and none backward."""
    model, variables = lm
    tokens, _, lengths = map(jnp.asarray, rows())

    def exponentials(entropies):
        def loss(variables):
            found = completion_logprobs(model, variables, tokens, lengths, lengths - 5, 5, entropies=entropies)
            return found[0].sum(), found[1:]

        program = jax.jit(jax.grad(loss, has_aux=True)).lower(variables).compile()
        return program.cost_analysis()["transcendentals"]

    assert exponentials(True) - exponentials(False) < 1.5 * 15 * 61


WINDOW = {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention")}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 2}
SIZES = {name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1}
SHARING = {
    "gpt2": lq.GPT2Config(**SIZES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "llama": lq.Llama3Config(**SIZES, num_key_value_heads=1, intermediate_size=24),
    # Windows, and scores with a cap, of padding that sees no key.
    "gemma2": lq.Gemma2Config(**SIZES, **WINDOW, num_key_value_heads=1, head_dim=8, intermediate_size=24),
    "deepseek": lq.DeepSeekV3Config(**SIZES, **LATENT, q_lora_rank=None, intermediate_size=24, n_group=1, topk_group=1),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpt2", {}), ("llama", {"scan_layers": False}), ("llama", {"remat": "full"}), ("gemma2", {}), ("deepseek", {})],
    ids=str,
)
def test_answers_go_on_from_one_reading_of_their_prompt(name, options):
    """Values and gradients are those of rows that each read their own, from prompts of one token to some longer than a
    window."""
    model, variables = lq.build(SHARING[name], **options), draw_variables(SHARING[name], seed=3)
    rng = np.random.default_rng(0)
    prompt_lengths = np.repeat(np.asarray([9, 1, 4], np.int32), 2)
    lengths = prompt_lengths + np.asarray([11, 3, 8, 0, 1, 7], np.int32)
    tokens = rng.integers(0, 61, (6, 24)).astype(np.int32)
    prompts = np.repeat(tokens[::2, :12], 2, axis=0)
    tokens[:, :12] = np.where(np.arange(12) < prompt_lengths[:, None], prompts, tokens[:, :12])
    grads = rng.standard_normal((2, 6, 11)).astype(np.float32)

    @partial(jax.jit, static_argnames="group_size")
    @partial(jax.value_and_grad, has_aux=True)
    def value(variables, *rows, **shared):
        values, entropies, _ = completion_logprobs(model, variables, *rows, 11, temperature=0.8, **shared)
        return (grads * jnp.stack([values, entropies])).sum(), (values, entropies)

    rows = tokens, lengths, prompt_lengths
    (_, found), gradients = value(variables, *rows, prompts=prompts, group_size=2)
    (_, expected), expected_gradients = value(variables, *rows)
    assert (expected[0] != 0).sum() == 30
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=0)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(float(np.abs(other).max()), 1e-3), rtol=0)


@pytest.mark.parametrize("computes_in", [None, "float32"])
def test_prompts_are_held_in_the_type_that_is_computed_in(lm, computes_in):
    """Of weights in bfloat16 that is theirs, unless another is asked for."""
    held = []

    class Recording(lq.Llama3):
        def create_caches(self, batch, length, dtype, lookahead=0):
            held.append(jnp.dtype(dtype))
            return super().create_caches(batch, length, dtype, lookahead)

    model, variables = lm
    model = Recording(model.config, dtype=computes_in and jnp.dtype(computes_in))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    tokens, _, lengths = map(jnp.asarray, rows())
    prompt_lengths = jnp.full(3, 4)
    shared = {"prompts": tokens[:, :4], "group_size": 1}
    jax.eval_shape(lambda v: completion_logprobs(model, v, tokens, lengths, prompt_lengths, 16, **shared), variables)
    assert held == [jnp.dtype(computes_in or jnp.bfloat16)]


def test_what_does_not_count_is_not_unembedded(lm, small_chunks):
    model, variables = lm
    tokens, _, _ = rows()
    mask = np.zeros((3, 20), np.float32)
    mask[1, 5:9] = 1
    unembedded = []

    class Counting(lq.Llama3):
        def unembed(self, hidden):
            jax.debug.callback(lambda: unembedded.append(len(hidden)))
            return super().unembed(hidden)

    values = jax.jit(partial(token_logprobs, Counting(model.config)))(variables, tokens, mask)
    jax.effects_barrier()
    assert (values != 0).sum() == 4
    assert unembedded == [4]


def test_rows_of_one_token_have_no_log_probability(lm):
    model, variables = lm

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def total(variables):
        values = token_logprobs(model, variables, jnp.zeros((3, 1), jnp.int32))
        return values.sum(), values

    (_, values), gradients = total(variables)
    assert values.shape == (3, 0) and not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_no_logits_of_all_tokens_exist_and_no_copies_of_the_head(lm, small_chunks):
    model, variables = lm

    def loss(variables, tokens, mask, lengths):
        return token_logprobs(model, variables, tokens, mask, lengths=lengths).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(variables, *rows()))
    assert "f32[4,61]" in program
    assert not any(shape in program for shape in ("f32[3,19,61]", "f32[3,20,61]", "f32[57,61]", "f32[15,4,61]"))
    copies_of_the_head = r"f32\[15,(1,)?(61,16|16,61)\]"  # one for each chunk, which the backward pass would read
    assert not re.search(copies_of_the_head, program)


def test_a_fixed_head_gets_no_gradient(lm, small_chunks):
    model, variables = lm
    tokens, mask, lengths = map(jnp.asarray, rows())
    name = "token_embedding" if model.config.tie_word_embeddings else "lm_head"
    learned = {module: leaf for module, leaf in variables["params"].items() if module != name}

    def loss(params):
        params = {**variables["params"], **params}
        return token_logprobs(model, {"params": params}, tokens, mask, lengths=lengths).sum()

    gradients = jax.jit(jax.grad(loss))
    found, all_of_them = gradients(learned), gradients(variables["params"])
    for ours, expected in zip(
        jax.tree.leaves(found), jax.tree.leaves({k: all_of_them[k] for k in learned}), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    of_head = re.compile(r"f32\[1,(61,16|16,61)\]")  # summed over chunks
    assert of_head.search(str(jax.make_jaxpr(gradients)(variables["params"])))
    assert not of_head.search(str(jax.make_jaxpr(gradients)(learned)))


def test_several_rows_of_targets_follow_one_of_tokens(lm, small_chunks):
    """And of each target it is told whether the model would have taken it."""
    model, variables = lm
    tokens, mask, lengths = rows()
    logprobs = np.asarray(jax.jit(lambda variables: jax.nn.log_softmax(model.apply(variables, tokens)))(variables))
    follows = np.asarray([2, 0, 0, 1], np.int32)
    likeliest = logprobs.argmax(-1)[follows].astype(np.int32)
    targets = np.where(np.arange(20) % 3 == 0, likeliest, tokens[follows])
    counted = (mask[np.asarray([0, 1, 2, 0])] > 0) & (np.arange(20) < lengths[follows][:, None])
    found, greedy = jax.jit(partial(greedy_logprobs, model))(variables, tokens, lengths, follows, targets, counted)
    wanted = np.take_along_axis(logprobs[follows], targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, wanted * counted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(greedy, (targets == likeliest) & counted)
    assert greedy.any()
