"""New tokens: which rows they take, what they start from, and what stays as it was."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel
from tests.devices import with_devices
from tests.weights import draw_variables

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3}
PAGE = Path(__file__).parents[1] / "docs" / "instruct.md"
MARK = "<!-- executed by tests/test_new_tokens.py -->"
THINK = ("<think>", "</think>")
IDS = np.arange(16)[None]


def model(vocab_size=257, tied=False, dtype=np.float32):
    config = lq.Llama3Config(vocab_size=vocab_size, tie_word_embeddings=tied, **SIZES)
    return LanguageModel(config, lq.build(config), draw_variables(config, dtype=dtype), lq.ByteTokenizer())


def changed(before, after):
    """The names of the parameters that are no longer the same arrays."""
    old, new = (flatten_dict(lm.params, sep="/") for lm in (before, after))
    assert old.keys() == new.keys()
    return {name for name in new if new[name] is not old[name]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones(tied, dtype):
    lm = model(tied=tied, dtype=dtype)
    grown = lq.add_tokens(lm, THINK)
    assert grown.config == lq.Llama3Config(vocab_size=259, tie_word_embeddings=tied, **SIZES)
    assert changed(lm, grown) == {"token_embedding/embedding"} | (set() if tied else {"lm_head/kernel"})
    for name, leaf, axis in (("token_embedding", "embedding", 0), ("lm_head", "kernel", 1))[: 1 if tied else 2]:
        old, new = lm.params[name][leaf], grown.params[name][leaf]
        assert new.dtype == old.dtype == jnp.dtype(dtype)
        old, new = np.asarray(old, np.float32), np.asarray(new, np.float32)
        mean = np.asarray(old.mean(axis, dtype=np.float64).astype(dtype), np.float32)
        np.testing.assert_array_equal(np.take(new, range(257), axis), old)
        np.testing.assert_allclose(np.take(new, [257, 258], axis), np.stack([mean, mean], axis), rtol=1e-2, atol=1e-6)
    before, after = lm.logits(IDS), grown.logits(IDS)
    np.testing.assert_allclose(after[..., :257], before, atol=1e-6)
    np.testing.assert_allclose(after[..., 257], before.mean(-1), atol=1e-5 if dtype == "float32" else 0.02)
    assert lm.config.vocab_size == lm.tokenizer.vocab_size == 257, "the model that was given stays"


def test_arrays_of_numpy_stay_such():
    lm = model()
    lm = lm.replace(variables=jax.tree.map(np.asarray, lm.variables))
    grown = lq.add_tokens(lm, THINK)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(grown.variables))
    np.testing.assert_allclose(grown.logits(IDS), lq.add_tokens(model(), THINK).logits(IDS), atol=1e-5)


def test_spare_rows_come_first():
    lm = model(vocab_size=260)
    first = lq.add_tokens(lm, THINK)
    assert changed(lm, first) == set() and first.config == lm.config and first.tokenizer.vocab_size == 259
    second = lq.add_tokens(first, ("<a>", "<b>", "<c>"))
    assert second.config.vocab_size == second.tokenizer.vocab_size == 262
    table = np.asarray(second.params["token_embedding"]["embedding"])
    np.testing.assert_array_equal(table[:260], lm.params["token_embedding"]["embedding"])
    assert second.tokenizer.encode("</think><b>", allow_special=True) == [258, 260]


def test_tokens_that_are_there_add_nothing():
    lm = model()
    for tokens in ((), "<|endoftext|>", ["<|endoftext|>"]):
        assert lq.add_tokens(lm, tokens).tokenizer is lm.tokenizer
        assert lq.add_tokens(lm, tokens, special=False).tokenizer is lm.tokenizer
    once = lq.add_tokens(lm, THINK)
    again = lq.add_tokens(once, [*THINK, "<answer>"])
    assert again.config.vocab_size == 260 and lq.add_tokens(again, THINK).tokenizer is again.tokenizer


def test_special_tokens_are_not_found_in_data():
    special, plain = (lq.add_tokens(model(), THINK, special=special).tokenizer for special in (True, False))
    text = "a<think>b"
    assert special.encode(text) == list(text.encode())
    assert special.encode(text, allow_special=True) == plain.encode(text) == [97, 257, 98]
    assert special.decode([97, 257, 98], skip_special_tokens=True) == "ab"
    assert plain.decode([97, 257, 98], skip_special_tokens=True) == text
    promoted = plain.with_tokens(THINK)
    assert promoted.encode(text) == special.encode(text) and promoted.vocab_size == 259
    assert special.with_tokens(THINK, special=False) is special


@pytest.mark.parametrize("tokens, message", [
    (5, r"tokens=5 must be the texts of the tokens, as \(\"<think>\", \"</think>\"\)"),
    ((b"<a>",), r"tokens\[0\] is b'<a>'; a token is a text that is not empty"),
    (("<a>", ""), r"tokens\[1\] is ''; a token is a text that is not empty"),
    (("<a>", "<b>", "<a>"), r"tokens\[2\] is '<a>', which is there twice; give it once"),
    (("\ud800",), r"text is not valid Unicode: half a surrogate pair at character 0"),
])  # fmt: skip
def test_what_is_no_token_is_told(tokens, message):
    with pytest.raises(BadInput, match=rf"^{message}$"):
        inspect.unwrap(lq.ByteTokenizer.with_tokens)(lq.ByteTokenizer(), tokens)


def test_a_model_without_a_tokenizer_is_told():
    with pytest.raises(BadInput, match="this model holds no tokenizer"):
        lq.add_tokens(model().replace(tokenizer=None), THINK)


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifiers_head_stays(tied):
    lm = lq.with_classifier(model(tied=tied), ("ham", "spam"))
    grown = lq.add_tokens(lm, THINK)
    assert changed(lm, grown) == {"token_embedding/embedding"}
    np.testing.assert_allclose(grown.classify(IDS), lm.classify(IDS), atol=1e-6)
    assert grown.classify("a").shape == (1, 2)


def test_modules_of_multi_token_prediction_read_the_same_rows():
    config = lq.preset("deepseek-10m", hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    assert config.num_nextn_predict_layers
    lm = LanguageModel(config, lq.build(config), draw_variables(config), lq.ByteTokenizer())
    grown = lq.add_tokens(lm, THINK)
    for before, after in zip(lm.mtp_logits(IDS), grown.mtp_logits(IDS), strict=True):
        np.testing.assert_allclose(after[..., :257], before, atol=1e-5)
        assert after.shape[-1] == 259


def test_a_model_of_ones_own_grows_wherever_it_has_the_vocabulary():
    """A bias of the head, say: its mean, too, is taken on."""

    class Biased(lq.Llama3):
        def setup(self):
            super().setup()
            self.bias = self.param("bias", jax.nn.initializers.normal(1.0), (self.config.vocab_size,))

        def unembed(self, hidden):
            return super().unembed(hidden) + self.bias

    lm = model()
    lm = lm.replace(model=Biased(lm.config))
    lm = lm.replace(variables=lm.model.init(jax.random.key(0), IDS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(lq.models.ARCHITECTURES, "llama", lq.models.Architecture(lq.Llama3Config, Biased))
        grown = lq.add_tokens(lm, THINK)
        before, after = lm.logits(IDS), grown.logits(IDS)
    np.testing.assert_allclose(after[..., :257], before, atol=1e-6)
    np.testing.assert_allclose(after[..., 258], before.mean(-1), atol=1e-5)


def test_adapters_stay(tmp_path):
    lm = model()
    adapted = lq.lora(lm, rank=2, variant="dora")
    grown = lq.add_tokens(adapted, THINK)
    np.testing.assert_allclose(grown.logits(IDS), lq.add_tokens(lm, THINK).logits(IDS), atol=1e-5)
    lq.save_adapter(grown, tmp_path / "adapter")
    onto_the_base = lq.load_adapter(lm, tmp_path / "adapter")
    assert onto_the_base.config == grown.config and onto_the_base.tokenizer.vocab_size == 259
    np.testing.assert_array_equal(onto_the_base.logits(IDS), grown.logits(IDS))
    assert lq.add_tokens(lq.lora(model(260), rank=2), THINK).variables.keys() == adapted.variables.keys()


@pytest.mark.parametrize("fields", [{}, {"variant": "tinylora", "tied": True}])
def test_an_adapter_at_the_head_is_told(fields):
    lm = lq.lora(model(), rank=2, targets=("query", "lm_head"), **fields)
    with pytest.raises(BadInput, match=r"^this model has an adapter at its head, which cannot grow; merge it first"):
        lq.add_tokens(lm, THINK)
    assert lq.add_tokens(lq.merge(lm), THINK).config.vocab_size == 259


def test_files_keep_them(tmp_path):
    lm = lq.add_tokens(model(), THINK)
    lm = lm.replace(generation=lm.generation.replace(eos_token_id=258))
    lq.save(lm, tmp_path / "ours")
    lq.save_hf(lm, tmp_path / "hf")
    for name in ("ours", "hf"):
        again = lq.load(tmp_path / name)
        assert again.config == lm.config and again.tokenizer.files() == lm.tokenizer.files()
        np.testing.assert_array_equal(again.logits(IDS), lm.logits(IDS))
        assert again.generation.eos_token_id == (258,)


def test_generation_ends_at_one():
    lm = lq.add_tokens(model(), THINK)
    head = jnp.zeros_like(lm.params["lm_head"]["kernel"]).at[:, 258].set(lm.hidden([[65]])[0, -1])
    lm = lm.replace(variables={"params": {**lm.params, "lm_head": {"kernel": head}}})
    greedy = lq.Sampler(temperature=0.0)
    assert lq.generate(lm, "A", 2, greedy).tokens[0, 0] == 258
    ends = lm.replace(generation=lm.generation.replace(eos_token_id=258))
    assert lq.generate(ends, "A", 4, greedy).lengths.tolist() == [1]


def test_the_page(tmp_path, monkeypatch, program):
    """What it makes learns from chats, and transformers writes and reads these as it."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = lq.GPT2Config(vocab_size=257, **sizes)
    lq.save_hf(LanguageModel(config, lq.build(config), draw_variables(config), lq.ByteTokenizer()), "gpt2")
    (code,) = re.findall(rf"{re.escape(MARK)}\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), {})

    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<think>easy</think>2"}]
    lm = lq.load("gpt2-chat")
    text = lm.tokenizer.chat_template.render(messages, add_generation_prompt=False)
    tokens = lm.tokenizer.encode(text, allow_special=True)
    assert lm.generation.eos_token_id == (258,) and set(range(257, 261)) <= set(tokens)
    theirs = transformers.AutoTokenizer.from_pretrained("gpt2-chat")
    assert theirs.apply_chat_template(messages, return_dict=False) == tokens
    assert theirs.decode(tokens, skip_special_tokens=True) == lm.tokenizer.decode(tokens, skip_special_tokens=True)
    assert transformers.GenerationConfig.from_pretrained("gpt2-chat").eos_token_id == 258

    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 12)
    given = (
        "--data=chats.jsonl",
        "--init-from=gpt2-chat",
        "--steps=2",
        "--batch-size=2",
        "--sample-every=0",
        "--evaluate-every=0",
    )
    whole = "--lora-whole=token_embedding"
    # So many different rows: they begin as one.
    for out, learned, *train in (("all", 4, "--train=all"), ("lora", 1), ("whole", 4, whole)):
        assert program("train.instruct", *given, *train, f"--out={out}")[0] == 0
        after = lq.load(out)
        assert after.tokenizer.encode(text, allow_special=True) == tokens and after.generation.eos_token_id == (258,)
        assert len(np.unique(np.asarray(after.params["token_embedding"]["embedding"])[257:], axis=0)) == learned

    # As adapters it goes to PEFT; here also onto the base that has no new tokens yet; and on in training.
    assert program("convert.to_hf", "whole", "adapter", "--adapter")[0] == 0
    expected = after.logits([tokens])
    torch = pytest.importorskip("torch")
    base = transformers.AutoModelForCausalLM.from_pretrained("gpt2-chat").eval()
    back = pytest.importorskip("peft").PeftModel.from_pretrained(base, "adapter").eval()
    with torch.no_grad():
        np.testing.assert_allclose(back(torch.tensor([tokens])).logits, expected, atol=1e-4)
    on_the_old = lq.load_adapter(lq.load("gpt2"), "adapter")
    np.testing.assert_allclose(on_the_old.logits([tokens]), expected, atol=1e-5)
    assert on_the_old.config == after.config and on_the_old.tokenizer.encode(text, allow_special=True) == tokens
    code, said, _ = program("train.instruct", *given, "--init-from=whole", "--out=on")
    assert code == 0 and "(lora, token_embedding)" in said


ON_A_MESH = """
import json, sys
import jax, numpy as np
import llmq_jax as lq

def shardings(lm):
    return {str(leaf.sharding) for leaf in (lm.params["token_embedding"]["embedding"], lm.params["lm_head"]["kernel"])}

lm = lq.load(sys.argv[1], mesh="fsdp=2,tensor=2")
outside = lq.add_tokens(lm, ("<a>", "<b>", "<c>"))
with jax.set_mesh(lq.training.make_mesh("fsdp=2,tensor=2")):
    inside = lq.add_tokens(lm, ("<a>", "<b>", "<c>"))
    logits = np.asarray(inside.logits([list(range(16))])).tolist()
print(json.dumps({"same": shardings(lm) == shardings(inside) == shardings(outside), "logits": logits}))
"""


def test_rows_stay_divided_over_a_mesh(tmp_path):
    lm = model(vocab_size=258)
    lq.save(lm, tmp_path / "model")
    command = [sys.executable, "-c", ON_A_MESH, str(tmp_path / "model")]
    environment = {**with_devices(4), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["same"]
    np.testing.assert_allclose(found["logits"], lq.add_tokens(lm, ("<a>", "<b>", "<c>")).logits(IDS), atol=1e-5)
