import dataclasses
import inspect
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import FileTokenizer, GPT2Tokenizer
from llmq_jax.generation.decoding import DecodeState, advance, prefill, read_prompts
from llmq_jax.generation.generate import STRETCH
from llmq_jax.generation.request import Request
from tests.byte_fallback import TOKENS, byte_ids, fallback_tokenizer, one_word_model
from tests.weights import draw_variables

PROMPTS = ["hello", "hi there, you two", "a"]
SAMPLER = lq.Sampler(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)


@pytest.fixture(scope="module")
def lm():
    config = lq.GPT2Config(
        vocab_size=257,
        max_position_embeddings=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return lq.LanguageModel(
        config, lq.build(config), lq.init(config), lq.ByteTokenizer(), lq.GenerationConfig(eos_token_id=(256,))
    )


def greedy_without_cache(lm, prompt: str, steps: int, penalty: float = 1.0):
    ids, logprobs = lm.tokenizer.encode(prompt), []
    for _ in range(steps):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(lm.logits(padded, lengths=[len(ids)]))[0, len(ids) - 1]
        seen = np.isin(np.arange(len(logits)), ids)
        ids.append(int(np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits).argmax()))
        logprobs.append(logits[ids[-1]] - np.logaddexp.reduce(logits))
    return ids[-steps:], logprobs


def test_each_prompt_of_a_batch_gets_the_greedy_tokens_of_the_uncached_model(lm):
    together = lq.generate(lm, PROMPTS, max_new_tokens=20, sampler=lq.Sampler(temperature=0.0))
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = greedy_without_cache(lm, prompt, 20)
        assert together.tokens[row].tolist() == tokens
        np.testing.assert_allclose(together.logprobs[row], logprobs, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_a_penalty_on_repetition_is_each_row_s_own_and_not_in_the_log_probabilities(lm, penalty):
    sampler = lq.Sampler(temperature=0.0, repetition_penalty=penalty)
    together = lq.generate(lm, PROMPTS, 20, sampler, (), samples=2)
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = greedy_without_cache(lm, prompt, 20, penalty)
        assert together.tokens[2 * row].tolist() == together.tokens[2 * row + 1].tolist() == tokens
        np.testing.assert_allclose(together.logprobs[2 * row], logprobs, atol=1e-4)
        assert "".join(lq.stream(lm, prompt, 20, sampler, ())) == together.text[2 * row]
    assert (together.tokens != lq.generate(lm, PROMPTS, 20, lq.Sampler(0.0), (), samples=2).tokens).any()
    cut = together.text[0][9:12]
    stopped = lq.generate(lm, PROMPTS[0], 20, sampler, [cut]).text[0]
    assert stopped == together.text[0][: together.text[0].index(cut)]


def test_only_a_sampler_that_remembers_has_a_state_of_what_was_seen(lm):
    """Each row's prompt, without padding, and its new token. Of other samplers the programs are as without it."""
    assert Request.create(lm, PROMPTS, 4, lq.Sampler(), (), 0).start().seen is None
    state = Request.create(lm, PROMPTS, 4, lq.Sampler(repetition_penalty=1.1), (), 0).start()
    for row, prompt in enumerate(PROMPTS):
        assert set(np.flatnonzero(state.seen[row])) == {*lm.tokenizer.encode(prompt), int(state.tokens[row, 0])}


def test_what_decodes_on_a_gpu(monkeypatch):
    """Norms, rotations, attention and caches in the ways of a GPU, run here, give the tokens of the uncached model. The
    program of a token has no loop, which would cut its CUDA graph."""
    config = lq.Llama3Config(
        vocab_size=257,
        max_position_embeddings=64,
        hidden_size=40,  # as in no other test: what has been traced for a CPU would be taken
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config), lq.ByteTokenizer())
    tokens, logprobs = greedy_without_cache(lm, PROMPTS[0], 12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    request = Request.create(lm, PROMPTS[:1], 12, lq.Sampler(temperature=0.0), (), 0)
    found = request.finish(request.advance(request.start(), 12))
    assert found.tokens[0].tolist() == tokens
    np.testing.assert_allclose(found.logprobs[0], logprobs, atol=1e-4)
    leaves, tree = jax.tree.flatten((*lm.sliced(1), request.start()))

    def drawn(*leaves):
        options = {"sampler": lq.Sampler(top_p=0.9), "end_tokens": ()}
        return jax.tree.leaves(advance(lm.model, *tree.unflatten(leaves), 12, **options))

    program = jax.jit(drawn).trace(*leaves).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.while") == 1


def test_a_row_depends_on_its_own_seed_only(lm):
    together = lq.generate(lm, PROMPTS, max_new_tokens=12, sampler=SAMPLER, seed=[3, 7, 3])
    alone = lq.generate(lm, PROMPTS[1], max_new_tokens=12, sampler=SAMPLER, seed=7)
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_allclose(together.logprobs[1], alone.logprobs[0], atol=1e-4)
    numbered = lq.generate(lm, PROMPTS, max_new_tokens=12, sampler=SAMPLER, seed=5)
    seeds = [lq.generation.row_seed(5, row) for row in range(3)]
    listed = lq.generate(lm, PROMPTS, max_new_tokens=12, sampler=SAMPLER, seed=seeds)
    np.testing.assert_array_equal(numbered.tokens, listed.tokens)
    assert not np.array_equal(numbered.tokens, together.tokens)


def test_neighbouring_seeds_share_no_draws(lm):
    drawn = [lq.generate(lm, PROMPTS[0], max_new_tokens=12, sampler=SAMPLER, samples=3, seed=s) for s in range(3)]
    rows = {tuple(row) for generation in drawn for row in generation.tokens.tolist()}
    assert len(rows) == 9


@pytest.mark.parametrize("draft", [False, True])
def test_samples_of_a_prompt_are_those_of_the_prompt_repeated(lm, draft):
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    options = {"max_new_tokens": 12, "sampler": SAMPLER, "draft": lm if draft else None}
    together = lq.generate(lm, PROMPTS, samples=3, seed=2, **options)
    apart = lq.generate(lm, repeated, seed=2, **options)
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_allclose(together.logprobs, apart.logprobs, atol=1e-4)
    assert len({tuple(row) for row in together.tokens.tolist()}) > len(PROMPTS)


@pytest.mark.exhaustive
def test_samples_share_rings_and_latents():
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    gemma = lq.Gemma3Config(
        **sizes, num_hidden_layers=3, num_key_value_heads=1, head_dim=8, intermediate_size=24, sliding_window=4
    )
    latents = {"q_lora_rank": 10, "kv_lora_rank": 7, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 11}
    deepseek = lq.DeepSeekV3Config(
        **sizes, **latents, num_hidden_layers=1, intermediate_size=20, first_k_dense_replace=1
    )
    for config in (gemma, deepseek):
        lm = lq.LanguageModel(config, lq.build(config), lq.init(config), None, lq.GenerationConfig())
        prompts, options = [[1, 2, 3, 4, 5, 6, 7], [9, 8]], {"max_new_tokens": 9, "sampler": lq.Sampler()}
        together = lq.generate(lm, prompts, samples=2, seed=2, **options)
        apart = lq.generate(lm, [prompts[0], prompts[0], prompts[1], prompts[1]], seed=2, **options)
        np.testing.assert_array_equal(together.tokens, apart.tokens)


SIZES = {"vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}
LATENTS = {"q_lora_rank": 10, "kv_lora_rank": 7, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 11}
BY_LENGTH = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
READ = {
    "gpt2": lq.GPT2Config(**SIZES, max_position_embeddings=16),
    "rotations by length": lq.Llama3Config(
        **SIZES, num_key_value_heads=1, max_position_embeddings=5, rope_parameters=BY_LENGTH
    ),
    "rings": lq.Gemma3Config(
        **SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4, max_position_embeddings=16
    ),
    "latents, experts": lq.DeepSeekV3Config(
        **SIZES, **LATENTS, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=8, num_experts_per_tok=2,
        first_k_dense_replace=1, max_position_embeddings=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
@pytest.mark.product
def test_prompts_are_read_over_slices_as_over_stacked_layers(name):
    """Of unequal lengths, shorter and longer than a window: what is known of the next token, and what caches hold."""
    config = READ[name]
    variables = draw_variables(dataclasses.replace(config, initializer_range=0.3))
    lm = lq.LanguageModel(config, lq.build(config), variables)
    prompts = np.random.default_rng(0).integers(1, 61, (2, 8)), jnp.asarray([3, 8])
    read = jax.jit(read_prompts, static_argnames=("model", "length", "lookahead"))
    ways = [read(lm.model, *of, *prompts, length=16, lookahead=0) for of in ((variables, None), lm.read_from(2, 16))]
    (whole, expected), (output, caches) = ways
    for row, length in enumerate(prompts[1]):
        np.testing.assert_allclose(output.hidden[row, :length], whole.hidden[row, :length], atol=1e-5)
    for found, wanted in zip(jax.tree.leaves(caches), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", READ)
def test_weights_in_float32_are_rounded_once_and_not_for_every_token(name):
    """A policy under training, in bfloat16: the loop over tokens converts no matrix, and generates what it would with
    the weights as they are."""
    config = READ[name]
    model, variables = lq.build(config, dtype="bfloat16"), draw_variables(config)
    lm = lq.LanguageModel(config, model, variables, None, lq.GenerationConfig())
    options = {"sampler": lq.Sampler(temperature=0.0), "end_tokens": ()}
    request = Request.create(lm, [[1, 2]], 3, options["sampler"], (), 0)
    leaves, tree = jax.tree.flatten((*lm.sliced(1), request.start()))

    def drawn(*leaves):
        return advance(model, *tree.unflatten(leaves), 3, **options)

    program = jax.jit(drawn).trace(*leaves).lower(lowering_platforms=("cuda",)).as_text()
    rounded = re.findall(r"stablehlo.convert .*\(tensor<([\dx]+)xf32>\) -> tensor<.*bf16>", program)
    assert max(math.prod(map(int, shape.split("x"))) for shape in rounded) < config.hidden_size**2, rounded
    found, expected = (
        request.finish(advance(model, *of, request.start(), 3, **options))
        for of in (lm.sliced(1), model.slice_layers(variables))
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)


def test_which_weights_read_prompts(lm, monkeypatch):
    config = READ["latents, experts"]
    experts = lq.LanguageModel(config, lq.build(config), lq.init(config))
    sliced = [
        layers is not None for _, layers in (lm.read_from(1, 999), experts.read_from(1, 128), experts.read_from(1, 129))
    ]
    assert sliced == [True, True, False]
    apart = experts.sliced(1)
    assert experts.sliced(1) is apart
    assert experts.read_from(25, 999)[1] is not None  # decoding of so many rows has its experts stacked
    assert experts.sliced(1) is not apart  # of two layouts, each as large as the model, one is kept
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lm.read_from(1, 16) == (lm.variables, None)


def test_fewer_tokens_are_a_beginning_of_more(lm):
    short = lq.generate(lm, "hello", max_new_tokens=5, sampler=SAMPLER)
    long = lq.generate(lm, "hello", max_new_tokens=12, sampler=SAMPLER)
    assert short.tokens.shape == (1, 5)
    np.testing.assert_array_equal(short.tokens[0], long.tokens[0, :5])


def test_a_text_begins_as_its_tokenizer_says(lm):
    class Begun(lq.ByteTokenizer):
        beginning = (5,)

    begun = lm.replace(tokenizer=Begun())
    for prompt, ids in (("ab", [5, 97, 98]), ("", [5])):
        by_text, by_ids = (lq.generate(begun, given, max_new_tokens=5, sampler=SAMPLER) for given in (prompt, [ids]))
        np.testing.assert_array_equal(by_text.tokens, by_ids.tokens)


def test_end_tokens_stop_their_row_alone(lm):
    free = lq.generate(lm, PROMPTS, max_new_tokens=12, sampler=SAMPLER)
    # Two end tokens: the fourth of the first row, the seventh of the second; where each first appears counts.
    ends = [int(free.tokens[0, 3]), int(free.tokens[1, 6])]
    stopped = lq.generate(lm, PROMPTS, max_new_tokens=12, sampler=SAMPLER, stop=ends)
    for row in range(3):
        hits = [i for i, token in enumerate(free.tokens[row].tolist()) if token in ends]
        length = hits[0] + 1 if hits else 12
        assert stopped.lengths[row] == length
        np.testing.assert_array_equal(stopped.tokens[row, :length], free.tokens[row, :length])
        assert (stopped.tokens[row, length:] == ends[0]).all()
        assert (stopped.logprobs[row, length:] == 0).all()
        text_ids = stopped.tokens[row, : length - 1 if hits else length].tolist()
        assert stopped.text[row] == lm.tokenizer.decode(text_ids, skip_special_tokens=True)
    assert stopped.lengths[0] <= 4 and stopped.lengths[1] <= 7


def test_stop_strings_end_the_text_and_the_tokens(lm):
    free = lq.generate(lm, PROMPTS, max_new_tokens=40, sampler=SAMPLER, seed=[1, 2, 3])
    string = free.text[1][20:22]
    stopped = lq.generate(lm, PROMPTS, max_new_tokens=40, sampler=SAMPLER, seed=[1, 2, 3], stop=[string, "never there"])
    assert stopped.text[1] == free.text[1][: free.text[1].index(string)]
    assert max(stopped.lengths) == 40
    length = stopped.lengths[1]
    assert string in lm.tokenizer.decode(free.tokens[1, :length].tolist())
    assert string not in lm.tokenizer.decode(free.tokens[1, : length - 1].tolist())
    np.testing.assert_array_equal(stopped.tokens[1, :length], free.tokens[1, :length])
    assert (stopped.tokens[1, length:] == 256).all() and not stopped.logprobs[1, length:].any()
    streamed = lq.stream(lm, PROMPTS[1], max_new_tokens=40, sampler=SAMPLER, seed=2, stop=string)
    assert "".join(streamed) == stopped.text[1]


def test_the_first_of_several_stop_strings_counts():
    assert Request.stop_position(SimpleNamespace(stop_strings=("c", "b")), "abc") == 1
    assert Request.certain(SimpleNamespace(stop_strings=("abcd", "cx")), "xabc") == 1


def test_a_stop_string_that_spells_a_special_token_is_an_end_token(lm):
    """Texts do not show it, so that it would never be found in them. The model's own end tokens stay."""
    end = lm.tokenizer.end_of_text
    own = lm.replace(generation=lq.GenerationConfig(eos_token_id=(5,)))
    (string,) = [lm.tokenizer.decode([end])]
    drawn = {"max_new_tokens": 40, "sampler": lq.Sampler(temperature=1.0), "seed": 11}
    by_string = lq.generate(own, PROMPTS, **drawn, stop=string)
    by_tokens = lq.generate(own, PROMPTS, **drawn, stop=[5, end])
    np.testing.assert_array_equal(by_string.lengths, by_tokens.lengths)
    ends = [by_tokens.tokens[row, length - 1] for row, length in enumerate(by_tokens.lengths) if length < 40]
    assert end in ends
    pieces = lq.stream(own, PROMPTS[1], **drawn, stop=string)
    alone = lq.generate(own, PROMPTS[1], **drawn, stop=[5, end])
    assert "".join(pieces) == alone.text[0]


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_join_to_the_whole(lm, seed):
    """The model emits bytes at random, so that many characters come in halves or not at all."""
    whole = lq.generate(lm, "hé", max_new_tokens=30, sampler=SAMPLER, seed=seed).text[0]
    pieces = list(lq.stream(lm, "hé", max_new_tokens=30, sampler=SAMPLER, seed=seed))
    assert "".join(pieces) == whole
    assert len(pieces) > 3


@pytest.fixture
def writes(monkeypatch):
    """`writes(ids, **options)`: (text of generate, its new tokens, pieces of stream) of a model that writes these."""

    def writes(ids, tokenizer=None, **options):
        tokenizer = tokenizer or fallback_tokenizer()
        config = lq.GPT2Config(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=128,
            hidden_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        lm = lq.LanguageModel(config, lq.build(config), {}, tokenizer, lq.GenerationConfig(eos_token_id=(2,)))
        written, whole = jnp.array([ids]), ids.index(2) + 1 if 2 in ids else len(ids)

        def start(request):
            unread = dict.fromkeys(("step", "positions", "newest", "keys"), jnp.zeros(1, jnp.int32))
            none = {"lengths": jnp.array([0]), "done": jnp.array([False]), "caches": (), "seen": None}
            return advance(request, DecodeState(**unread, **none, tokens=written, logprobs=0.0 * written), 1)

        def advance(request, state, until):
            lengths = jnp.where(state.done, state.lengths, min(until, whole))
            done = state.done | ((lengths == whole) & (2 in ids))
            return state.replace(tokens=jnp.where(state.done, state.tokens, written), lengths=lengths, done=done)

        monkeypatch.setattr(Request, "start", start)
        monkeypatch.setattr(Request, "advance", advance)
        made = lq.generate(lm, "x", max_new_tokens=len(ids), **options)
        pieces = list(lq.stream(lm, "x", max_new_tokens=len(ids), **options))
        return made.text[0], made.tokens[0, : made.lengths[0]].tolist(), pieces

    return writes


EMOJI = "😀".encode()
CUT = {
    "whole": EMOJI + EMOJI,
    "inside the second": EMOJI + EMOJI[:-1],
    "inside the first": EMOJI[:-1],
    "text between": EMOJI + b" hi " + EMOJI[:2],
}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
@pytest.mark.parametrize("stop", [(), "never there", "😀😀😀"])
def test_characters_as_tokens_of_bytes_stream_as_they_decode(writes, content, stop):
    ids = byte_ids(b"hi " + content)
    text, tokens, pieces = writes(ids, stop=stop)
    assert tokens == ids
    assert text == "".join(pieces) == fallback_tokenizer().decode(ids)
    assert len(pieces) > 1


@pytest.mark.parametrize("before", [0, 3, STRETCH - 2, STRETCH])
@pytest.mark.parametrize(
    ("content", "stop", "kept", "text"),
    [
        (b"x\n" + EMOJI + b"x", "\n", 2, "x"),
        (b"x\n" + EMOJI[:-1], "\n", 2, "x"),  # what comes then would make the end of line U+FFFD
        (b"x\n\nx", "\n\n", 3, "x"),
        (EMOJI + EMOJI + b"x", "😀", 4, ""),
        (EMOJI + EMOJI[:-1] + b"x", "😀", 4, ""),
        (EMOJI + EMOJI + b"x", ["😀😀", "never there"], 8, ""),
        (EMOJI + b"x hi", "😀x", 5, ""),
        (EMOJI + b" hi", "😀 ", 5, ""),
        (EMOJI[:-1] + b"x hi", "\ufffdx", 4, "\ufffd\ufffd"),
        (EMOJI + b"x hi", "\ufffd", 8, "😀x hi"),  # half a character is none
    ],
)
def test_stop_strings_among_tokens_of_bytes(writes, before, content, stop, kept, text):
    """`kept` tokens up to the one that completes the stop string, wherever the stretches between two looks end."""
    start, ids = [TOKENS.index("h")] * before, byte_ids(content)
    made, tokens, pieces = writes([*start, *ids], stop=stop)
    assert (made, "".join(pieces)) == ("h" * before + text,) * 2
    assert tokens == [*start, *ids[:kept]]


@pytest.mark.parametrize("prompt", ["x hi", "x", "x ", "x é</s>", "é", "</s>", ""])
def test_a_text_goes_on_as_the_whole_is_decoded(prompt):
    """Alone the new tokens would lose the space before their first word."""
    lm = one_word_model("▁hi")
    options = {"max_new_tokens": 3, "sampler": lq.Sampler(temperature=0.0)}
    ids = lm.tokenizer.encode_prompt(prompt)
    both = ids, [*ids, *[TOKENS.index("▁hi")] * 3]
    before, whole = (lm.tokenizer.decode(each, skip_special_tokens=True) for each in both)
    assert before + lq.generate(lm, prompt, **options).text[0] == whole
    assert lq.generate(lm, ["hi", prompt], samples=2, **options).text[2:] == [whole[len(before) :]] * 2
    assert before + "".join(lq.stream(lm, prompt, **options)) == whole
    options["stop"] = " hi hi"
    assert lq.generate(lm, prompt, **options).text[0] == ("hi" if prompt == "" else "")
    assert lq.generate(lm, [ids], max_new_tokens=3, sampler=options["sampler"]).text[0] == "hi hi hi"


def test_a_space_is_no_special_token():
    """A decoder drops it at the beginning of a text: alone it has none, and it ends a text within other tokens."""
    lm = one_word_model("▁hi")
    described = json.loads(lm.tokenizer.files()["tokenizer.json"])
    described["normalizer"]["normalizers"] = described["normalizer"]["normalizers"][1:]  # no space before the text
    files = lm.tokenizer.files() | {"tokenizer.json": json.dumps(described).encode()}
    lm = lm.replace(tokenizer=FileTokenizer.from_files(files, "unprefixed"))
    assert lm.tokenizer.decode(lm.tokenizer.encode(" ")) == ""
    made = lq.generate(lm, "x", max_new_tokens=3, sampler=lq.Sampler(temperature=0.0), stop=" ")
    assert (made.text, made.lengths.tolist()) == ([""], [1])


def test_a_stop_string_before_the_end_token(writes):
    made, tokens, pieces = writes([*byte_ids(b"x\n"), 2], stop="\n")
    assert (made, pieces, len(tokens)) == ("x", ["x"], 2)
    made, tokens, pieces = writes([*byte_ids(b"x" + EMOJI), 2], stop="never there")
    assert (made, "".join(pieces), len(tokens)) == ("x😀", "x😀", 6)


def test_a_stop_string_that_only_half_a_character_behind_another_one_completes(writes):
    """One token of GPT-2 is a space and half a character, at which the shorter one ends the row."""
    tokenizer = GPT2Tokenizer()
    ids = [*tokenizer.encode("h"), tokenizer.encode(" 😀")[0]]
    assert tokenizer.decode(ids) == "h \ufffd"
    assert writes([*ids, *ids], tokenizer, stop=[" ", "h \ufffd"]) == ("h", ids, ["h"])


def test_similar_lengths_share_one_compiled_program(lm):
    sampler = lq.Sampler(temperature=0.7)
    lq.generate(lm, ["one", "three"], max_new_tokens=8, sampler=sampler)
    compiled = prefill._cache_size()
    lq.generate(lm, ["quite a bit longer", "x"], max_new_tokens=11, sampler=sampler, seed=9)
    assert prefill._cache_size() == compiled


def test_a_conversation_of_five_turns_compiles_the_loop_at_most_twice():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = lq.Llama3Config(vocab_size=64, max_position_embeddings=2000, num_key_value_heads=1, head_dim=8, **sizes)
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config))
    loops, prompts = advance._cache_size(), prefill._cache_size()
    for length in (40, 110, 180, 250, 320):
        lq.generate(lm, [[1] * length], max_new_tokens=64)
    assert advance._cache_size() - loops <= 2
    assert prefill._cache_size() - prompts <= 5
    lq.generate(lm, [[1] * 200], max_new_tokens=300)  # a length of its own, but no other cache
    assert advance._cache_size() - loops <= 2
    # Long prompts are padded to a multiple of 512, and none beyond the context.
    widths = [Request.create(lm, [[1] * length], 64, None, (), 0).prompts.shape[1] for length in (320, 1100, 1900)]
    assert widths == [512, 1536, 2000]


def test_the_context_may_be_filled_and_not_exceeded(lm):
    result = lq.generate(lm, "x" * 50, max_new_tokens=14, sampler=SAMPLER, stop=())
    assert result.lengths.tolist() == [14]
    with pytest.raises(lq.BadInput, match="prompt 0 has 50 tokens, which with 15 new ones exceed the model's context"):
        lq.generate(lm, "x" * 50, max_new_tokens=15)


def test_without_a_number_of_new_tokens_there_are_as_many_as_fit(lm):
    """Up to 64: the context of this model is 64."""
    made = lq.generate(lm, ["x" * 50, "x" * 10], stop=())
    assert made.tokens.shape == (2, 14) and made.lengths.tolist() == [14, 14]
    assert "".join(lq.stream(lm, "x" * 50, stop=())) == made.text[0]
    with pytest.raises(
        lq.BadInput, match="prompt 0 has 64 tokens, which leave no room in the model's context of 64; sh"
    ):
        lq.generate(lm, "x" * 64)
    with pytest.raises(lq.BadInput, match="prompt 0 has 50 tokens, which with 64 new ones exceed the model's context"):
        lq.generate(lm, "x" * 50, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a", "samples": 0}, "samples=0 must be at least 1"),
        ({"prompts": [[1, 999]]}, "token id 999 at position 1, outside the vocabulary of 257"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"prompts": ["a", "b"], "seed": [1]}, "1 seed given for 2 rows"),
        ({"prompts": "a", "seed": -1}, "must lie between 0"),
        ({"prompts": "a", "seed": 2**32}, "must lie between 0"),
        ({"prompts": "a", "stop": ""}, "a stop string is empty"),
        ({"prompts": "a", "stop": [1.5]}, "stop=1.5 is neither a string nor a token id below 257"),
        ({"prompts": "a", "stop": [999]}, "stop=999 is neither"),
        (
            {"prompts": "a", "stop": "<|endoftext|>\n"},
            r"stop='<\|endoftext\|>\\n' holds a special token beside other text, .*; give the token alone as a stop",
        ),
        ({"prompts": [1, 2, 3]}, "prompt 0 is the number 1; give a list of prompts"),
    ],
)
def test_bad_requests_are_refused(lm, arguments, message):
    with pytest.raises(lq.BadInput, match=message):
        lq.generate(lm, **{"max_new_tokens": 4, **arguments})


def test_what_may_stop_a_row(lm):
    """The model's end tokens by default and beside stop strings; given tokens instead of them; () nothing."""
    free = lq.generate(lm, "a", max_new_tokens=12, sampler=SAMPLER, stop=())
    assert free.lengths.tolist() == [12]
    own, other = int(free.tokens[0, 3]), int(free.tokens[0, 6])
    first = {token: free.tokens[0].tolist().index(token) + 1 for token in (own, other)}
    ending = lm.replace(generation=lq.GenerationConfig(eos_token_id=(own,)))

    def length(stop):
        return lq.generate(ending, "a", max_new_tokens=12, sampler=SAMPLER, stop=stop).lengths[0]

    assert length(None) == length(["never there"]) == first[own]
    assert length(np.int64(other)) == length([np.int32(other)]) == first[other]
    assert length(()) == 12
    padded = lm.replace(generation=lq.GenerationConfig(eos_token_id=(own,), pad_token_id=7))
    assert [Request.create(model, ["a"], 4, SAMPLER, None, 0).pad for model in (ending, padded)] == [own, 7]


@pytest.mark.parametrize("sampler", [{"temperature": 0.5}, 0.5, lq.Sampler])
def test_a_sampler_of_another_type_is_refused(lm, sampler):
    """Asked of the request: the annotations of `generate` are checked in these tests."""
    with pytest.raises(lq.BadInput, match=r"is not a Sampler; pass one, as Sampler\(temperature=0.8\)"):
        Request.create(lm, ["a"], 4, sampler, None, 0)


def test_a_name_where_a_model_is_wanted_is_refused():
    with pytest.raises(lq.BadInput, match=r"'gpt2' stands where a loaded model is wanted; give what lq.load\('gpt2'\)"):
        inspect.unwrap(Request.create.__func__)(Request, "gpt2", ["a"], 4, None, None, 0)
    with pytest.raises(lq.BadInput, match=r"None stands .* what lq.load\(name\) returns"):
        inspect.unwrap(lq.stream)(None, "a")


def test_the_default_sampler(lm):
    usual = lq.Sampler(temperature=0.8, top_p=0.95)
    expected = lq.generate(lm, "a", max_new_tokens=12, sampler=usual)
    np.testing.assert_array_equal(lq.generate(lm, "a", max_new_tokens=12).tokens, expected.tokens)
    assert "".join(lq.stream(lm, "a", max_new_tokens=12)) == expected.text[0]
    neutral = lq.generate(lm, "a", max_new_tokens=12, sampler=lq.Sampler())
    assert not np.array_equal(neutral.tokens, expected.tokens)


def test_decoding_writes_into_the_caches_that_it_was_given(lm):
    request = Request.create(lm, PROMPTS, 8, SAMPLER, (), 0)
    before = request.start()
    request.advance(before, 4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.caches))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_decoding_reads_every_weight_once(batch):
    """The compiled loop, whose body XLA counts once: the weights, and little beside them."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = lq.GPT2Config(vocab_size=128, max_position_embeddings=16, **sizes)
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config))
    request = Request.create(lm, [[1, 2, 3]] * batch, 8, lq.Sampler(temperature=0.0), (), 0)
    sliced, (leaves, structure) = lm.sliced(batch), jax.tree.flatten(request.start())

    def tokens(sliced, leaves):
        state = jax.tree.unflatten(structure, leaves)
        return advance(lm.model, *sliced, state, 8, sampler=request.sampler, end_tokens=()).tokens

    read = jax.jit(tokens).lower(sliced, leaves).compile().cost_analysis()["bytes accessed"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(sliced))
    assert 0.9 < read / weights < 1.3


def test_a_bad_request_to_stream_is_refused_at_once(lm):
    with pytest.raises(lq.BadInput, match="exceed the model's context"):
        lq.stream(lm, "x" * 60, max_new_tokens=10)


def test_without_a_tokenizer_ids_go_in_and_out(lm):
    bare = lm.replace(tokenizer=None)
    result = lq.generate(bare, [[104, 105]], max_new_tokens=6, sampler=SAMPLER)
    assert result.text is None
    np.testing.assert_array_equal(result.tokens, lq.generate(lm, "hi", max_new_tokens=6, sampler=SAMPLER).tokens)
    with pytest.raises(lq.BadInput, match="no tokenizer"):
        lq.generate(bare, "hi")
    with pytest.raises(lq.BadInput, match="no tokenizer"):
        lq.generate(bare, [[1]], max_new_tokens=4, stop="x")


def test_an_empty_prompt_starts_from_the_end_of_text(lm):
    started = lq.generate(lm, [[256]], max_new_tokens=6, sampler=SAMPLER)
    np.testing.assert_array_equal(lq.generate(lm, "", max_new_tokens=6, sampler=SAMPLER).tokens, started.tokens)
