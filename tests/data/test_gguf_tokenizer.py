"""Tokenizers of GGUF metadata, against the two algorithms written out here, transformers, and a real file."""

import json
import random
import re
import time
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import regex
import tokenizers as hf_tokenizers
import transformers
from gguf import GGUFWriter
from transformers.utils.sentencepiece_model_pb2_new import ModelProto

from llmq_jax.data import GPT2Tokenizer
from llmq_jax.data.gguf_tokenizer import gguf_tokenizer
from llmq_jax.data.gpt2_vocabulary import byte_characters, packaged_vocabulary
from llmq_jax.data.tokenizer_files import TokenizerFiles
from llmq_jax.errors import BadInput
from llmq_jax.interop.gguf_files import open_gguf
from tests.smollm2 import smollm2_gguf

WORDS = """
    the The quick brown foxes don't we'LL I'd they've it's 's 're ' " `` __init__ self.x += 1; {"a":[1,2]} def f(x): //
    # <!-- --> https://example.org/a?b=c&d=%20 0 7 42 123 2024 1234567 3.14 -1e-05 ½ ² ٣٤ Ⅷ 1st x2 2x naïve café
    e\u0301 \u212b ﬁ Straße ДОМ дом שלום مرحبا हिन्दी ไทย 你好世界 東京 ひらがな 안녕하세요 😀 👩‍👩‍👧 🇩🇪 … — « » ∀x∈ℝ €5
    ™ _ - = + * ^ ~ \u200b \ufeff <|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <s> </s> <unk> <0x0A> [INST] <|im_
    start|> <repo_name> ▁ ▁▁ Ġ Ċ
"""
BLANKS = [" ", " ", " ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028"]
NUMBERS = """
    0 7 42 123 2024 1234567 3.14 -1e-05 1,000 12:30 2024-01-31 0x1F 50% $9.99 #1 x1 1st i=0; [0] range(10): ½ ² Ⅷ ٣٤
    १२ ０９ 1️⃣ 二 Ⅻ a1b2
"""


def varied_texts(words: str, count=1000) -> list[str]:
    rng, pieces = random.Random(0), [*words.split(), *BLANKS]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(count)]


TEXTS = varied_texts(WORDS)

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# How the published tokenizers cut, one pattern after another: tokenizer.json of the models, src/llama-vocab.cpp.
PATTERNS = {
    "gpt-2": [GPT2_WORDS],
    "smollm": [r"\p{N}", GPT2_WORDS],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ],
}


class ByteLevelReference:
    """Byte-level BPE as Radford et al. 2019 describe it: of all pairs in a word, the earliest merge first."""

    def __init__(self, metadata):
        self.ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(metadata["tokenizer.ggml.merges"])}
        self.patterns = PATTERNS[metadata["tokenizer.ggml.pre"]]
        self.whole_words = metadata["tokenizer.ggml.pre"] == "llama-bpe"

    def encode(self, text: str) -> list[int]:
        words = [text]
        for pattern in self.patterns:
            words = [part for word in words for part in self._cut(pattern, word)]
        return [self.ids[token] for word in words for token in self._merge(word)]

    def _cut(self, pattern, text):
        """What matches, and what stands between."""
        ends = [0, *(end for match in regex.finditer(pattern, text) for end in match.span()), len(text)]
        return [text[start:end] for start, end in pairwise(ends) if end > start]

    def _merge(self, word):
        spelling = byte_characters()
        tokens = [spelling[byte] for byte in word.encode()]
        if self.whole_words and "".join(tokens) in self.ids:
            return ["".join(tokens)]
        while True:
            known = [pair for pair in pairwise(tokens) if pair in self.ranks]
            if not known:
                return tokens
            best = min(known, key=self.ranks.__getitem__)
            merged, position = [], 0
            while position < len(tokens):
                both = tuple(tokens[position : position + 2]) == best
                merged.append("".join(best) if both else tokens[position])
                position += 1 + both
            tokens = merged


@pytest.fixture(scope="module")
def smollm2_file():
    return smollm2_gguf()


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_file):
    return open_gguf(smollm2_file).metadata


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata):
    return gguf_tokenizer(smollm2_metadata, "smollm2")


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    smollm2.save(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    """What transformers makes of the files that we write."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_smollm2_against_the_algorithm(smollm2, smollm2_metadata):
    reference = ByteLevelReference(smollm2_metadata)
    for text in TEXTS:
        assert smollm2.encode(text) == reference.encode(text), repr(text)
        assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_known_ids(smollm2):
    assert (smollm2.vocab_size, smollm2.end_of_text, smollm2.name) == (49152, 2, "smollm2")
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("<|im_start|>a<|im_end|>", allow_special=True) == [1, 81, 2]
    assert not {1, 2} & set(smollm2.encode("<|im_start|>a<|im_end|>"))
    assert smollm2.encode("a", add_special_tokens=True) == smollm2.encode("a")
    assert len(smollm2.encode("2024")) == 4


@pytest.fixture(scope="module")
def published(smollm2_metadata):
    """SmolLM2's published tokenizer.json, but for what has no effect on tokens, over the vocabulary in the file."""
    tokens, merges = (smollm2_metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    cuts = hf_tokenizers.pre_tokenizers
    tokenizer = hf_tokenizers.Tokenizer(
        hf_tokenizers.models.BPE(vocab=vocabulary, merges=[tuple(line.split(" ")) for line in merges])
    )
    tokenizer.pre_tokenizer = cuts.Sequence(
        [cuts.Digits(individual_digits=True), cuts.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.add_special_tokens(
        [hf_tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens[:17]]
    )
    return tokenizer


def test_smollm2_against_the_published_tokenizer(smollm2, published):
    """No text is left out: the digits are cut out first, so that a blank before one is a word of its own."""
    texts = [*TEXTS, *varied_texts(NUMBERS, 2000)]
    assert sum(bool(regex.search(r"\s\p{N}", text)) for text in texts) > 1000
    assert {number for text in texts for number in published.encode(text).ids} >= {0, 1, 2, 3}
    for text in texts:
        assert smollm2.encode(text, allow_special=True) == published.encode(text).ids, repr(text)
    published.encode_special_tokens = True  # as text, letter by letter
    for text in texts:
        assert smollm2.encode(text) == published.encode(text).ids, repr(text)


def test_smollm2_as_transformers_reads_the_file(smollm2, smollm2_file):
    """It cuts as GPT-2 does whatever `tokenizer.ggml.pre` says, which is wrong where blanks stand before a digit."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    alike = [text for text in TEXTS if not regex.search(r"\s\p{N}", text)]
    assert len(alike) > 500
    for text in alike:
        assert smollm2.encode(text, allow_special=True) == theirs(text, add_special_tokens=False).input_ids, repr(text)


def test_smollm2_saved_for_transformers(smollm2, saved):
    for text in TEXTS:
        assert saved(text).input_ids == smollm2.encode(text, allow_special=True), repr(text)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    assert saved.special_tokens_map == named | {"unk_token": "<|endoftext|>"}
    assert len(saved) == 49152


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 <|im_end|>\n  two 你好"}],
        [{"role": role, "content": f" {role} {i} "} for i in range(3) for role in ("user", "assistant")],
    ],
)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chats(smollm2, saved, messages, prompt):
    text = smollm2.chat_template.render(messages, add_generation_prompt=prompt)
    assert text == saved.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    ids = smollm2.encode(text, allow_special=True)
    assert ids == saved.apply_chat_template(messages, add_generation_prompt=prompt).input_ids
    assert ids[0] == 1
    assert text.endswith("<|im_start|>assistant\n") == prompt


@pytest.fixture(scope="module")
def gpt2_metadata():
    vocabulary = packaged_vocabulary()
    tokens = sorted(vocabulary.ids, key=vocabulary.ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in vocabulary.special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in vocabulary.merges],
        "tokenizer.ggml.bos_token_id": 50256,
        "tokenizer.ggml.eos_token_id": 50256,
    }


@pytest.mark.parametrize("pre", PATTERNS)
def test_how_text_is_cut_into_words(gpt2_metadata, pre):
    """With GPT-2's vocabulary, so that only the cuts differ."""
    metadata = gpt2_metadata | {"tokenizer.ggml.pre": pre}
    tokenizer, reference = gguf_tokenizer(metadata, pre), ByteLevelReference(metadata)
    gpt2 = GPT2Tokenizer()
    differing = 0
    for text in TEXTS[:300]:
        composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        ids = tokenizer.encode(text)
        assert ids == reference.encode(composed), repr(text)
        assert tokenizer.decode(ids) == composed
        differing += ids != gpt2.encode(text)
    assert (differing == 0) == (pre == "gpt-2")


@pytest.mark.parametrize(
    ("pre", "group"),
    [("falcon3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2"), ("megrez", "qwen2"), ("kormo", "qwen2")],
)
def test_names_that_llama_cpp_has_for_the_same(gpt2_metadata, pre, group):
    ours, same = (gguf_tokenizer(gpt2_metadata | {"tokenizer.ggml.pre": name}, "x").files() for name in (pre, group))
    assert ours == same


def test_the_published_tokenizer_of_gpt2(gpt2_metadata):
    ours, published = gguf_tokenizer(gpt2_metadata, "gpt2"), GPT2Tokenizer()
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == published.encode(text, allow_special=True)
    assert (ours.end_of_text, ours.vocab_size) == (50256, 50257)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"pre": "llama-bpe"}, [50256], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [50256], [50256]),
    ],
)
def test_beginning_and_end_tokens(gpt2_metadata, changes, before, after):
    metadata = gpt2_metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    tokenizer = gguf_tokenizer(metadata, "x")
    ids = tokenizer.encode("Hello world")
    assert tokenizer.encode("Hello world", add_special_tokens=True) == [*before, *ids, *after]
    assert 50256 not in ids


def test_without_a_pre_tokenizer_or_kinds_of_tokens(gpt2_metadata):
    bare = {key: value for key, value in gpt2_metadata.items() if not key.endswith(("pre", "token_type"))}
    with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre says how text is cut into words"):
        tokenizer = gguf_tokenizer(bare, "x")
    assert tokenizer.encode("<|endoftext|> a  1", allow_special=True) == [50256, 257, 220, 352]
    assert 50256 not in tokenizer.encode("<|endoftext|>")


class SentencePieceReference:
    """SentencePiece's BPE (Kudo and Richardson 2018): of all pairs that make a token, that with the highest score; the
    leftmost of several."""

    def __init__(self, metadata):
        self.ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        kinds = metadata["tokenizer.ggml.token_type"]
        scores = metadata["tokenizer.ggml.scores"]
        self.scores = {token: scores[number] for token, number in self.ids.items() if kinds[number] in (1, 4)}

    def encode(self, text: str) -> list[int]:
        parts = list("▁" + text.replace(" ", "▁")) if text else []
        while True:
            scores = [self.scores.get(left + right, -np.inf) for left, right in pairwise(parts)]
            if not scores or max(scores) == -np.inf:
                break
            at = int(np.argmax(scores))
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return [number for part in parts for number in self._ids(part)]

    def _ids(self, part):
        return [self.ids[part]] if part in self.scores else [self.ids[f"<0x{byte:02X}>"] for byte in part.encode()]


@pytest.fixture(scope="module")
def sentencepiece_metadata():
    """A small vocabulary as SentencePiece trains it, with a user's token and a special one that could be merged."""
    bpe = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    bpe.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace(split=True)
    trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False)
    bpe.train_from_iterator(
        [text for text in TEXTS[:400] if text.isascii()] + ["</s> <s> the quick brown"] * 9, trainer
    )
    learned = [token for token in sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__) if token != "</s>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "<|tool|>", "unused"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(learned), 4, 5]
    # Single characters are never merged to; SentencePiece gives them the lowest scores.
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_against_the_algorithm(sentencepiece_metadata):
    tokenizer, reference = gguf_tokenizer(sentencepiece_metadata, "x"), SentencePieceReference(sentencepiece_metadata)
    for text in ["", " ", "  a", *TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " "), repr(text)
    assert any(3 <= i < 259 for i in tokenizer.encode("你")), "a character that is in no token becomes bytes"


def test_runs_of_spaces_as_tokens_of_a_user(sentencepiece_metadata):
    """As in early files of Gemma, all with one score: llama.cpp joins them from the left."""
    metadata, added = dict(sentencepiece_metadata), [("▁" * length, 4, -1000.0) for length in range(2, 9)]
    for name, values in zip(("tokens", "token_type", "scores"), zip(*added, strict=True), strict=True):
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], *values]
    tokenizer, reference = gguf_tokenizer(metadata, "x"), SentencePieceReference(metadata)
    for length in range(40):
        assert tokenizer.encode(text := f"a{' ' * length}b") == reference.encode(text), length


def test_sentencepiece_special_tokens(sentencepiece_metadata):
    tokenizer = gguf_tokenizer(sentencepiece_metadata, "x")
    assert tokenizer.encode("the", add_special_tokens=True) == [1, *tokenizer.encode("the")]
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode("<s>the</s>", allow_special=True) == [1, *tokenizer.encode("the"), 2]
    tool = sentencepiece_metadata["tokenizer.ggml.tokens"].index("<|tool|>")
    assert tool in tokenizer.encode("a<|tool|>b"), "what a user defined is one token in any text"
    assert tokenizer.end_of_text == 2
    plain = gguf_tokenizer(sentencepiece_metadata | {"tokenizer.ggml.add_space_prefix": False}, "x")
    assert plain.encode("the") != tokenizer.encode("the") == plain.encode(" the")
    assert plain.decode(plain.encode(" the")) == " the"
    without = [token.replace("<0x", "<byte ") for token in sentencepiece_metadata["tokenizer.ggml.tokens"]]
    ids = gguf_tokenizer(sentencepiece_metadata | {"tokenizer.ggml.tokens": without}, "x").encode("the 你好")
    assert ids[-1] == 0 and ids.count(0) == 1, "what has no bytes either is unknown, once for all that is"


def test_sentencepiece_with_listed_merges(sentencepiece_metadata):
    """As in files made from a tokenizer.json: scores all alike, merges in their place."""
    first = gguf_tokenizer(sentencepiece_metadata, "x")
    count = len(sentencepiece_metadata["tokenizer.ggml.tokens"])
    merges = hf_merges(first)
    second = gguf_tokenizer(
        sentencepiece_metadata
        | {"tokenizer.ggml.scores": [-1000.0] * count, "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]},
        "x",
    )
    for text in TEXTS[:200]:
        assert second.encode(text) == first.encode(text)
    assert "tokenizer.model" not in second.files()  # which would go by the scores


def hf_merges(tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.files()["tokenizer.json"])["model"]["merges"]]


def test_sentencepiece_as_transformers_reads_and_loads_it(sentencepiece_metadata, tmp_path):
    ours = gguf_tokenizer(sentencepiece_metadata, "x")
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    adders = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
    for key, value in sentencepiece_metadata.items():
        adders[type(value)](key, value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in TEXTS[:300]:
        ids = ours.encode(text, allow_special=True)
        assert saved(text).input_ids == [1, *ids], repr(text)
        # Theirs puts no second blank before a text that begins with one, and none after a special token.
        if not regex.search(r"^[ ▁]|<s>|</s>|<unk>|<\|tool\|>", text):
            assert theirs(text).input_ids == [1, *ids], repr(text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model='t5' is not supported, only gpt2 and llama"),
        ({"model": ["gpt2"]}, "tokenizer.ggml.model=['gpt2'] is not supported, only gpt2 and llama"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not supported, only default, gpt-2, smollm"),
        ({"pre": 7}, "tokenizer.ggml.pre is no str"),
        ({"tokens": None}, "the metadata lacks tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is no list of str"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        ({"merges": None}, "the metadata lacks tokenizer.ggml.merges"),
        ({"merges": ["Ġ zzzzz"]}, "the tokenizer cannot be built ("),
        ({"merges": ["Ġ"]}, "the tokenizer cannot be built ("),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for 50257 tokens"),
        ({"eos_token_id": 50257}, "tokenizer.ggml.eos_token_id=50257 is outside the vocabulary of 50257 tokens"),
        ({"eos_token_id": "0"}, "tokenizer.ggml.eos_token_id is no int"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is no bool"),
        ({"model": "llama"}, "the metadata lacks tokenizer.ggml.scores"),
        ({"chat_template": 1}, "tokenizer.chat_template is no str"),
    ],
)
def test_bad_metadata(gpt2_metadata, changes, reason):
    metadata = dict(gpt2_metadata)
    if changes.get("model") == "llama":
        del metadata["tokenizer.ggml.merges"]
    for name, value in changes.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    with pytest.raises(BadInput) as caught:
        gguf_tokenizer(metadata, "x")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_without_a_tokenizer():
    assert gguf_tokenizer({}, "x") is None
    assert gguf_tokenizer({"tokenizer.ggml.model": "no_vocab"}, "x") is None


def test_named_tokens_that_are_ordinary_stay_ordinary(gpt2_metadata, tmp_path):
    """Some files pad with "!": to be named would make it special in transformers, which then hides it from texts."""
    tokenizer = gguf_tokenizer(gpt2_metadata | {"tokenizer.ggml.padding_token_id": 0}, "x")
    assert tokenizer.decode(tokenizer.encode("Hi!"), skip_special_tokens=True) == "Hi!"
    tokenizer.save(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert saved.decode(saved("Hi!").input_ids, skip_special_tokens=True) == "Hi!"


def test_the_file_of_sentencepiece(sentencepiece_metadata, tmp_path):
    """By its published schema. llama.cpp's converter finds scores and kinds of tokens there and in the config."""
    added = {"tokens": ("  ", "\n\n\n\n"), "token_type": (4, 4), "scores": (-1000.0, -1000.0)}
    metadata = dict(sentencepiece_metadata)
    for name, values in added.items():
        metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"], *values]
    tokens, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    for prefixed in (True, False):
        tokenizer = gguf_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": prefixed}, "x")
        files = tokenizer.files()
        model = ModelProto.FromString(files["tokenizer.model"])
        assert [piece.piece for piece in model.pieces] == [*tokens[:-2], "▁▁", "\n\n\n\n"]
        assert [piece.type for piece in model.pieces] == kinds
        assert [piece.score for piece in model.pieces] == metadata["tokenizer.ggml.scores"]
        trained, spaces = model.trainer_spec, model.normalizer_spec
        assert (trained.model_type, trained.byte_fallback) == (trained.BPE, True)
        assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, -1)
        assert (spaces.name, spaces.add_dummy_prefix) == ("identity", prefixed)
        assert (spaces.remove_extra_whitespaces, spaces.escape_whitespaces) == (False, True)
        config = json.loads(files["tokenizer_config.json"])
        assert config.get("add_prefix_space", True) == prefixed
        told = {int(number): token["special"] for number, token in config["added_tokens_decoder"].items()}
        assert told == {number: kind in (2, 3) for number, kind in enumerate(kinds) if kind in (2, 3, 4)}
        tokenizer.save(tmp_path)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in [*TEXTS[:100], "a  b\n\n\n\nc <s>"]:
            assert saved.encode(text, add_special_tokens=False) == tokenizer.encode(text, allow_special=True)


@pytest.mark.parametrize(
    ("changes", "kinds", "has_file"),
    [
        ({}, {2: 3}, True),  # an unknown token of a control's kind, by its name
        ({}, {2: 3, 3: 2}, True),  # the first of several of that kind
        ({"<unk>": "<none>"}, {2: 3}, False),
        ({"<|tool|>": "▁tool"}, {}, False),
        ({"<|tool|>": " "}, {}, False),  # "▁" is there
        ({"<0x0A>": "<newline>"}, {}, False),
        ({}, {6: 1}, False),
        ({"unused": ""}, {}, False),
        ({}, {5: 0}, False),
    ],
)
def test_vocabularies_that_sentencepiece_has_no_file_for(sentencepiece_metadata, changes, kinds, has_file):
    metadata = dict(sentencepiece_metadata)
    metadata.pop("tokenizer.ggml.unknown_token_id")
    metadata["tokenizer.ggml.tokens"] = [changes.get(token, token) for token in metadata["tokenizer.ggml.tokens"]]
    metadata["tokenizer.ggml.token_type"] = [kinds.get(kind, kind) for kind in metadata["tokenizer.ggml.token_type"]]
    files = gguf_tokenizer(metadata, "x").files()
    assert ("tokenizer.model" in files) == has_file
    if has_file:
        assert [piece.type for piece in ModelProto.FromString(files["tokenizer.model"]).pieces].count(2) == 1


def test_kinds_that_a_sentencepiece_vocabulary_does_not_give(sentencepiece_metadata):
    given = dict(sentencepiece_metadata)
    kinds = given.pop("tokenizer.ggml.token_type")
    found = ModelProto.FromString(gguf_tokenizer(given, "x").files()["tokenizer.model"])
    assert [piece.type for piece in found.pieces] == [1 if kind in (4, 5) else kind for kind in kinds]


@pytest.mark.parametrize("score", [-1e300, float("nan"), float("-inf")])
def test_a_score_that_sentencepiece_could_not_hold(sentencepiece_metadata, score):
    scores = [*sentencepiece_metadata["tokenizer.ggml.scores"][:-1], score]
    with pytest.raises(BadInput, match=re.escape(f"scores gives 'unused' {score}, which is not finite in 32 bits")):
        gguf_tokenizer(sentencepiece_metadata | {"tokenizer.ggml.scores": scores}, "x")


def test_new_tokens_beside_a_sentencepiece_file(sentencepiece_metadata):
    """llama.cpp's converter reads tokens from that file, and others from added_tokens.json, not from tokenizer.json."""
    files = gguf_tokenizer(sentencepiece_metadata, "x").files()
    files.pop("tokenizer.model")
    config = json.loads(files["tokenizer_config.json"])
    del config["added_tokens_decoder"]
    files["tokenizer_config.json"] = json.dumps(config).encode()
    old = {"tokenizer.model": b"", "added_tokens.json": b'{"<old>": 7}'}
    assert "added_tokens.json" not in TokenizerFiles(files, "x").with_tokens(["<new>"], True).contents
    for companions, before in ((dict(list(old.items())[:1]), {}), (old, {"<old>": 7})):
        more = TokenizerFiles(files | companions, "x").with_tokens(["<new>"], special=True)
        assert json.loads(more.contents["added_tokens.json"]) == before | {"<new>": more.token_id("<new>")}


def test_a_token_of_a_million_characters_takes_no_time():
    """It is cut in two only where both parts may be tokens: else the time grew with the square of its length."""
    run = "a" * 10**6
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", run[1:], run]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": names}
    metadata |= {"tokenizer.ggml.scores": [-float(number) for number in range(len(names))]}
    metadata |= {"tokenizer.ggml.token_type": [2, *[6] * 256, 1, 1, 1]}
    began = time.process_time()
    files = gguf_tokenizer(metadata, "long").files()
    assert time.process_time() - began < 20
    merges = json.loads(files["tokenizer.json"])["model"]["merges"]
    assert [[len(part) for part in pair] for pair in merges] == [[10**6 - 1, 1], [1, 10**6 - 1]]
