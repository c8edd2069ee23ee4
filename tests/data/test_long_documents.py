import json

import pytest
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from llmq_jax.data import load_tokenizer
from llmq_jax.data.long_documents import cut_at_line_breaks, may_cut_at_line_breaks

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


def described(pre_tokenizer, normalizer=None):
    """A tokenizer with this pre-tokenizer, trained so that tokens would span line breaks if they may."""
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a\nb a.\nb ab\n\nb\n a\n"] * 9, trainer)
    return tokenizer


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "may_cut"),
    [
        (byte_level(), None, True),  # GPT-2
        (byte_level(), normalizers.NFC(), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]), None, True),  # SmolLM
        (llama3_like(), None, True),
        (byte_level(use_regex=False), None, False),  # the text is one word
        (byte_level(add_prefix_space=True), None, False),  # RoBERTa: every piece would get a space
        (byte_level(), normalizers.Prepend("_"), False),
        (pre_tokenizers.Metaspace(), None, False),
        (pre_tokenizers.Split(Regex(r"\s"), "merged_with_next"), None, False),
        (o200k_like(), None, False),  # signs may go on after a line break with a slash
        (digits_alone(), None, False),
        (None, None, False),
    ],
)
def test_only_tokenizers_that_split_at_line_breaks_are_cut(pre_tokenizer, normalizer, may_cut):
    description = {"pre_tokenizer": None, "normalizer": None, "model": {"merges": ["a b"]}}
    if pre_tokenizer is not None:
        description = json.loads(described(pre_tokenizer, normalizer).to_str())
    assert may_cut_at_line_breaks(description, pre_tokenizer) is may_cut


@pytest.mark.parametrize(
    ("token", "may_cut"),
    [
        ({"content": "<L>", "special": False, "lstrip": True}, False),
        ({"content": "\n<L>", "special": False}, False),
        ({"content": "<L>", "special": True, "lstrip": True}, True),  # of special tokens only the letters are read
        ({"content": "<L>", "special": False, "rstrip": True}, True),
    ],
)
def test_added_tokens_that_swallow_a_line_break_are_not_cut(token, may_cut):
    tokenizer = described(byte_level())
    tokenizer.add_tokens([hf_tokenizers.AddedToken(**token)])
    description = json.loads(tokenizer.to_str())
    assert may_cut_at_line_breaks(description, tokenizer.pre_tokenizer) is may_cut
    text = "a.<L>\nb\n<L>x\n<L>\n"
    tokenizer.encode_special_tokens = True
    pieces = [i for piece in cut_at_line_breaks(text, 1) for i in tokenizer.encode(piece).ids]
    assert (pieces == tokenizer.encode(text).ids) is may_cut


@pytest.mark.parametrize("pre_tokenizer", [byte_level, llama3_like])
@given(st.text(st.sampled_from("aab..\n\n\r\t 1é"), max_size=60))
@settings(deadline=None)
def test_cutting_leaves_the_tokens_unchanged(pre_tokenizer, text):
    tokenizer = _trained(pre_tokenizer)
    pieces = list(cut_at_line_breaks(text, 1))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


_cache = {}


def _trained(pre_tokenizer):
    return _cache.setdefault(pre_tokenizer, described(pre_tokenizer()))


def test_pieces_have_the_wanted_length():
    pieces = list(cut_at_line_breaks("abc\n" * 100, 10))
    assert all(len(piece) == 12 for piece in pieces[:-1])
    assert list(cut_at_line_breaks("", 10)) == []
    assert list(cut_at_line_breaks("no line break", 2)) == ["no line break"]


def test_a_saved_byte_tokenizer_may_be_cut(tmp_path):
    load_tokenizer("bytes").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    pre_tokenizer = hf_tokenizers.Tokenizer.from_file(str(path)).pre_tokenizer
    assert may_cut_at_line_breaks(json.loads(path.read_text("utf-8")), pre_tokenizer)
