"""Token ids against transformers, offline: it reads the folders that `save` writes, and OpenAI's own files."""

import json
import random

import pytest
import transformers

from llmq_jax.data import ByteTokenizer, GPT2Tokenizer
from llmq_jax.data.gpt2_vocabulary import packaged_vocabulary

END = "<|endoftext|>"
# fmt: off
PIECES = [
    "Hello", " world", "the", " of", "'s", "'ll", "'RE", " don't", "I've", "’s", "won't've", "_x", "__init__",
    " ", "  ", "   \t", "\n", "\n\n\n", "\r\n", "\t\t", " \n ", "\u00a0", "\u2003", "\u3000", "\x85", "\x1c",
    "0", "42", "3.14159", "1,000,000", "１２", "²", "Ⅷ", "0xFF", "-7e-3",
    "def f(x):\n    return x**2\n", 'print(f"{a!r}")', "#include <a.h>", "a->b[i] += ~c;", "<div/>", "// —", "```",
    "😀", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🇩🇪", "é", "e\u0301", "ñ", "Straße", "İ",
    "Привет", "こんにちは", "你好", "مرحبا", "עברית", "한국어", "ไทย",
    "\x00", "\x07", "\x7f", "\ufffd", "\ufeff", "\u200b", "\U0010ffff", "𝔘𝔫𝔦",
    "aaaaaaaaaaaaaaaa", "!!!!!!!!", "????", "----------", "...", "…", "“q”", END, "<|endof", "text|>", "<|im_start|>",
]
# fmt: on


def varied_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return PIECES + ["".join(generator.choices(PIECES, k=generator.randint(2, 12))) for _ in range(count - len(PIECES))]


@pytest.fixture(scope="module", params=["bytes", "gpt2"])
def pair(request, tmp_path_factory):
    """Our tokenizer and the folder it saved, with the config.json of a model beside it, as in an exported model."""
    tokenizer = ByteTokenizer() if request.param == "bytes" else GPT2Tokenizer()
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tokenizer, folder


def test_saved_folder_in_auto_tokenizer(pair):
    tokenizer, folder = pair
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.eos_token == END
    for text in varied_texts(1000):
        special, plain = tokenizer.encode(text, allow_special=True), tokenizer.encode(text)
        assert theirs(text)["input_ids"] == special
        assert theirs(text, split_special_tokens=True)["input_ids"] == plain
        assert theirs.decode(special) == tokenizer.decode(special) == text
    assert theirs.decode([65, 0xC3, 66, 0xFF]) == tokenizer.decode([65, 0xC3, 66, 0xFF])


def test_gpt2_ids_equal_transformers():
    """transformers' own class from OpenAI's files, without anything that we wrote in between."""
    vocabulary = packaged_vocabulary()
    theirs = transformers.GPT2Tokenizer(vocab=vocabulary.ids, merges=vocabulary.merges)
    ours = GPT2Tokenizer()
    texts = varied_texts(1000)
    assert len(set(texts)) > 950
    for text in texts:
        assert theirs(text)["input_ids"] == ours.encode(text, allow_special=True)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)


def test_transformers_saves_what_we_load(pair, tmp_path):
    tokenizer, folder = pair
    from llmq_jax.data import load_tokenizer

    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.end_of_text == tokenizer.end_of_text
    for text in varied_texts(100):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
