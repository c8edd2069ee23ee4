import functools
import json
import re

import pytest
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from llmq_jax.data import load_tokenizer
from llmq_jax.data.long_documents import CUTS, GPT2_CUTS, pieces, places_to_cut

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options)


def llama3_like():
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


def o200k_like():
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN.replace(r"[\r\n]*", r"[\r\n/]*")), "isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


def digits_alone():
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


def smollm():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])


def described(pre_tokenizer, normalizer=None):
    """A tokenizer with this pre-tokenizer, trained so that tokens would span line breaks if they may."""
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a\nb a.\nb ab\n\nb\n a\n", "b\r\na.\r\nb a\tb \n a \n\n"] * 9, trainer)
    return tokenizer


GPT2, LLAMA3, SPACES = CUTS[:2], CUTS[::2], CUTS[:1]
FORMS = normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.NFKD()])])


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "cuts"),
    [
        (byte_level(), None, GPT2),
        (byte_level(), FORMS, GPT2),
        (byte_level(), normalizers.Sequence([]), GPT2),
        (smollm(), None, GPT2),
        (llama3_like(), normalizers.NFC(), LLAMA3),
        (o200k_like(), None, SPACES),  # signs may go on after a line break with a slash
        (byte_level(use_regex=False), None, None),  # the text is one word
        (byte_level(add_prefix_space=True), None, None),  # RoBERTa: every piece would get a space
        (byte_level(), normalizers.Prepend("_"), None),
        (byte_level(), normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")]), None),
        (pre_tokenizers.Metaspace(), None, None),
        (pre_tokenizers.Split(Regex(r"\s"), "merged_with_next"), None, None),
        (digits_alone(), None, None),
        (None, None, None),
    ],
)
def test_tokenizers_are_cut_where_they_part_words(pre_tokenizer, normalizer, cuts):
    description = {"pre_tokenizer": None, "normalizer": None, "model": {"merges": ["a b"]}}
    if pre_tokenizer is not None:
        description = json.loads(described(pre_tokenizer, normalizer).to_str())
    found = places_to_cut(description, pre_tokenizer)
    assert found == (None if cuts is None else re.compile("|".join(cuts)))
    if cuts == GPT2:
        assert found == GPT2_CUTS


@pytest.mark.parametrize(
    ("token", "cuts"),
    [
        ({"content": "<L>", "special": False, "lstrip": True}, SPACES),
        ({"content": "\n<L>", "special": False}, SPACES),
        ({"content": "<L>", "special": True, "lstrip": True}, LLAMA3),  # of special tokens only the letters are read
        ({"content": "<L>", "special": False, "rstrip": True}, CUTS[2:]),
        ({"content": "a <", "special": False}, CUTS[2:]),
        ({"content": " \n", "special": False}, LLAMA3),
    ],
)
def test_added_tokens_are_not_cut_through(token, cuts):
    tokenizer = described(llama3_like())
    tokenizer.add_tokens([hf_tokenizers.AddedToken(**token)])
    found = places_to_cut(json.loads(tokenizer.to_str()), tokenizer.pre_tokenizer)
    assert found == re.compile("|".join(cuts))
    text = "a <L> \nb\n<L>\nx\r\n<L> \n"
    tokenizer.encode_special_tokens = True
    for cut in CUTS[::2]:
        ids = [i for piece in pieces(text, 1, re.compile(cut)) for i in tokenizer.encode(piece).ids]
        assert (ids == tokenizer.encode(text).ids) is (cut in cuts)


@pytest.mark.parametrize("normalizer", [None, FORMS], ids=["plain", "forms"])
@pytest.mark.parametrize("pre_tokenizer", [byte_level, smollm, llama3_like, o200k_like])
@given(
    st.lists(
        st.sampled_from([*"aab..1/", "é", "\u0301", "中", "don't", *"\n\n  \r\t\x0b\x1c\xa0", "\r\n", "\n\n", " \n "])
    ).map("".join)
)
@settings(deadline=None, max_examples=60)
def test_cutting_leaves_the_tokens_unchanged(pre_tokenizer, normalizer, text):
    tokenizer, cuts = _trained(pre_tokenizer, normalizer)
    cut = list(pieces(text, 1, cuts))
    assert "".join(cut) == text
    assert [i for piece in cut for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


@functools.cache
def _trained(pre_tokenizer, normalizer):
    tokenizer = described(pre_tokenizer(), normalizer)
    return tokenizer, places_to_cut(json.loads(tokenizer.to_str()), tokenizer.pre_tokenizer)


@pytest.mark.parametrize("line", ["one two\r\n", "one\n\n", " = one = \n", "eins.\r\n\r\n", "\tone\n"])
@pytest.mark.parametrize("pre_tokenizer", [byte_level, llama3_like])
def test_pieces_have_about_the_wanted_length(pre_tokenizer, line):
    """Windows' line breaks, paragraphs with a blank line between, WikiText's lines."""
    _, cuts = _trained(pre_tokenizer, None)
    cut = list(pieces(line * 100, 10, cuts))
    assert "".join(cut) == line * 100 and all(10 <= len(piece) <= 10 + len(line) for piece in cut[:-1])


def test_what_cannot_be_cut():
    assert list(pieces("", 10, GPT2_CUTS)) == []
    assert list(pieces("no", 1, GPT2_CUTS)) == list(pieces("no", 1, None)) == ["no"]


def test_a_saved_byte_tokenizer_is_cut_anywhere(tmp_path):
    load_tokenizer("bytes").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    pre_tokenizer = hf_tokenizers.Tokenizer.from_file(str(path)).pre_tokenizer
    assert places_to_cut(json.loads(path.read_text("utf-8")), pre_tokenizer) == re.compile("|".join(CUTS))
