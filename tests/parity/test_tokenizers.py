"""Token ids against transformers, offline: it reads the folders that `save` writes, and OpenAI's own files."""

import json
import random

import pytest
import transformers

from llmq_jax.data import ByteTokenizer, GPT2Tokenizer, load_tokenizer
from llmq_jax.data.gpt2_vocabulary import packaged_vocabulary
from llmq_jax.errors import BadInput

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


def test_files_beside_a_vocabulary_count(tmp_path):
    """Tokens that tokenizer_config.json adds, its end token, its chat template: without a tokenizer.json too."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokens = {50256: END, 50257: "<|im_start|>", 50258: "<|im_end|>"}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "added_tokens_decoder": {number: {"content": token, "special": True} for number, token in tokens.items()},
    }
    files = GPT2Tokenizer().files()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.end_of_text, ours.vocab_size) == (theirs.eos_token_id, len(theirs)) == (50258, 50259)
    messages = [{"role": "user", "content": " Hé  x\n"}, {"role": "assistant", "content": "ok"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat_template.render(messages) == text
    assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"]
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode(text, allow_special=True) == theirs(text)["input_ids"] and again.end_of_text == 50258
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: number for number, token in tokens.items()}))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(tmp_path).end_of_text == 50258
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": None}))
    assert load_tokenizer(tmp_path).end_of_text == 50258
    for change, message in (
        ({"tokenizer_class": "Qwen2Tokenizer"}, "names a Qwen2Tokenizer, and vocab"),
        ({"add_prefix_space": True}, "names add_prefix_space, and vocab"),
        ({"add_bos_token": True}, "names add_bos_token, and vocab"),
        ({"add_eos_token": True}, "names add_eos_token, and vocab"),
        (
            {"added_tokens_decoder": {50257: {"content": "<think>", "special": False}}},
            "'<think>' is added and not special",
        ),
        (
            {"added_tokens_decoder": {50257: {"content": "<mask>", "special": True, "lstrip": True}}},
            "'<mask>' is added with lstrip",
        ),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=message):
            load_tokenizer(tmp_path)


def test_tokens_that_are_named_beside_a_vocabulary_are_kept(tmp_path):
    files = GPT2Tokenizer().files()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(files[name])
    (tmp_path / "added_tokens.json").write_text('{"<|pad|>": 50257}')
    for named, is_ours in (({}, True), ({"bos_token": END}, True), ({"pad_token": "<|pad|>"}, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **named}))
        ours = load_tokenizer(tmp_path)
        assert isinstance(ours, GPT2Tokenizer) == is_ours
        ours.save(tmp_path / "again")
        theirs, again = map(transformers.AutoTokenizer.from_pretrained, (tmp_path, tmp_path / "again"))
        assert again.special_tokens_map == theirs.special_tokens_map
        assert again.pad_token_id == (None if is_ours else 50257)


def test_a_token_with_a_name_is_special(tmp_path):
    """Whatever tokenizer.json says of it: else a text could spell the end of a document."""
    ByteTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"][0]["special"] = False
    path.write_text(json.dumps(values))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"a{END}b"
    assert not isinstance(ours, ByteTokenizer)
    assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"] == [97, 256, 98]
    for skip in (False, True):
        assert ours.decode([97, 256], skip_special_tokens=skip) == theirs.decode([97, 256], skip_special_tokens=skip)
    assert json.loads(ours.files()["tokenizer.json"])["added_tokens"][0]["special"] is False  # kept as it came


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
