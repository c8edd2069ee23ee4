"""Alpaca's and the plain template as chat templates: what training reads, written by Jinja."""

import json

import pytest
import tokenizers as hf_tokenizers

from llmq_jax.data import (
    ByteTokenizer,
    FileTokenizer,
    GPT2Tokenizer,
    as_chat_template,
    default_template,
    read_conversations,
    render,
    tokenize,
)
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.prompt_templates import alpaca_prompt, style_of
from llmq_jax.errors import BadInput

transformers = pytest.importorskip("transformers")

TURNS = [
    ("Name a colour.", "Blue."),
    ("the cat\n\n", "\n sat 😀 \n"),
    ("{{ messages }}{% if %} {# no #}", '"quotes" \\n \\ and {% endif %}'),
    ("日本", "é"),
]


@pytest.fixture(scope="module", params=["bytes", "gpt2", "beginning", "first word", "every piece"])
def tokenizer(request, tmp_path_factory):
    """Two without a beginning; bytes with one; and two that begin a text with <s> and put a space before its first
    word, or that of every piece between special tokens."""
    if request.param in ("bytes", "gpt2"):
        return ByteTokenizer() if request.param == "bytes" else GPT2Tokenizer()
    folder, end = tmp_path_factory.mktemp("tokenizer"), "</s>"
    if request.param == "beginning":
        ByteTokenizer().save(folder)
        made, end = hf_tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), "<|endoftext|>"
        made.add_special_tokens(["<s>"])
    else:
        made = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(unk_token="<unk>"))
        scheme = "first" if request.param == "first word" else "always"
        made.pre_tokenizer = hf_tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = hf_tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        trainer = hf_tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"])
        made.train_from_iterator([alpaca_prompt(*turn) for turn in TURNS] * 5, trainer)
    made.post_processor = hf_tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": end}))
    return FileTokenizer(folder)


def conversations(tmp_path, style):
    records = [{"prompt": prompt, "completion": answer} for prompt, answer in TURNS]
    if style == "alpaca":
        records = [{"instruction": prompt, "output": answer} for prompt, answer in TURNS]
        records += [{**record, "input": "so:\n{{ it }} 😀"} for record in records]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return read_conversations(tmp_path / "data.json")


def messages_of(conversation):
    asked, answer = conversation.messages
    return [{**asked, "input": conversation.input} if conversation.input else asked, answer]


@pytest.mark.parametrize("style", ["alpaca", "plain"])
def test_it_writes_what_is_learned(tokenizer, tmp_path, style):
    """The same tokens, of which the same are learned; so does transformers, from the tokenizer's files."""
    chat = tokenizer.with_chat_template(as_chat_template(style, tokenizer))
    assert style_of(chat.chat_template) == style and tokenizer.chat_template is None
    chat.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for conversation in conversations(tmp_path, style):
        rendered = render(conversation, style)
        expected, messages = tokenize(rendered, tokenizer), messages_of(conversation)
        tokens = expected.tokens.tolist()
        found = tokenize(render(conversation, "chat", chat.chat_template), chat)
        assert found.tokens.tolist() == tokens and found.learned.tolist() == expected.learned.tolist()

        text = theirs.apply_chat_template(messages, tokenize=False)
        assert text == chat.chat_template.render(messages, add_generation_prompt=False)
        begins, written, end = text.partition(rendered.text)
        assert written and begins.strip() == tokenizer.decode(tokenizer.beginning)
        assert end == tokenizer.decode([tokenizer.end_of_text])
        assert theirs.apply_chat_template(messages, return_dict=False) == tokens

        # What asks for the answer is what stands before it in training.
        asked = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        assert asked == chat.chat_template.render(messages[:1])
        assert asked + messages[1]["content"] + end == text
        if style == "alpaca":
            assert asked == begins + alpaca_prompt(messages[0]["content"], conversation.input)


SAID = {role: {"role": role, "content": role} for role in ("system", "user", "assistant")}


@pytest.mark.parametrize("style", ["alpaca", "plain"])
@pytest.mark.parametrize(
    ("roles", "asks"),
    [
        (("user", "assistant", "user"), True),
        (("user", "assistant", "user", "assistant"), False),
        (("system", "user"), True),
        (("system", "user", "assistant"), False),
        (("assistant",), False),
        (("user", "user"), True),
        (("user", "assistant"), True),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, style, roles, asks):
    tokenizer = ByteTokenizer()
    chat = tokenizer.with_chat_template(as_chat_template(style, tokenizer))
    messages = [SAID[role] for role in roles]
    told = f"the model answers one message of the user and takes no others, and not {', '.join(roles)}"
    with pytest.raises(BadInput, match=f"^the chat template refused these messages: {told}$"):
        chat.chat_template.render(messages, add_generation_prompt=asks)
    chat.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match=told):
        theirs.apply_chat_template(messages, add_generation_prompt=asks)


def test_a_tokenizer_whose_end_no_text_becomes(tmp_path):
    """A word of the vocabulary like any other: behind an answer it is a part of its last word."""
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({"[UNK]": 0, "END": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = hf_tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "END"}')
    assert as_chat_template("alpaca", FileTokenizer(tmp_path)) is None
    made.add_special_tokens(["END"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert as_chat_template("alpaca", FileTokenizer(tmp_path)) is not None


def test_the_style_is_the_default_of_what_follows(tmp_path):
    plain = ByteTokenizer()
    styled = {style: plain.with_chat_template(as_chat_template(style, plain)) for style in ("alpaca", "plain")}
    for style, tokenizer in styled.items():
        for form in ("alpaca", "plain"):
            assert default_template(conversations(tmp_path, form), tokenizer) == "chat", (style, form)
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    assert default_template(read_conversations(tmp_path / "text.jsonl"), styled["alpaca"]) == "plain"

    # By the plain one, an input stands in the message.
    *_, given = conversations(tmp_path, "alpaca")
    (asked, answer) = TURNS[-1]
    expected = f"{asked}\n\nso:\n{{{{ it }}}} 😀{answer}<|endoftext|>"
    assert render(given, "chat", styled["plain"].chat_template).text == expected
    assert style_of(None) is None and style_of(ChatTemplate("{{ messages }}")) is None
