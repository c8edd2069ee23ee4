from dataclasses import replace

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    Example,
    FileTokenizer,
    GPT2Tokenizer,
    Record,
    instruction_batches,
    render,
    tokenize,
    tokenize_conversations,
)
from llmq_jax.data.conversations import as_conversation
from llmq_jax.errors import BadInput
from llmq_jax.objectives.next_token import NextToken
from llmq_jax.training.step import evaluate, make_eval_step

END = ByteTokenizer.end_of_text


def prompt(text, completion, where="a.json: row 1"):
    return as_conversation(Record(where, {"prompt": text, "completion": completion}))


def pieces(tokenizer, conversation, train_on="response"):
    """(what is not learned, what is), token by token."""
    example = tokenize(render(conversation, "plain", None), tokenizer, train_on)
    spelled = [tokenizer.decode([token]) for token in example.tokens]
    return spelled, [piece for piece, learned in zip(spelled, example.learned, strict=True) if learned]


# Tokens


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """Bytes and merges of whatever stands together, so that one goes across the end of a prompt."""
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["=>b"] * 9 + ["=>"] * 2, trainer)
    folder = tmp_path_factory.mktemp("merging")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return FileTokenizer(folder)


def test_a_merge_across_the_end_of_the_prompt(merging):
    """The prompt alone ends in another token than it does before its answer. That cannot shift the mask."""
    spelled, learned = pieces(merging, prompt("a=>", "bc"))
    assert merging.encode("=>") != merging.encode("=>b")[:1]
    assert spelled == ["a", "=>b", "c", "</s>"]
    assert learned == ["=>b", "c", "</s>"]
    spelled, learned = pieces(merging, prompt("a=>", "c=>b"))
    assert (spelled, learned) == (["a", "=>", "c", "=>b", "</s>"], ["c", "=>b", "</s>"])


def test_a_character_cut_into_tokens():
    gpt2 = GPT2Tokenizer()
    for answer in ("😀", "é", "日本", " 𝔘𝔫𝔦"):
        for tokenizer in (gpt2, ByteTokenizer()):
            example = tokenize(render(prompt("Say ", answer), "plain"), tokenizer)
            given, learned = example.tokens[~example.learned], example.tokens[example.learned]
            assert (
                "Say ".startswith(tokenizer.decode(given)) and tokenizer.decode(learned[:-1]).strip() == answer.strip()
            )
            assert learned[-1] == tokenizer.end_of_text
    # The space and the first bytes of the character are one token, which is learned.
    assert tokenize(render(prompt("Say ", "😀"), "plain"), gpt2).learned.tolist() == [False, True, True, True]


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet="ab =>é😀\n", max_size=12),
    st.text(alphabet="ab =>é😀\n", min_size=1, max_size=12).filter(lambda text: not text.isspace()),
)
def test_a_token_is_learned_if_it_holds_a_character_of_the_answer(merging, gpt2, given, answer):
    for tokenizer in (merging, gpt2, ByteTokenizer()):
        example = tokenize(render(prompt(given, answer), "plain"), tokenizer)
        assert example.tokens.tolist() == [*tokenizer.encode(given + answer), tokenizer.end_of_text]
        bytes_before = len(given.encode())
        sizes = [_size(tokenizer, int(token)) for token in example.tokens[:-1]]
        assert sum(sizes) == len((given + answer).encode())
        ends = np.cumsum(sizes)
        assert example.learned.tolist() == [*(ends > bytes_before), True]


def _size(tokenizer, token):
    if isinstance(tokenizer, ByteTokenizer):
        return 1
    if isinstance(tokenizer, GPT2Tokenizer):
        return len(tokenizer._encoding.decode_single_token_bytes(token))
    return len(tokenizer._plain.id_to_token(token))  # one character a byte


def test_what_is_learned():
    conversation = prompt("ab", "cd")
    for train_on, expected in (("response", "cd"), ("last", "cd"), ((0,), "cd"), ("all", "abcd")):
        assert "".join(pieces(ByteTokenizer(), conversation, train_on)[1]) == expected + "<|endoftext|>"


def test_end_of_text_in_a_text_is_text():
    example = tokenize(render(prompt("a", "<|endoftext|>b"), "plain"), ByteTokenizer())
    assert (example.tokens == END).sum() == 1


def test_an_end_of_text_that_the_tokenizer_appends_is_no_second_one():
    class Ending(ByteTokenizer):
        def encode_with_offsets(self, text, **options):
            ids, offsets = super().encode_with_offsets(text, **options)
            return [*ids, END], np.append(offsets, [[len(text)] * 2], axis=0)

    ours, plain = (tokenize(render(prompt("a", "b"), "plain"), each) for each in (Ending(), ByteTokenizer()))
    assert ours.tokens.tolist() == plain.tokens.tolist() and ours.learned.tolist() == plain.learned.tolist()


# What does not fit


def conversations(*answers, prompt_length=4):
    return [prompt("p" * prompt_length, answer, f"a.json: row {row}") for row, answer in enumerate(answers, start=1)]


def tokenized(answers, **options):
    return tokenize_conversations(answers, ByteTokenizer(), template="plain", **options)


def test_too_long():
    several = conversations("a", "bcdefgh", "c" * 20)  # 6, 12 and 25 tokens
    cut = tokenized(several, context=12)
    assert (len(cut), cut.truncated, cut.dropped) == (3, 1, 0)
    assert [len(example.tokens) for example in cut.examples] == [6, 12, 12]
    assert cut.tokens == 30 and cut.learned_tokens == 2 + 8 + 8
    assert tokenized(several, context=12, train_on="all").learned_tokens == 30 - 3  # nothing stands before the first
    assert not cut.examples[2].tokens.tolist().count(END)
    assert [example.cut for example in cut.examples] == [False, False, True]
    left = tokenized(several, context=12, too_long="drop")
    assert (len(left), left.truncated, left.dropped) == (2, 0, 1)
    with pytest.raises(BadInput, match=r"row 3 has 25 tokens and the context 12: .* --context, .*\(--too-long\)"):
        tokenized(several, context=12, too_long="error")


def test_a_conversation_that_loses_its_answer_is_left_out():
    few = tokenized([*conversations("a"), *conversations("b", prompt_length=30)], context=6)
    assert (len(few), few.truncated, few.dropped) == (1, 0, 1)
    with pytest.raises(BadInput, match="of 1 conversation none has anything to learn within the context of 6"):
        tokenized(conversations("b", prompt_length=30), context=6)


def test_an_end_alone_is_nothing_to_learn():
    """Nothing stands before it: the tokenizer knows none of the characters."""

    class Silent(ByteTokenizer):
        def encode_with_offsets(self, text, **options):
            return [], np.zeros((0, 2), int)

    with pytest.raises(BadInput, match="of 1 conversation none has anything to learn"):
        tokenize_conversations(conversations("a"), Silent(), template="plain", context=6)


def test_bad_arguments():
    for options, message in (
        ({"too_long": "cut"}, "too_long must be"),
        ({"context": 1}, "a context of 1 leaves nothing"),
        ({"train_on": "none"}, "train_on must be response, last, all or numbers"),
        ({"train_on": ()}, "train_on must be"),
    ):
        with pytest.raises(BadInput, match=message):
            tokenized(conversations("a"), **{"context": 8, **options})


def chat(*turns):
    """A conversation of (who says it, text, marks)."""
    messages = [{"role": role, "content": text, **marks} for role, text, *rest in turns for marks in rest or [{}]]
    return as_conversation(Record("a.json: row 1", {"messages": messages}))


def tokenized_chats(conversations, tmp_path, **options):
    ByteTokenizer().save(tmp_path)
    template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}.{% endfor %}"
    opening = "{% if add_generation_prompt %}<a>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template + opening)
    return tokenize_conversations(conversations, FileTokenizer(tmp_path), template="chat", **options)


MARKED = (("user", "q"), ("assistant", "one", {"weight": 0}), ("user", "r"), ("assistant", "two"))


def test_marked_answers_are_context_without_labels(tmp_path):
    """By hand; in a row with another conversation too."""
    late = (*MARKED[:1], ("assistant", "one", {"train": True}), *MARKED[2:3], ("assistant", "two", {"loss": False}))
    made = tokenized_chats([chat(*MARKED), chat(*late)], tmp_path, context=64)
    for example, labels in zip(made.examples, ("____________________two.", "________one.____________"), strict=True):
        assert bytes(example.tokens.tolist()) == b"<u>q.<a>one.<u>r.<a>two."
        assert bytes(np.where(example.learned, example.tokens, ord("_")).tolist()) == labels.encode()
    assert (made.tokens, made.learned_tokens) == (48, 8)
    (batch,) = instruction_batches(made.examples, context=64, batch_size=1, seed=None)
    targets, segments, mask = (batch[name][0] for name in ("targets", "segment_ids", "mask"))
    learned = {bytes(targets[(mask > 0) & (segments == number)].tolist()) for number in (1, 2)}
    assert learned == {b"one.", b"two."} and mask.sum() == 8


def test_what_is_cut_may_leave_marked_answers_alone(tmp_path):
    """Then there is nothing to learn, as where a conversation loses its answer."""
    kept = chat(("user", "q"), ("assistant", "three"))
    for context, expected in ((24, (2, 0, 0)), (22, (2, 1, 0)), (20, (1, 0, 1))):
        found = tokenized_chats([chat(*MARKED), kept], tmp_path, context=context)
        assert (len(found), found.truncated, found.dropped) == expected


def test_all_of_a_conversation_with_marked_answers_is_not_learned(tmp_path):
    """One of both says what is learned."""
    for conversation in (chat(*MARKED), replace(chat(*MARKED), given=3)):
        with pytest.raises(BadInput, match=r"row 1 marks an answer as not to be learned .* and --train-on all learns "):
            tokenized_chats([conversation], tmp_path, context=64, train_on="all")
    asked = chat(("user", "q", {"weight": 0}), ("assistant", "one"))
    assert tokenized_chats([asked], tmp_path, context=64, train_on="all").learned_tokens == 11


# Batches


def draw(count, longest, seed=0, shortest=2):
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        tokens = generator.integers(1, 50, generator.integers(shortest, longest + 1)).astype(np.int32)
        tokens[0] = 100 + index  # tells conversations apart
        examples.append(Example(tokens, generator.random(len(tokens)) < 0.6, f"row {index}"))
    return examples


def conversations_in(batch):
    """{first token: (tokens, learned)} of all conversations in a batch."""
    found = {}
    for tokens, targets, mask, segments, positions in zip(
        *(batch[name] for name in ("tokens", "targets", "mask", "segment_ids", "positions")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all() and positions[places].tolist() == list(range(len(places)))
            assert (targets[places[:-1]] == tokens[places[1:]]).all() and mask[places[-1]] == 0
            assert tokens[places[0]] not in found
            found[int(tokens[places[0]])] = (tokens[places].tolist(), mask[places[:-1]].tolist())
        assert not mask[segments == 0].any() and not tokens[segments == 0].any()
    return found


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 30),
    packing=st.booleans(),
    batch_size=st.integers(1, 5),
    seed=st.none() | st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_every_epoch_has_every_conversation_once(count, packing, batch_size, seed, epoch):
    examples = draw(count, 16)
    batches = instruction_batches(examples, context=16, batch_size=batch_size, packing=packing, seed=seed)
    epoch = 0 if seed is None else epoch
    found = {}
    for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
        batch = batches[step]
        types = {"mask": np.float32}
        for name, array in batch.items():
            assert array.dtype == types.get(name, np.int32) and array.shape == batch["tokens"].shape
        assert len(batch["tokens"]) == batch_size
        found |= conversations_in(batch)
    assert found == {
        100 + index: (example.tokens.tolist(), example.learned[1:].astype(float).tolist())
        for index, example in enumerate(examples)
    }


@pytest.mark.parametrize("packing", [True, False])
def test_batches_are_functions_of_the_step(packing):
    examples = draw(40, 32)

    def make(seed):
        return instruction_batches(examples, context=32, batch_size=4, packing=packing, seed=seed)

    steps = [5, 0, 31, 5]
    first, second = ([make(3)[step]["tokens"].tolist() for step in order] for order in (steps, steps))
    assert first == second and first[0] == first[3]
    orders = [[make(seed)[step]["tokens"].tolist() for step in range(len(make(0)))] for seed in (0, 1)]
    assert orders[0] != orders[1], "the seed chooses"
    later = [make(0)[step]["tokens"].tolist() for step in range(len(make(0)), 2 * len(make(0)))]
    assert orders[0] != later, "and each epoch has an order of its own"
    first, second = ({frozenset(row[0] for row in tokens) for tokens in epoch} for epoch in (orders[0], later))
    assert first != second, "in which other rows meet"
    found = make(3)[5]["tokens"][:, 0].tolist()
    assert found == [129, *((126, 139, 122) if packing else (113, 132, 114))], "as a run that is resumed later needs"


@pytest.mark.parametrize("packing", [True, False])
def test_processes_share_a_batch(packing):
    examples = draw(20, 32)
    options = {"context": 32, "batch_size": 6, "packing": packing, "seed": 1}
    whole = instruction_batches(examples, **options)
    parts = [instruction_batches(examples, **options, process_index=i, process_count=3) for i in range(3)]
    for step in range(2 * len(whole)):
        for name, array in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts]), array)
        assert {part.count_tokens(step) for part in parts} == {np.count_nonzero(whole[step]["segment_ids"])}
    with pytest.raises(BadInput, match="cannot be divided among 4"):
        instruction_batches(examples, **options, process_count=4)


def test_counting_the_tokens_of_a_batch_draws_no_order_again():
    """A draw of grain's takes milliseconds where an epoch has a few batches."""
    batches = instruction_batches(draw(20, 30), context=64, batch_size=4)
    before = batches._order
    drawn = []

    class Recorded:
        def __getitem__(self, step):
            drawn.append(step)
            return before[step]

    batches = replace(batches, _order=Recorded())
    for step in range(3):
        assert batches.count_tokens(step) == np.count_nonzero(batches[step]["segment_ids"])
    assert drawn == [0, 1, 2]


def test_padded_rows_have_few_lengths():
    examples = draw(200, 100, shortest=2)
    batches = instruction_batches(examples, context=512, batch_size=4, packing=False)
    shapes = {batches[step]["tokens"].shape for step in range(len(batches))}
    longest = max(len(example.tokens) for example in examples)
    assert shapes == {(4, -(-longest // part)) for part in (1, 2, 4, 8)}


def test_evaluation_has_an_end():
    batches = instruction_batches(draw(9, 16), context=16, batch_size=2, packing=False, seed=None)
    assert len(list(batches)) == len(batches)
    for step in (-1, len(batches)):
        with pytest.raises(IndexError):
            batches[step]


def test_bad_sizes():
    examples = draw(3, 16)
    for options, message in (
        ({"context": 4}, r"row \d has \d+ tokens and a row 4"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"seed": -1}, "must not be negative"),
    ):
        with pytest.raises(BadInput, match=message):
            instruction_batches(examples, **{"context": 16, "batch_size": 2, **options})
    with pytest.raises(BadInput, match="no conversation"):
        instruction_batches([], context=16, batch_size=2)


# Loss


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gpt2", "gemma"))]
)
def test_packed_loss_and_gradients_equal_those_of_single_rows(architecture):
    """Conversations in a row are neither context nor target of each other."""
    sizes = {
        "vocab_size": 160,
        "max_position_embeddings": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    kv = {"num_key_value_heads": 1, "intermediate_size": 24}
    config = {
        "llama": lambda: lq.Llama3Config(**sizes, **kv),
        "gpt2": lambda: lq.GPT2Config(**sizes),
        # Windows of five tokens, which end at the conversation too.
        "gemma": lambda: lq.preset("gemma3-1b", **sizes, **kv, head_dim=8, sliding_window=5),
    }[architecture]()
    model, variables = lq.build(config), lq.init(config, seed=0)
    objective = NextToken(model)
    examples = draw(14, 24)
    together = instruction_batches(examples, context=32, batch_size=8, seed=3)
    alone = instruction_batches(examples, context=32, batch_size=1, packing=False, seed=None)
    assert len(together) == 1 and len(alone) == 14

    @jax.jit
    def loss_and_gradients(batch, weights):
        return jax.value_and_grad(lambda v: objective.loss(v, batch, weights)[0])(variables)

    packed = together[0]
    weights = jax.jit(objective.weights)(packed)
    loss, gradients = loss_and_gradients(packed, weights)
    parts = [loss_and_gradients(batch, weights) for batch in alone]
    assert float(loss) == pytest.approx(sum(float(part) for part, _ in parts), abs=1e-5)
    expected = jax.tree.map(lambda *leaves: sum(leaves), *(part for _, part in parts))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)
    eval_step = make_eval_step(objective)
    for packing in (True, False):
        batches = instruction_batches(examples, context=32, batch_size=3, packing=packing, seed=None)
        assert evaluate(eval_step, variables, batches)["loss"] == pytest.approx(float(loss), abs=1e-5)
