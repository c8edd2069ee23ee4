"""New tokens against transformers: its `add_tokens` and `resize_token_embeddings`, and what it loads of ours."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

import llmq_jax as lq
from llmq_jax.data import FileTokenizer
from tests.byte_fallback import fallback_tokenizer
from tests.parity.adapters import FIELDS, moved
from tests.parity.decoders import LOGITS, assert_close, make_pair, their_logits
from tests.parity.references import numpy_state
from tests.parity.test_tokenizers import varied_texts

TOKENS = ("<think>", "</think>", "<|im_start|>")
TEXTS = [
    *varied_texts(200),
    "<think>a</think> b<|im_start|>c",
    "hi <think>",
    "<think></think>\n<think >",
    "hi<think> hi",
]
IDS = np.arange(0, 257, 4)[None, :40]


def tiny_pair(model_type, **fields):
    theirs, lm = make_pair(model_type, FIELDS[model_type] | {"vocab_size": 257, **fields})
    return theirs, lm.replace(tokenizer=lq.ByteTokenizer())


@pytest.mark.parametrize("model_type", FIELDS)
def test_every_model_grows_as_there(model_type, tmp_path):
    check(*tiny_pair(model_type), tmp_path)


def test_a_tied_head_too(tmp_path):
    check(*tiny_pair("llama", tie_word_embeddings=True), tmp_path)


def check(theirs, lm, folder):
    before, grown = lm.logits(IDS), lq.add_tokens(lm, TOKENS)
    assert_close(grown.logits(IDS)[..., :257], before)
    lq.save_hf(grown, folder / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager").eval()
    ids = np.append(IDS, [[257, 258, 259]], axis=1)
    expected = their_logits(again, ids)
    assert expected.shape[-1] == again.config.vocab_size == 260
    assert_close(grown.logits(ids), expected)
    # transformers draws new rows from a distribution around the mean, as narrow as 3e-5 of that of the old rows.
    torch.manual_seed(0)
    theirs.resize_token_embeddings(260)
    ours, resized = numpy_state(again), numpy_state(theirs)
    assert ours.keys() == resized.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], resized[name], rtol=0, atol=3e-4, err_msg=name)
    theirs.load_state_dict(again.state_dict())
    np.testing.assert_array_equal(their_logits(theirs, ids), expected)


def as_transformers_4_writes(tokenizer):
    """With the tokens that were added listed in tokenizer_config.json too; <think> is there, and not special."""
    files = tokenizer.with_tokens(["<think>"], special=False).files()
    added = {str(token.pop("id")): token for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    config = json.loads(files["tokenizer_config.json"]) | {"added_tokens_decoder": added}
    return FileTokenizer.from_files(files | {"tokenizer_config.json": json.dumps(config).encode()}, "listed")


TOKENIZERS = {
    "bytes": lq.ByteTokenizer,
    "gpt2": lq.GPT2Tokenizer,
    "fallback": fallback_tokenizer,
    "listed": lambda: as_transformers_4_writes(lq.ByteTokenizer()),
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_files(kind, special, tmp_path):
    before = TOKENIZERS[kind]()
    before.save(tmp_path / "before")
    ours = before.with_tokens(TOKENS, special=special)
    ours.save(tmp_path / "ours")
    (tmp_path / "before" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "before")
    theirs.add_tokens(list(TOKENS), special_tokens=special)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    again = lq.load_tokenizer(tmp_path / "ours")
    assert len(theirs) == len(loaded) == ours.vocab_size == again.vocab_size
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids, text
        assert ours.encode(text, allow_special=True) == again.encode(text, allow_special=True) == ids, text
        for skip in (False, True):
            spelled = theirs.decode(ids, skip_special_tokens=skip)
            assert loaded.decode(ids, skip_special_tokens=skip) == spelled, text
            assert ours.decode(ids, skip_special_tokens=skip) == spelled, text
    flags = {str(token): token.special for token in loaded.added_tokens_decoder.values()}
    assert [flags[token] for token in TOKENS] == [special] * 3
    assert before.encode("<think>", allow_special=True) == before.encode("<think>"), "the one that was given stays"


def test_adapters_go_along_onto_a_base_of_as_many_tokens(tmp_path):
    theirs, lm = tiny_pair("llama")
    grown = lq.add_tokens(moved(lq.lora(lm, rank=2)), TOKENS)
    lq.save_adapter(grown, tmp_path / "adapter")
    theirs.resize_token_embeddings(260, mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = np.append(IDS, [[257, 258, 259]], axis=1)
    np.testing.assert_allclose(their_logits(adapted, ids), grown.logits(ids), atol=LOGITS, rtol=0)
