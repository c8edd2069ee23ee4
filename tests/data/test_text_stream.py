"""Pieces of a stream against the text of all ids, for every kind of tokenizer."""

from functools import cache

import pytest
import tokenizers as hf_tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from llmq_jax.data import ByteTokenizer, FileTokenizer, GPT2Tokenizer, TextStream
from llmq_jax.data.gguf_tokenizer import gguf_tokenizer
from llmq_jax.data.gpt2_vocabulary import byte_characters, packaged_vocabulary
from llmq_jax.data.text_stream import decode_behind, last_text
from tests.byte_fallback import TOKENS, byte_ids, fallback_tokenizer


def pieces(tokenizer, ids, skip=False):
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.finish()]


def like_gemma():
    """No space before a text, and "\\ufffd" among the tokens."""
    return fallback_tokenizer(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def from_gguf():
    metadata = {"model": "llama", "tokens": TOKENS, "scores": [-float(i) for i in range(len(TOKENS))]}
    metadata |= {"token_type": [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 259)]}
    named = {f"{name}_token_id": i for i, name in enumerate(("unknown", "bos", "eos"))}
    return gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (metadata | named).items()}, "gguf")


def by_words():
    """WordPiece: spaces between words, "##" before their later parts, no space before a comma."""
    words = ["[UNK]", "the", "cat", "##s", "##t", ",", "n't"]
    tokenizer = hf_tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return FileTokenizer.from_files({"tokenizer.json": tokenizer.to_str().encode()}, "words")


def by_word_ends():
    """The BPE of Sennrich et al.: "</w>" ends a word, with a space unless the text ends."""
    tokens = ["a", "b", "a</w>", "b</w>", "</w>", "<0x41>"]
    tokenizer = hf_tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return FileTokenizer.from_files({"tokenizer.json": tokenizer.to_str().encode()}, "word ends")


def by_metaspace():
    return fallback_tokenizer(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def from_files(tokenizer):
    return FileTokenizer.from_files(tokenizer.files(), tokenizer.name)


KINDS = {
    "bytes": ByteTokenizer,
    "bytes from files": lambda: from_files(ByteTokenizer()),
    "gpt2": GPT2Tokenizer,
    "gpt2 from files": lambda: from_files(GPT2Tokenizer()),
    "llama": fallback_tokenizer,
    "gemma": like_gemma,
    "gguf": from_gguf,
    "metaspace": by_metaspace,
    "wordpiece": by_words,
    "word ends": by_word_ends,
}


@cache
def a_tokenizer(name):
    return KINDS[name]()


HALVES = {
    "two characters": "hi 😀😀".encode(),
    "cut inside the second": "hi 😀😀".encode()[:-1],
    "cut behind its first byte": "hi 😀😀".encode()[:-3],
    "cut inside the first": "hi 😀".encode()[:-2],
    "text between": "😀 hi 😀".encode()[:-1],
    "an end of line before": "hi\n😀".encode()[:-1],
    "a continuation alone": b"hi \x98\x80 hi",
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("content", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("name", ["llama", "gemma", "gguf", "metaspace"])
def test_half_a_character_behind_whole_ones(name, content, skip):
    tokenizer = a_tokenizer(name)
    ids = byte_ids(content)
    assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_text_is_that_of_transformers(tmp_path):
    """One incomplete character makes all bytes of its run U+FFFD."""
    ours = a_tokenizer("llama")
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for content in HALVES.values():
        ids = byte_ids(content)
        assert "".join(pieces(ours, ids)) == ours.decode(ids) == theirs.decode(ids)
    assert theirs.decode(byte_ids("hi 😀😀".encode()[:-1])) == "hi " + 7 * "\ufffd"


PARTS = ["😀".encode(), "é".encode(), "\ufffd".encode(), b"x", b" ", b"\n", b"\xf0\x9f", b"\xe0", b"\x80"]


def spelled(tokenizer, content):
    """Bytes as tokens of single bytes; for a tokenizer without them any ids."""
    if tokenizer.byte_tokens:
        return byte_ids(content)
    return [gpt2_bytes()[byte] for byte in content] if tokenizer.vocab_size > 50_000 else list(content)


@cache
def gpt2_bytes():
    ids = packaged_vocabulary().ids
    return [ids[character] for character in byte_characters()]


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_ids_join_to_their_text(name, data):
    tokenizer = a_tokenizer(name)
    end = tokenizer.vocab_size
    one = st.one_of(st.integers(0, end), st.integers(max(0, end - 12), end), st.integers(0, 2))  # `end` is no token
    part = st.one_of(st.sampled_from([spelled(tokenizer, part) for part in PARTS]), one.map(lambda i: [i]))
    ids = [i for ids in data.draw(st.lists(part, max_size=12)) for i in ids]
    for skip in (False, True):
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        streamed = pieces(tokenizer, ids, skip)
        assert "".join(streamed) == whole
        assert all(whole.startswith("".join(streamed[:count])) for count in range(len(streamed)))


def test_a_run_of_bytes_comes_when_it_ends():
    ids = [TOKENS.index("▁hi"), *byte_ids("😀😀".encode()), TOKENS.index("hi"), TOKENS.index("x")]
    assert pieces(a_tokenizer("llama"), ids) == ["hi", *[""] * 8, "😀😀hi", "x", ""]
    skipped = [*byte_ids("😀".encode()), 2, *byte_ids("😀".encode()[:-1])]
    assert pieces(a_tokenizer("llama"), skipped, skip=True) == [*[""] * 8, 7 * "\ufffd"], (
        "a token that is skipped parts no run"
    )


def test_what_is_held_back_is_told_where_it_ends_with_a_character():
    stream = TextStream(a_tokenizer("llama"))
    held = []
    for i in [TOKENS.index("x"), *byte_ids("\né".encode()), TOKENS.index("x")]:
        stream.push(i)
        held.append(stream.held())
    assert held == ["", "\n", "", "\né", ""]
    stream = TextStream(ByteTokenizer())
    assert [(stream.push(byte), stream.held()) for byte in "é".encode()] == [("", ""), ("é", "")]


@pytest.mark.parametrize("name", ["llama", "gemma", "gguf", "metaspace"])
def test_an_end_of_line_behind_a_character_spelled_by_bytes(name):
    """Together with the last of them alone it would be no text."""
    tokenizer, new = a_tokenizer(name), byte_ids(b"\nx")
    behind = last_text(tokenizer, byte_ids("hi 😀".encode()))
    stream = TextStream(tokenizer, behind=behind)
    assert "".join([*map(stream.push, new), stream.finish()]) == decode_behind(tokenizer, behind, new) == "\nx"


class Counting(ByteTokenizer):
    """Counts the ids that it decodes."""

    def __init__(self, byte_tokens):
        self.decoded, self._byte_tokens = 0, byte_tokens

    @property
    def byte_tokens(self):
        return self._byte_tokens

    def decode(self, ids, *, skip_special_tokens=False):
        ids = list(ids)
        self.decoded += len(ids)
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("token", [65, 0x80, 0xF0, 256, 999])
def test_a_token_is_decoded_a_few_times_however_long_the_text(token):
    """Text, bytes that are no text, a special token that is skipped, and one outside the vocabulary."""
    for tokenizer in (Counting({}), Counting({byte: byte for byte in range(256)})):
        assert len("".join(pieces(tokenizer, 1000 * [token], skip=True))) in (0, 1000)
        assert tokenizer.decoded <= 4 * 1000


def test_bytes_that_are_no_text_are_told_at_once():
    assert pieces(ByteTokenizer(), [65, 0x80, 0x80, 65])[2:4] == ["\ufffd", "\ufffdA"]
