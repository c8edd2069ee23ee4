"""Prompts that go on from what a PromptCache holds get what they would get without one."""

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.generation import request
from tests.weights import draw_variables

GREEDY = lq.Sampler(temperature=0.0)
PENALISED = lq.Sampler(temperature=0.0, repetition_penalty=1.5)
SIZES = {"vocab_size": 64, "max_position_embeddings": 128, "hidden_size": 16, "num_hidden_layers": 2}
LLAMA = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
LATENTS = {
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
WINDOW = {"head_dim": 8, "sliding_window": 12, "layer_types": ("sliding_attention", "full_attention")}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "factor": 8.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [4.0, 8.0],
    },
}
CONFIGS = {
    "gpt2": lq.GPT2Config(**SIZES, num_attention_heads=2),
    "a window that wraps": lq.Gemma3Config(**LLAMA, **WINDOW),
    "latents": lq.DeepSeekV3Config(**SIZES, **LATENTS),
}


@pytest.fixture(scope="module", params=CONFIGS)
def lm(request):
    config = CONFIGS[request.param]
    variables = draw_variables(config, seed=1)
    return lq.LanguageModel(config, lq.build(config), variables, generation=lq.GenerationConfig(eos_token_id=(63,)))


@pytest.fixture
def computed(monkeypatch):
    """The numbers of tokens that calls of `prefill` are given."""
    before, counts = request.prefill, []

    def prefill(model, variables, prompts, lengths, *args, **kwargs):
        counts.append(int(lengths[0]))
        return before(model, variables, prompts, lengths, *args, **kwargs)

    monkeypatch.setattr(request, "prefill", prefill)
    return counts


@pytest.mark.parametrize("rope", ROPES)
def test_rotations_that_depend_on_the_length_are_read_anew(rope, computed):
    config = lq.Llama3Config(**LLAMA, rope_parameters=ROPES[rope])
    lm = lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=3))
    cache = lq.PromptCache()
    for prompt in (text(12), text(30)):
        lq.generate(lm, [prompt], max_new_tokens=2, stop=(), prompt_cache=cache)
    assert computed == [12, 30]


def test_a_long_rest_is_read_in_pieces_and_one_longer_than_what_is_held_as_a_whole(lm, computed, monkeypatch):
    monkeypatch.setattr(request, "LONGEST_PROMPT_STEP", 8)
    cache, prompt = lq.PromptCache(), text(70)
    for end in (9, 26, 45, 70):
        made = lq.generate(lm, [prompt[:end]], max_new_tokens=1, sampler=GREEDY, stop=(), prompt_cache=cache)
        whole = lq.generate(lm, [prompt[:end]], max_new_tokens=1, sampler=GREEDY, stop=())
        np.testing.assert_array_equal(made.tokens, whole.tokens)
        np.testing.assert_allclose(made.logprobs, whole.logprobs, atol=2e-5)
    assert computed == [9, 9, 26, 26, 8, 8, 3, 45, 8, 8, 8, 1, 70]


def test_a_short_text_has_short_caches_again():
    config = lq.Llama3Config(**LLAMA | {"max_position_embeddings": 512})
    lm = lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=4))
    cache, options = lq.PromptCache(), {"max_new_tokens": 4, "sampler": GREEDY, "stop": ()}
    long, short = text(300), [*text(300)[:20], 1]
    for prompt, slots in ((long, 512), (short, 256), (long, 512)):
        made = lq.generate(lm, [prompt], prompt_cache=cache, **options)
        np.testing.assert_array_equal(made.tokens, lq.generate(lm, [prompt], **options).tokens)
        assert {held.keys.shape[-1] for held in cache.held.caches} == {slots}


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 63, length).tolist()


def test_a_growing_text_is_read_once(lm, computed):
    cache, history = lq.PromptCache(), text(9)
    for turn in range(4):
        sampler = PENALISED if turn % 2 else GREEDY  # what was read may be in the cache, and is penalised all the same
        made = lq.generate(lm, [history], max_new_tokens=11, sampler=sampler, stop=(), prompt_cache=cache)
        whole = lq.generate(lm, [history], max_new_tokens=11, sampler=sampler, stop=())
        np.testing.assert_array_equal(made.tokens, whole.tokens)
        np.testing.assert_allclose(made.logprobs, whole.logprobs, atol=2e-5)
        history = [*history, *made.tokens[0].tolist(), *text(5, seed=turn)]
    # The newest token is not read yet when a call ends.
    assert computed[::2] == [9, 6, 6, 6] and computed[1::2] == [9, 25, 41, 57]


def test_a_text_that_parts_from_the_old_one_is_read_from_there(lm, computed):
    cache, start = lq.PromptCache(), text(20)
    lq.generate(lm, [start], max_new_tokens=8, sampler=GREEDY, stop=(), prompt_cache=cache)
    wraps = "sliding_window" in str(lm.config) and lm.config.sliding_window is not None
    for prompt, read in (([*start[:15], *text(6, seed=1)], 15), (start, 15), (start[:10], 9), (text(7, seed=2), 0)):
        made = lq.generate(lm, [prompt], max_new_tokens=6, sampler=GREEDY, stop=(), prompt_cache=cache)
        whole = lq.generate(lm, [prompt], max_new_tokens=6, sampler=GREEDY, stop=())
        np.testing.assert_array_equal(made.tokens, whole.tokens)
        assert computed[-2] == len(prompt) - (0 if wraps else read)


@pytest.mark.parametrize("lm", ["a window that wraps"], indirect=True)
def test_a_ring_is_used_as_long_as_it_holds_what_the_next_token_sees(lm, computed):
    """A prompt that parts from a text of `read` tokens before its last ones, of 12 in a ring."""
    for read, before, expected in ((12, 5, 11), (13, 1, 7), (13, 2, 19), (13, 3, 19)):
        cache, start = lq.PromptCache(), text(read)
        prompt = [*start[: read - before], *text(before + 6, seed=5)]
        options = {"max_new_tokens": 1, "sampler": GREEDY, "stop": ()}
        lq.generate(lm, [start], prompt_cache=cache, **options)
        made = lq.generate(lm, [prompt], prompt_cache=cache, **options)
        assert (cache.held.read, computed[-1]) == (len(prompt), expected)
        np.testing.assert_allclose(made.logprobs, lq.generate(lm, [prompt], **options).logprobs, atol=2e-5)


@pytest.fixture(scope="module")
def bytes_lm():
    config = lq.Llama3Config(**LLAMA | {"vocab_size": 257})
    return lq.LanguageModel(config, lq.build(config), draw_variables(config, seed=2), lq.ByteTokenizer())


def test_a_stream_that_nobody_reads_on_leaves_what_was_read(bytes_lm, computed):
    cache, prompt = lq.PromptCache(), "hello there"
    options = {"max_new_tokens": 12, "sampler": GREEDY, "stop": ()}
    pieces = lq.stream(bytes_lm, prompt, prompt_cache=cache, **options)
    next(pieces), next(pieces)
    pieces.close()
    made = lq.generate(bytes_lm, prompt, **options).tokens[0].tolist()
    read = cache.held.tokens
    assert 12 <= len(read) < 22 and read == [*prompt.encode(), *made][: len(read)]
    said = [*read, made[len(read) - 11]]
    after = lq.generate(bytes_lm, [said], prompt_cache=cache, **options)
    np.testing.assert_array_equal(after.tokens, lq.generate(bytes_lm, [said], **options).tokens)
    assert computed == [11, 11, 1, len(said)]


def test_a_text_of_another_thread_is_not_taken_for_that_which_was_compared(bytes_lm):
    options = {"max_new_tokens": 12, "sampler": GREEDY, "stop": ()}

    class Shared(lq.PromptCache):
        meanwhile = ""
        """What another thread generates from once it is known how much of the prompt is held."""

        def begins(self, *given):
            found = super().begins(*given)
            if other := self.meanwhile:
                self.meanwhile = ""
                lq.generate(bytes_lm, other, prompt_cache=self, **options)
            return found

    cache = Shared()
    lq.generate(bytes_lm, "hello there", prompt_cache=cache, **options)
    cache.meanwhile = "a text of its own"
    made = lq.generate(bytes_lm, "hello there, and on", prompt_cache=cache, **options)
    assert cache.meanwhile == "" and made.text == lq.generate(bytes_lm, "hello there, and on", **options).text


def test_what_an_interrupted_step_used_up_is_forgotten(bytes_lm, monkeypatch):
    cache, advance = lq.PromptCache(), request.advance

    def interrupted(*args, **kwargs):
        advance(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(lq.stream(bytes_lm, "hello", max_new_tokens=12, stop=(), prompt_cache=cache))
    assert cache.held.tokens == () and cache.held.caches == ()


def test_a_stop_string_and_another_model(bytes_lm, computed):
    cache = lq.PromptCache()
    greedy = {"max_new_tokens": 40, "sampler": GREEDY}
    whole = lq.generate(bytes_lm, "abc", stop=(), **greedy)
    # The end of a character that is one byte: a stop string there ends the row in the middle of a stretch.
    stop = next(c for c in whole.text[0][4:] if c.isascii())
    cut = lq.generate(bytes_lm, "abc", stop=stop, prompt_cache=cache, **greedy)
    said = [*b"abc", *cut.tokens[0, : cut.lengths[0]].tolist()]
    prompt = [*said, *b"more"]
    made = lq.generate(bytes_lm, [prompt], stop=(), prompt_cache=cache, **greedy)
    np.testing.assert_array_equal(made.tokens, lq.generate(bytes_lm, [prompt], stop=(), **greedy).tokens)
    assert computed[2] <= 5
    other = bytes_lm.replace(variables=jax.tree.map(lambda leaf: leaf * 1.5, bytes_lm.variables))
    lq.generate(other, [prompt], stop=(), prompt_cache=cache, **greedy)
    assert computed[-1] == len(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_cache": {}}, "is not a PromptCache"),
        ({"samples": 2}, "one prompt, one sample"),
        ({"prompts": ["a", "b"]}, "one prompt, one sample"),
        ({"draft": "itself"}, "no draft"),
    ],
)
def test_a_cache_that_cannot_serve_is_refused(bytes_lm, options, message):
    options = {"prompts": ["a"], "prompt_cache": lq.PromptCache(), "max_new_tokens": 4} | options
    if "draft" in options:
        options["draft"] = bytes_lm
    with pytest.raises(lq.BadInput, match=message):
        lq.generate(bytes_lm, options.pop("prompts"), **options)
