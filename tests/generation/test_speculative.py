"""Drafts change how fast tokens come, not which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.generation.request import Request
from llmq_jax.generation.speculative import accept

GREEDY = lq.Sampler(temperature=0.0)
SIZES = {"vocab_size": 50, "max_position_embeddings": 64, "hidden_size": 16, "num_attention_heads": 2}
CONFIGS = {
    "llama": lq.Llama3Config(**SIZES, num_hidden_layers=2, num_key_value_heads=1, intermediate_size=24),
    # Rings of 6 + lookahead slots, from which drafts are taken back.
    "gemma": lq.Gemma3Config(
        **SIZES, num_hidden_layers=3, num_key_value_heads=1, head_dim=8, intermediate_size=24, sliding_window=6
    ),
}
# Its frequencies go by the length of the document: what a draft makes it must not matter.
BY_LENGTH = {"rope_type": "dynamic", "original_max_position_embeddings": 12, "factor": 4.0}
CONFIGS["dynamic"] = dataclasses.replace(CONFIGS["llama"], rope_parameters=BY_LENGTH)
DEEPSEEK = lq.DeepSeekV3Config(
    **SIZES,
    num_hidden_layers=2,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
# Of few tokens, modules that have learned nothing draft the right one now and then.
OFTEN_RIGHT = dataclasses.replace(DEEPSEEK, vocab_size=10)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [1, 8, 2, 8]]


@functools.cache
def draw(config, seed=0, scale=8.0, eos=()):
    """A model whose choices are clear."""
    variables = lq.init(config, seed)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * scale if leaf.ndim > 2 else leaf, variables["params"])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return lq.LanguageModel(
        config, lq.build(config), variables | {"params": params}, generation=lq.GenerationConfig(eos_token_id=eos)
    )


def similar(lm, amount=0.03):
    """A draft that is right often, and wrong often."""
    rng = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda leaf: leaf + amount * rng.standard_normal(leaf.shape).astype(leaf.dtype) * leaf.std(),
        jax.device_get(lm.variables),
    )
    return lm.replace(variables=jax.tree.map(jnp.asarray, noise))


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count", "penalty"), [("llama", 1, 1.0), ("gemma", 4, 1.0), ("dynamic", 4, 1.0), ("llama", 4, 1.3)]
)
def test_greedy_tokens_are_those_of_plain_decoding(name, count, penalty):
    target, sampler = draw(CONFIGS[name]), lq.Sampler(temperature=0.0, repetition_penalty=penalty)
    plain = lq.generate(target, PROMPTS, max_new_tokens=30, sampler=sampler)
    found = lq.generate(
        target, PROMPTS, max_new_tokens=30, sampler=sampler, draft=similar(target, 0.1), draft_tokens=count
    )
    assert_same(found, plain)
    assert 0 < found.accepted < found.drafted
    itself = lq.generate(target, PROMPTS, max_new_tokens=30, sampler=sampler, draft=target, draft_tokens=count)
    assert_same(itself, plain)
    # What is drafted past the last token is not accepted.
    assert itself.drafted - itself.accepted < 3 * count


@pytest.mark.exhaustive
def test_a_draft_of_another_architecture():
    target = draw(CONFIGS["llama"])
    plain = lq.generate(target, PROMPTS, max_new_tokens=30, sampler=GREEDY)
    assert_same(lq.generate(target, PROMPTS, max_new_tokens=30, sampler=GREEDY, draft=draw(DEEPSEEK)), plain)


@pytest.mark.exhaustive
def test_end_tokens_and_limits():
    target = draw(CONFIGS["gemma"])
    plain = lq.generate(target, PROMPTS, max_new_tokens=30, sampler=GREEDY)
    end = int(plain.tokens[0, 6])
    for new_tokens in (1, 2, 30):
        options = {"max_new_tokens": new_tokens, "sampler": GREEDY, "stop": [end]}
        assert_same(lq.generate(target, PROMPTS, draft=target, **options), lq.generate(target, PROMPTS, **options))


@pytest.mark.parametrize(("depth", "fed"), [(1, "after_norm"), (3, "before_norm")])
def test_modules_of_multi_token_prediction_draft_for_their_own_model(depth, fed):
    lm = draw(dataclasses.replace(OFTEN_RIGHT, num_nextn_predict_layers=depth, mtp_hidden=fed), seed=1)
    plain = lq.generate(lm, PROMPTS, max_new_tokens=30, sampler=GREEDY)
    found = lq.generate(lm, PROMPTS, max_new_tokens=30, sampler=GREEDY, draft="mtp")
    assert_same(found, plain)
    assert found.drafted % depth == 0
    assert 10 < found.accepted < found.drafted


@pytest.mark.exhaustive
def test_modules_draft_up_to_an_end_and_in_a_stream():
    lm = draw(dataclasses.replace(DEEPSEEK, vocab_size=257))
    lm = dataclasses.replace(lm, tokenizer=lq.ByteTokenizer())
    options = {"max_new_tokens": 30, "sampler": GREEDY}
    whole = lq.generate(lm, ["hello", "a"], **options)
    end = [int(whole.tokens[0, 9]), int(whole.tokens[1, 4])]
    plain = lq.generate(lm, ["hello", "a"], stop=end, **options)
    assert_same(lq.generate(lm, ["hello", "a"], stop=end, draft="mtp", **options), plain)
    assert "".join(lq.stream(lm, "hello", stop=(), draft="mtp", **options)) == whole.text[0]


@pytest.mark.exhaustive
def test_what_modules_draft_is_what_they_say_of_the_whole_text():
    """Caches that are filled window by window, with drafts corrected, against one pass over everything."""
    depth = 2
    lm = draw(dataclasses.replace(OFTEN_RIGHT, num_nextn_predict_layers=depth), seed=1)
    prompt = PROMPTS[0]
    found = lq.generate(lm, [prompt], max_new_tokens=30, sampler=GREEDY, draft="mtp")
    text = np.concatenate([prompt, found.tokens[0]])[None]
    said = [np.asarray(logits)[0].argmax(-1) for logits in lm.mtp_logits(text)]
    # After each pass the newest token is at `place`, and module k drafts token place + k.
    place, drafted, accepted = len(prompt), 0, 0
    while place < text.shape[1] - 1:
        guess, right = list(text[0]), 0
        for k in range(1, depth + 1):
            if place + k >= text.shape[1]:
                break
            # What module k saw past the newest token were drafts: right ones, or there is nothing more to accept.
            guess[place + k] = int(said[k - 1][place - 1])
            if guess[place + k] != text[0, place + k]:
                break
            right += 1
        drafted, accepted = drafted + depth, accepted + right
        place += right + 1
    assert (found.drafted, found.accepted) == (drafted, accepted) and accepted > 10


def sharpened(variables):
    """Logits that are far apart."""
    head = jax.tree.map(lambda leaf: 6 * leaf, variables["params"]["lm_head"])
    return variables | {"params": {**variables["params"], "lm_head": head}}


SAMPLERS = {
    "whole": lq.Sampler(temperature=1.0),
    "nucleus": lq.Sampler(temperature=0.7, top_p=0.8),
    "penalty": lq.Sampler(temperature=1.0, repetition_penalty=4.0),
}


def assert_drawn_as_by_the_model_alone(target, sampler, **draft):
    """Three tokens after one prompt, 4,000 times: the chi-squared statistic against the model's own probabilities."""
    count = 4000
    found = lq.generate(target, [[1, 2]] * count, max_new_tokens=3, sampler=sampler, seed=3, **draft)
    assert 0.1 < found.accepted / found.drafted < 0.9
    texts = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    logits = target.logits(np.concatenate([np.tile([1, 2], (64, 1)), texts], axis=1))[:, 1:4]
    logprobs = np.asarray(jax.nn.log_softmax(logits / sampler.temperature))
    if sampler.remembers:
        before = np.stack([(texts[:, :place, None] == np.arange(4)).any(1) for place in range(3)], axis=1)
        logits = sampler.penalise(jnp.asarray(logits), jnp.asarray(before | np.isin(np.arange(4), [1, 2])))
    allowed = sampler.filter(jnp.asarray(logits).reshape(-1, 4)).reshape(64, 3, 4)
    each = np.take_along_axis(np.asarray(jax.nn.softmax(allowed)), texts[..., None], axis=2)[..., 0]
    expected = count * each.prod(1)
    drawn = found.tokens @ [16, 4, 1]
    logprobs = np.take_along_axis(logprobs, texts[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(found.logprobs, logprobs[drawn], atol=1e-4)
    seen = np.bincount(drawn, minlength=64)
    assert not seen[expected < 1e-3].any()
    frequent = expected > 5
    statistic = ((seen - expected)[frequent] ** 2 / expected[frequent]).sum()
    degrees = frequent.sum() - 1
    # A good generator exceeds this once in some 30,000 times, and the seed is fixed.
    assert statistic < degrees + 4 * np.sqrt(2 * degrees) + 4


FEW = {"vocab_size": 4, "max_position_embeddings": 8, "hidden_size": 8, "num_attention_heads": 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_drawn_is_distributed_as_the_model_alone_draws(name):
    config = lq.Llama3Config(**FEW, num_hidden_layers=1, num_key_value_heads=1, intermediate_size=8)
    target, draft = (lm.replace(variables=sharpened(lm.variables)) for lm in (draw(config, 0), draw(config, 1)))
    assert_drawn_as_by_the_model_alone(target, SAMPLERS[name], draft=draft, draft_tokens=2)


@pytest.mark.exhaustive
def test_what_modules_draft_is_distributed_as_the_model_alone_draws():
    lm = draw(dataclasses.replace(DEEPSEEK, **FEW, num_nextn_predict_layers=2))
    lm = lm.replace(variables=sharpened(lm.variables))
    assert_drawn_as_by_the_model_alone(lm, SAMPLERS["whole"], draft="mtp")


def test_acceptance_of_a_single_draft(monkeypatch):
    """At q = p nothing is rejected; where p has nothing everything is, and what is drawn instead is p's."""
    accepting = jax.jit(functools.partial(accept, sampler=lq.Sampler()))
    p = jnp.log(jnp.asarray([[0.5, 0.5, 1e-30], [0.25, 0.75, 1e-30]]))[None]
    keys = jax.vmap(jax.random.key)(jnp.arange(1))
    tokens, accepted = accepting(p, jnp.asarray([[1]]), p[:, :1], keys)
    assert accepted[0] == 1 and tokens[0, 0] == 1 and tokens[0, 1] < 2
    q = jnp.log(jnp.asarray([[[1e-30, 1e-30, 1.0]]]))
    tokens, accepted = accepting(p, jnp.asarray([[2]]), q, keys)
    assert accepted[0] == 0 and tokens[0, 0] < 2
    # The number by which a draft is rejected says nothing of the token in its place: that of either of two blocks.
    p = np.full((400, 2, 256), 1e-30)
    p[..., 0], p[..., 64:192] = 0.5, 0.5 / 128
    q = np.where(np.arange(256) == 0, 1.0, 1e-30) * np.ones((400, 1, 1))
    logits, draft_logits = (jnp.log(jnp.asarray(each, jnp.float32)) for each in (p, q))
    keys = jax.vmap(jax.random.key)(jnp.arange(400))
    tokens, accepted = accepting(logits, jnp.zeros((400, 1), jnp.int32), draft_logits, keys)
    own = np.asarray(tokens)[np.asarray(accepted) == 0, 0]
    assert 150 < len(own) < 250 and 0.4 < (own < 128).mean() < 0.6
    # Of what rounding alone rejects, p - q leaves nothing: what is drawn instead is p's, and not the last id.
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.ones(shape))
    p = jnp.log(jnp.asarray([[0.5, 0.5, 0.0]] * 2))[None]
    tokens, accepted = accept(p, jnp.asarray([[0]]), p[:, :1], keys[:1], lq.Sampler())
    assert accepted[0] == 0 and tokens[0, 0] == 1


@pytest.mark.exhaustive
def test_a_row_depends_on_its_own_seed_only():
    target = draw(CONFIGS["dynamic"])
    options = {"max_new_tokens": 12, "sampler": lq.Sampler(), "draft": similar(target, 0.3), "draft_tokens": 2}
    together = lq.generate(target, PROMPTS, seed=[3, 7, 3], **options)
    alone = [lq.generate(target, [row], seed=seed, **options) for row, seed in zip(PROMPTS, (3, 7, 3), strict=True)]
    np.testing.assert_array_equal(together.tokens, np.concatenate([each.tokens for each in alone]))
    # Nor is anything drafted, or accepted, of a row that waits for its neighbours.
    np.testing.assert_array_equal(together.drafts, np.concatenate([each.drafts for each in alone]))
    assert (together.drafted, together.accepted) == tuple(together.drafts.sum(axis=0))


def test_streams_and_stop_strings():
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=257)
    lm = dataclasses.replace(draw(config), tokenizer=lq.ByteTokenizer())
    options = {"max_new_tokens": 40, "sampler": GREEDY, "stop": ()}
    whole = lq.generate(lm, "hello", **options).text[0]
    assert "".join(lq.stream(lm, "hello", draft=lm, draft_tokens=3, **options)) == whole
    cut = whole[10:13]
    options["stop"] = cut
    expected = lq.generate(lm, "hello", **options).text[0]
    assert expected == whole[: whole.index(cut)]
    assert lq.generate(lm, "hello", draft=lm, draft_tokens=3, **options).text[0] == expected
    assert "".join(lq.stream(lm, "hello", draft=lm, draft_tokens=3, **options)) == expected


class Backwards(lq.ByteTokenizer):
    def encode(self, text, **options):
        return super().encode(text, **options)[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "mtp"}, "this llama has no modules of multi-token prediction"),
        ({"draft": "gpt2"}, r"draft='gpt2' is neither a loaded model \(lq.load\) nor 'mtp'"),
        ({"draft": 5}, "draft=5 is neither a loaded model"),
        ({"draft": "tokenizer"}, "the draft's tokenizer gives other ids than the model's"),
        ({"draft_tokens": 2}, "draft_tokens=2 has no effect without a draft"),
        ({"draft": "itself", "draft_tokens": 0}, "draft_tokens=0 must be at least 1"),
        ({"draft": "vocabulary"}, "the draft has a vocabulary of 51 ids and the model one of 50"),
        ({"draft": "context"}, "are 28 in all, more than the draft's context of 20"),
    ],
)
def test_bad_input(options, message):
    config = CONFIGS["llama"]
    lm = draw(config)
    others = {
        "itself": config,
        "vocabulary": dataclasses.replace(config, vocab_size=51),
        "context": dataclasses.replace(config, max_position_embeddings=20),
    }
    if options.get("draft") in others:
        options = options | {"draft": draw(others[options["draft"]])}
    if options.get("draft") == "tokenizer":
        lm = dataclasses.replace(lm, tokenizer=lq.ByteTokenizer())
        options = options | {"draft": dataclasses.replace(lm, tokenizer=Backwards())}
    with pytest.raises(BadInput, match=message):
        lq.generate(lm, PROMPTS, max_new_tokens=20, sampler=GREEDY, **options)


def test_the_context_of_a_draft_may_be_filled():
    config = CONFIGS["llama"]
    draft = draw(dataclasses.replace(config, max_position_embeddings=28))
    request = Request.create(draw(config), PROMPTS, 20, GREEDY, None, 0, draft)
    assert request.draft is not None
    assert request._batch == len(PROMPTS) * (4 + 1)  # tokens of a pass, by which weights are laid out


def test_a_module_drafts_one_token():
    with pytest.raises(BadInput, match="draft_tokens=2 has no effect beside draft='mtp'"):
        lq.generate(draw(DEEPSEEK), PROMPTS, max_new_tokens=2, draft="mtp", draft_tokens=2)
