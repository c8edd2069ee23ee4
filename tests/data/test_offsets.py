"""Where tokens stand in their text, by every tokenizer."""

import numpy as np
import pytest
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq_jax.data import ByteTokenizer, FileTokenizer, GPT2Tokenizer
from llmq_jax.data.offsets import byte_offsets, overlaps

TEXTS = [
    "",
    "a",
    " a ",
    "naïve café 😀😀",
    "  tabs\t\n\n and 'tis  ",
    "<|endoftext|>x<|endoftext|>",
    "日本語 🇩🇪\n e\u0301",
]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


def changed(tokenizer, folder, change):
    """A FileTokenizer of our tokenizer's file, after a change of it."""
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    loaded = hf_tokenizers.Tokenizer.from_file(str(file))
    change(loaded)
    loaded.save(str(file))
    return FileTokenizer(folder)


def set_trimming(loaded):
    loaded.post_processor = hf_tokenizers.processors.ByteLevel(trim_offsets=True)


def set_template(loaded):
    loaded.post_processor = hf_tokenizers.processors.Sequence(
        [
            hf_tokenizers.processors.ByteLevel(trim_offsets=True),
            hf_tokenizers.processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 50256)]),
        ]
    )


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    """SentencePiece-like: "▁" for spaces and before the text, bytes for characters that it lacks."""
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf_tokenizers.decoders.Sequence(
        [hf_tokenizers.decoders.ByteFallback(), hf_tokenizers.decoders.Metaspace()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    tokenizer.train_from_iterator(["the cat and the dog sat on the mat\n" * 3] * 20, trainer)
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder)


def spelled(tokenizer, text, allow_special=False):
    ids, offsets = tokenizer.encode_with_offsets(text, allow_special=allow_special)
    return [(tokenizer.decode([i]), text[start:end]) for i, (start, end) in zip(ids, offsets, strict=True)]


def test_special_tokens_are_one_token_or_text(gpt2):
    text = f"é{END}x"
    assert spelled(gpt2, text, allow_special=True) == [("é", "é"), (END, END), ("x", "x")]
    assert "".join(piece for _, piece in spelled(gpt2, text)) == text
    assert spelled(ByteTokenizer(), text, allow_special=True)[2:] == [(END, END), ("x", "x")]
    ids, offsets = ByteTokenizer().encode_with_offsets("é")
    assert (ids, offsets.tolist()) == ([0xC3, 0xA9], [[0, 1], [0, 1]])


def test_a_token_may_hold_a_space_and_a_part_of_a_character(gpt2):
    _, offsets = gpt2.encode_with_offsets("a 😀b")
    assert offsets.tolist() == [[0, 1], [1, 3], [2, 3], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(text=st.sampled_from(TEXTS) | st.text(max_size=30), allow_special=st.booleans())
def test_offsets_cover_the_text(gpt2, metaspace, text, allow_special):
    for tokenizer in (ByteTokenizer(), gpt2, metaspace):
        ids, offsets = tokenizer.encode_with_offsets(text, allow_special=allow_special)
        assert ids == tokenizer.encode(text, allow_special=allow_special)
        assert offsets.shape == (len(ids), 2)
        covered = np.zeros(len(text), int)
        for start, end in offsets:
            assert 0 <= start < end <= len(text)
            covered[start:end] += 1
        assert (covered > 0).all()
        assert (np.diff(offsets, axis=0) >= 0).all()


@pytest.mark.parametrize("change", [lambda loaded: None, set_trimming, set_template])
def test_files_give_the_offsets_of_our_own_tokenizer(gpt2, tmp_path, change):
    """Trimming, which published byte-level tokenizers ask for, would take the spaces out."""
    file = changed(gpt2, tmp_path, change)
    for text in TEXTS:
        for allow_special in (False, True):
            ids, offsets = gpt2.encode_with_offsets(text, allow_special=allow_special)
            found, found_offsets = file.encode_with_offsets(text, allow_special=allow_special)
            assert found == ids
            np.testing.assert_array_equal(found_offsets, offsets)


def test_added_tokens_hold_no_characters(gpt2, tmp_path):
    file = changed(gpt2, tmp_path, set_template)
    text = f" Hi{END}"
    ids, offsets = file.encode_with_offsets(text, allow_special=True, add_special_tokens=True)
    assert ids == file.encode(text, allow_special=True, add_special_tokens=True)
    assert (ids[0], ids[-2:]) == (50256, [50256, 50256]), "the one in the text and the one behind it"
    assert offsets.tolist() == [[0, 0], [0, 3], [3, 16], [16, 16]]
    assert file.encode_with_offsets("", add_special_tokens=True)[0] == [50256, 50256]


@given(st.text(max_size=20), st.data())
def test_byte_offsets_against_counting(text, data):
    size = len(text.encode())
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=size)) if size > 1 else [])
    lengths = np.diff([0, *cuts, size]).tolist() if size else []
    owner = [index for index, character in enumerate(text) for _ in character.encode()]
    start = 0
    for (first, end), length in zip(byte_offsets(text, lengths), lengths, strict=True):
        assert list(range(first, end)) == sorted(set(owner[start : start + length]))
        start += length


def test_overlaps():
    offsets = np.array([[0, 0], [0, 3], [3, 5], [5, 5], [5, 6], [6, 9], [9, 9]])
    assert overlaps(offsets, [(4, 6)]).tolist() == [False, False, True, True, True, False, False]
    assert overlaps(offsets, [(0, 1), (8, 9)]).tolist() == [True, True, False, False, False, True, False]
    assert not overlaps(offsets, []).any()
    assert overlaps(np.zeros((0, 2), int), [(0, 1)]).shape == (0,)
