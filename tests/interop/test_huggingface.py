"""Hugging Face folders: what transformers writes we read, what we write it reads, and files that are broken."""

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from llmq_jax.data import ByteTokenizer, GPT2Tokenizer, load_tokenizer
from llmq_jax.errors import BadInput
from llmq_jax.interop.architectures import weight_table
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.interop.safetensors_files import open_safetensors, write_safetensors
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load, save
from llmq_jax.models import build, init
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.weight_type import weight_type
from tests.byte_fallback import fallback_tokenizer
from tests.interop.refusals import refused
from tests.weights import draw_variables

CONFIG = GPT2Config(
    vocab_size=257, max_position_embeddings=16, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
)
TEXT = "Größe: 3 µm — “ja”\n\tdef f(x): return x<|endoftext|>🙂"


@pytest.fixture
def lm():
    generation = GenerationConfig(eos_token_id=(256, 10), bos_token_id=256, other={"temperature": 0.5})
    return LanguageModel(CONFIG, build(CONFIG), draw_variables(CONFIG, seed=3), ByteTokenizer(), generation)


@pytest.fixture
def theirs(tmp_path):
    """A folder that transformers wrote."""
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values = {name: value for name, value in {**values, **changes}.items() if value is not ...}
    path.write_text(json.dumps(values))


def tokens_for(lm):
    return np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, 9))


def test_a_folder_of_transformers(theirs):
    lm = load(theirs)
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs).eval()
    tokens = tokens_for(lm)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm.logits(tokens), expected, rtol=0, atol=1e-5)
    assert lm.generation.token_ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert lm.tokenizer is None
    for path in (theirs / "model.safetensors", str(theirs)):
        np.testing.assert_array_equal(load(path).logits(tokens), lm.logits(tokens))


def test_transformers_loads_our_export(lm, tmp_path):
    folder = save_hf(lm, tmp_path / "ours")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.dtype == torch.float32
    tokens = tokens_for(lm)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(lm.logits(tokens), expected, rtol=0, atol=1e-4)
    assert model.generation_config.eos_token_id == [256, 10]
    assert model.generation_config.temperature == 0.5
    assert model.config.bos_token_id == 256
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT.replace("<|endoftext|>", ""))["input_ids"] == list(TEXT.replace("<|endoftext|>", "").encode())


def test_without_special_tokens_transformers_assumes_none(lm, tmp_path):
    """Absent from config.json they would be 50256, outside this vocabulary."""
    folder = save_hf(lm.replace(generation=GenerationConfig()), tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None
    assert load(folder).generation.eos_token_id == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_files_come_back_bit_for_bit(tmp_path, dtype, tied):
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=12, n_layer=3, n_head=3, tie_word_embeddings=tied
    )
    transformers.GPT2LMHeadModel(config).to(dtype).save_pretrained(tmp_path / "theirs")
    lm = load(tmp_path / "theirs")
    folder = save_hf(lm, tmp_path / "ours")
    before, after = tmp_path / "theirs" / "model.safetensors", folder / "model.safetensors"
    assert after.read_bytes() == before.read_bytes()
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (
        json.loads((folder / "config.json").read_text()).items()
        >= {
            name: theirs[name] for name in ("architectures", "model_type", "n_embd", "n_layer", "activation_function")
        }.items()
    )


def test_export_in_another_type(lm, tmp_path):
    folder = save_hf(lm, tmp_path / "ours", dtype="bfloat16")
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # a server under another account reads all
    assert {array.dtype for array in load_file(folder / "model.safetensors").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert load(folder).params["final_norm"]["scale"].dtype == ml_dtypes.bfloat16
    assert load(folder, dtype="float32").params["final_norm"]["scale"].dtype == np.float32


@pytest.mark.parametrize("stored", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8_is_for_storage_alone(theirs, stored):
    """Without scales; transformers, too, computes in bfloat16 what is stored so."""
    state = {name: array.astype(stored) for name, array in load_file(theirs / "model.safetensors").items()}
    torch_type = {ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn, ml_dtypes.float8_e5m2: torch.float8_e5m2}[stored]
    safetensors.torch.save_file(
        {name: torch.tensor(array.view(np.uint8)).view(torch_type) for name, array in state.items()},
        theirs / "model.safetensors",
        {"format": "pt"},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.bfloat16).eval()
    lm = load(theirs)
    assert weight_type(lm.params) == ml_dtypes.bfloat16
    tokens = tokens_for(lm)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.float().numpy()
    np.testing.assert_allclose(lm.logits(tokens), expected, rtol=0, atol=0.02)
    for array in jax.tree.leaves(load(theirs, dtype="float32").params):
        assert array.dtype == np.float32


def test_shards(lm, tmp_path):
    folder = save_hf(lm, tmp_path / "ours", max_shard_size="10KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    _, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    whole = save_hf(lm, tmp_path / "whole")
    np.testing.assert_array_equal(load(folder).logits(tokens_for(lm)), load(whole).logits(tokens_for(lm)))
    assert (
        save_hf(load(folder), tmp_path / "again")
        and (tmp_path / "again" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    )


def test_generation_config_is_kept(theirs, tmp_path):
    path = theirs / "generation_config.json"
    edit_json(path, eos_token_id=[5, 7], pad_token_id=3, do_sample=True, top_k=50, temperature=0.6)
    values = json.loads(path.read_text())
    lm = load(theirs)
    assert (lm.generation.eos_token_id, lm.generation.bos_token_id, lm.generation.pad_token_id) == ((5, 7), 1, 3)
    assert json.loads((save_hf(lm, tmp_path / "ours") / "generation_config.json").read_text()) == values


def test_special_tokens_of_config_json_where_there_is_no_generation_config(theirs):
    (theirs / "generation_config.json").unlink()
    edit_json(theirs / "config.json", eos_token_id=[2, 4])
    assert load(theirs).generation.eos_token_id == (2, 4)
    edit_json(theirs / "config.json", pad_token_id=-1)  # "none", in configs of the first Llamas
    assert load(theirs).generation.pad_token_id is None
    edit_json(theirs / "config.json", eos_token_id="2")
    with pytest.raises(BadInput, match="eos_token_id='2' is neither a token id nor a list"):
        load(theirs)


def test_what_generation_ignores_is_named_in_one_warning(theirs, tmp_path):
    """Fields of generation_config.json or, where there is none, of config.json; in a run of ours, too."""
    path = theirs / "generation_config.json"
    plain = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "min_length": 0}
    edit_json(path, **plain, num_beams=1, bad_words_ids=[], temperature=0.6, top_k=20, do_sample=True, max_length=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(theirs)
    penalties = {"repetition_penalty": None, "bad_words_ids": [[3]], "min_new_tokens": 4}
    named = "ignored in generation: bad_words_ids=[[3]], min_new_tokens=4"
    edit_json(path, **penalties)
    with pytest.warns(UserWarning) as caught:
        lm = load(theirs)
    # At the line of whoever loads.
    assert [(str(warning.message), warning.filename) for warning in caught] == [(f"{path}: {named}", __file__)]
    with pytest.warns(UserWarning, match=re.escape(named)):
        load(save(lm, tmp_path / "run"))
    with pytest.warns(UserWarning, match=re.escape(named)):
        exec("load(folder)", {"load": load, "folder": theirs})  # code without a module
    path.unlink()
    edit_json(theirs / "config.json", **penalties)
    with pytest.warns(UserWarning) as caught:
        load(theirs)
    assert [str(warning.message) for warning in caught] == [f"{theirs / 'config.json'}: {named}"]


def test_a_penalty_on_repetition_is_named_with_what_applies_it(theirs):
    path = theirs / "generation_config.json"
    edit_json(path, repetition_penalty=1.1)
    with pytest.warns(UserWarning) as caught:
        lm = load(theirs)
    asked = "asks for repetition_penalty=1.1, which is not applied; give Sampler(repetition_penalty=1.1)"
    assert [str(warning.message) for warning in caught] == [f"{path}: {asked}"]
    assert lm.generation.repetition_penalty == 1.1


@pytest.mark.parametrize("end", [256, np.int64(256), [256], np.array([256]), jnp.array([256]), (np.int32(256),)])
def test_an_end_token_in_any_form_of_an_integer(lm, tmp_path, end):
    generation = GenerationConfig(eos_token_id=end, pad_token_id=np.int64(3))
    assert generation == GenerationConfig(eos_token_id=(256,), pad_token_id=3)
    assert load(save_hf(lm.replace(generation=generation), tmp_path / "ours")).generation == generation


@pytest.mark.parametrize(
    "fields", [{"eos_token_id": "256"}, {"eos_token_id": (True,)}, {"pad_token_id": 2.5}, {"bos_token_id": [1, 2]}]
)
def test_what_is_no_token_is_refused(fields):
    ((name, value),) = fields.items()
    assert f"{name}={value!r} is n" in refused(GenerationConfig, **fields)


def test_special_tokens_that_no_file_names(tmp_path):
    """transformers' class of a Llama's config has some, by which its models end no text."""
    folder = tmp_path / "theirs"
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", bos_token_id=..., eos_token_id=...)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.eos_token_id == 2
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (None, None)
    lm = load(folder)
    assert lm.generation == GenerationConfig()
    assert json.loads((save_hf(lm, tmp_path / "ours") / "config.json").read_text())["eos_token_id"] is None
    # The tokenizer's own end token ends what the model writes, unless a file says that none does.
    ByteTokenizer().save(folder)
    assert load(folder).generation == GenerationConfig(eos_token_id=(256,))
    edit_json(folder / "config.json", eos_token_id=None)
    assert load(folder).generation == GenerationConfig()


@pytest.mark.parametrize("pad", [2, 300])
def test_padding_in_generation_is_no_padding_of_the_embedding(tmp_path, pad):
    """A pad token of config.json is the `padding_idx` of transformers' embedding, whose row gets no gradient, and which
    must be in the vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    edit_json(tmp_path / "theirs" / "generation_config.json", pad_token_id=pad)
    lm = load(tmp_path / "theirs")
    assert lm.generation.pad_token_id == pad
    folder = save_hf(load(save(lm, tmp_path / "run")), tmp_path / "ours")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.pad_token_id == pad
    tokens = torch.tensor([[1, 2, 3]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.get_input_embeddings().weight.grad[2].abs().max() > 0
    assert load(folder).generation == lm.generation


def test_tokenizer_files_are_kept(lm, tmp_path):
    gpt2 = GPT2Tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=gpt2.vocab_size)
    lm = LanguageModel(config, build(config), draw_variables(config), gpt2)
    first = save_hf(lm, tmp_path / "first")
    (first / "chat_template.jinja").write_text("{{ messages }}")
    second = save_hf(load(first), tmp_path / "second")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (second / name).read_bytes() == (first / name).read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(second)
    assert theirs(TEXT.replace("<|endoftext|>", ""))["input_ids"] == gpt2.encode(TEXT.replace("<|endoftext|>", ""))


# Targets of an export.


def test_a_target_that_is_not_empty_is_refused(lm, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            BadInput, match="not empty" if not overwrite else "holds notes.txt, so it is no earlier export"
        ):
            save_hf(lm, tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(BadInput, match="is a file"):
        save_hf(lm, tmp_path / "notes.txt")


def test_an_earlier_export_is_replaced_on_request(lm, tmp_path):
    folder = save_hf(lm, tmp_path / "ours", max_shard_size="10KB")
    with pytest.raises(BadInput, match="not empty"):
        save_hf(lm, folder)
    save_hf(lm, folder, overwrite=True)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_empty_folder_may_be_the_target(lm, tmp_path):
    (tmp_path / "ours").mkdir()
    assert (save_hf(lm, tmp_path / "ours") / "model.safetensors").is_file()
    # Everyone may read it that may read other new folders.
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(_new_folder(tmp_path).stat().st_mode)


def _new_folder(parent: Path) -> Path:
    (parent / "new").mkdir()
    return parent / "new"


def test_nothing_is_left_of_an_export_that_failed(lm, tmp_path, monkeypatch):
    earlier = save_hf(lm, tmp_path / "ours")
    weights = (earlier / "model.safetensors").read_bytes()

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm.tokenizer, "save", fail)
    for target, overwrite in ((tmp_path / "new", False), (earlier, True)):
        with pytest.raises(OSError, match="No space left"):
            save_hf(lm, target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert (earlier / "model.safetensors").read_bytes() == weights


def test_the_earlier_export_comes_back_when_the_new_one_cannot_take_its_place(lm, tmp_path, monkeypatch):
    earlier = save_hf(lm, tmp_path / "ours")
    rename = Path.rename

    def fail(path, target):
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        save_hf(lm, earlier, dtype="bfloat16", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert load(earlier).params["final_norm"]["bias"].dtype == np.float32


def test_weights_that_cannot_be_written(lm, tmp_path):
    tensors = weight_table("gpt2").lazy_state_dict(lm.variables, lm.config)
    with pytest.raises((BadInput, OSError), match=r"model\.safetensors"):
        write_safetensors(tmp_path / "nowhere", tensors)


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("dtype", "float33"), ("max_shard_size", "big")])
def test_options_that_mean_nothing(lm, tmp_path, option, value):
    with pytest.raises(BadInput, match=f"{option}='{value}'"):
        save_hf(lm, tmp_path / "ours", **{option: value})
    assert not any(tmp_path.iterdir())


# Files that are broken.


@pytest.fixture
def sharded(lm, tmp_path):
    return save_hf(lm, tmp_path / "sharded", max_shard_size="10KB")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_safetensors(theirs, size):
    path = theirs / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    message = refused(load, theirs)
    assert str(path) in message and "truncated or damaged" in message


def test_bytes_after_the_end_and_a_header_that_lies(theirs):
    path = theirs / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"more")
    assert "truncated or damaged" in refused(load, theirs)
    path.write_bytes(content.replace(b'"shape":[37,12]', b'"shape":[37,13]'))
    assert "truncated or damaged" in refused(load, theirs)
    path.write_bytes(b"not at all a safetensors file")
    assert "truncated or damaged" in refused(load, theirs)


def test_git_lfs_pointer(theirs):
    (theirs / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a Git LFS pointer; run `git lfs pull`" in refused(load, theirs)


def test_weights_of_another_config(theirs):
    edit_json(theirs / "config.json", n_layer=3)
    message = refused(load, theirs)
    assert str(theirs) in message
    assert "12 missing (transformer.h.2.ln_1.weight" in message


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_may_not_leave_its_folder(sharded, name):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "transformer.wte.weight": name})
    assert f"names {name!r}, which is no .safetensors file in the same folder" in refused(load, sharded)


def test_missing_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    shards[2].unlink()
    assert f"2 of {len(shards)} shards are not there: {shards[1].name}, {shards[2].name}" in refused(load, sharded)


def test_an_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "transformer.h.7.ln_1.bias": weight_map["transformer.wte.weight"]})
    assert "transformer.h.7.ln_1.bias, which it does not" in refused(load, sharded)
    shards = list(weight_map.values())
    name, own = next((name, shard) for name, shard in weight_map.items() if shards.count(shard) > 1)
    other = next(shard for shard in shards if shard != own)
    edit_json(index, weight_map={**weight_map, name: other})
    assert f"says that {other} holds {name}, which it does not" in refused(load, sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', b"\xff\xfe"])
def test_an_index_that_is_none(sharded, content):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(index) in refused(load, sharded)


def test_a_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    assert f"which {first.name} holds too" in refused(load, sharded)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_config_that_is_none(theirs, content):
    (theirs / "config.json").write_text(content)
    assert str(theirs / "config.json") in refused(load, theirs)


def test_a_config_that_is_not_supported_is_named_with_its_file(theirs):
    edit_json(theirs / "config.json", scale_attn_weights=False)
    assert refused(load, theirs) == f"{theirs / 'config.json'}: scale_attn_weights=False is not supported, only True"


def test_weights_without_a_config(theirs):
    lm = load(theirs)
    (theirs / "config.json").unlink()
    assert "has weights but no config, and their shapes do not tell num_attention_heads" in refused(load, theirs)
    with_config = load(theirs, config=lm.config)
    np.testing.assert_array_equal(with_config.logits(tokens_for(lm)), lm.logits(tokens_for(lm)))
    assert load(theirs, config={"num_attention_heads": 3}).config == lm.config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("llama3.2-1b", "'llama3.2-1b' is no config of a model: give an instance of one of its classes"),
        (Path("config.json"), "is no config of a model"),
        ({1: 2}, "config={1: 2}: 1 is no name of a field"),
    ],
)
def test_what_is_no_config_is_refused(theirs, given, message):
    assert message in refused(load, theirs, config=given)
    (theirs / "config.json").unlink()
    assert message in refused(load, theirs, config=given)
    assert "num_attention_heads='3' is not of the type int" in refused(
        load, theirs, config={"num_attention_heads": "3"}
    )


def test_a_given_config_takes_the_place_of_the_file(theirs):
    config = load(theirs).config
    exact = dataclasses.replace(config, activation_function="gelu")
    assert load(theirs, config=exact).config == exact
    assert load(theirs, config={"activation_function": "gelu"}).config == exact
    with pytest.raises(BadInput, match=r"GPT2Config has no field 'activation'; did you mean activation_function\?"):
        load(theirs, config={"activation": "gelu"})


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_hub_id_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    unreached = "the Hugging Face hub could not be reached (no network, or offline)"
    assert refused(load, name) == f"{name}: there is no such file or folder, and {unreached}"


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/tiny", "org/tiny", None),
        ("org/tiny@v1.0", "org/tiny", "v1.0"),
        ("org/tiny@refs/pr/1", "org/tiny", "refs/pr/1"),
    ],
)
def test_the_hub_is_asked_for_a_revision_and_for_data_alone(theirs, monkeypatch, name, repository, revision):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision))
        there = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
        ]
        there += ["additional_chat_templates/tool_use.jinja", "modeling_tiny.py", "pytorch_model.bin", "x.pkl"]
        there += ["training_args.bin", "run.sh", "onnx/model.json", "onnx/model.safetensors", "other/template.jinja"]
        wanted = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        texts = ["tokenizer.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
        assert wanted == ["config.json", *(["model.safetensors"] if len(asked) > 1 else []), *texts]
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load(name)
    assert asked == [(repository, revision)] * 2  # texts first


def test_no_weights_are_fetched_of_a_model_whose_config_is_refused(theirs, monkeypatch, tmp_path):
    """Unless another config takes its place."""
    fetched = []

    def snapshot_download(allow_patterns, **wanted):
        fetched.append("model*.safetensors" in allow_patterns)
        if fetched[-1]:
            shutil.copy(theirs / "model.safetensors", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert f"{tmp_path / 'config.json'}: model_type 'mamba' is not supported" in refused(load, "org/tiny")
    assert "is not supported" in refused(load, "org/tiny", config={"vocab_size": 7})
    assert fetched == [False, False]
    load("org/tiny", config=load(theirs).config)
    assert fetched[2:] == [False, True]


def test_what_the_hub_does_not_give_is_told_in_a_line(tmp_path, monkeypatch):
    def gguf_alone(**wanted):
        return str(tmp_path / "snapshots" / "0")  # which is not made where no file is fetched

    def dropped(**wanted):
        raise RuntimeError("peer closed connection\nwithout a word")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gguf_alone)
    assert "has no file on the Hugging Face hub that could be read" in refused(load, "org/tiny-GGUF")
    monkeypatch.setattr("huggingface_hub.snapshot_download", dropped)
    assert "the Hugging Face hub did not give it (peer closed connection)" in refused(load, "org/tiny")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (GatedRepoError, "is given to those who accept its licence: do so on https://huggingface.co/org/tiny, "),
        (RepositoryNotFoundError, "the Hugging Face hub shows you no such model; check the name, or, of a private"),
    ],
)
def test_what_the_hub_does_not_give_to_strangers(monkeypatch, kind, told):
    """For want of a network these are raised here as the hub's client raises them: the first line tells nothing."""

    def refusing(**wanted):
        answer = SimpleNamespace(headers={}, request=None, status_code=401)
        raise kind("401 Client Error.\n\nNo access.", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    message = refused(load, "org/tiny@v1.0")
    assert message.startswith("org/tiny@v1.0: ") and told in message
    assert "https://huggingface.co/org/tiny" in message and "by `hf auth login`, or set HF_TOKEN" in message


def test_a_name_with_a_revision_that_is_none():
    for name in ("org/tiny@", "org/tiny@a b", "@v1", "org/tiny@v1@v2"):
        assert refused(load, name) == f"{name}: there is no such file or folder"


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert refused(load, "runs/min") == "runs/min: there is no such file or folder; did you mean runs/mine?"
    assert refused(load, "runs/other") == "runs/other: there is no such file or folder"


@pytest.mark.parametrize("name", ["./gpt2", "/no/such/folder", "a/b/c", "what is this"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    assert refused(load, name) == f"{name}: there is no such file or folder"


def test_a_hub_model_in_the_cache(theirs, tmp_path, monkeypatch):
    """Files of the hub's cache are links that leave their folder."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    for path in theirs.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lm = load("org/tiny")
    np.testing.assert_array_equal(lm.logits(tokens_for(lm)), load(theirs).logits(tokens_for(lm)))


def test_readers_are_mappings(sharded):
    tensors = open_safetensors(sharded)
    assert len(tensors) == 28
    tensor = tensors["transformer.wte.weight"]
    assert (tensor.shape, tensor.dtype) == ((257, 12), np.float32)
    assert np.asarray(tensor).shape == (257, 12)


PEAK = """
import re, sys
from pathlib import Path
import jax
from llmq_jax.model_files import load
from llmq_jax.interop.huggingface import save_hf
folder = Path(sys.argv[1])
jax.numpy.zeros(3).block_until_ready()
load(folder / "small")  # whatever a first load allocates
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
lm = load(folder / "large")
jax.block_until_ready(lm.variables)
loaded = peak()
save_hf(lm, folder / "again", max_shard_size="50MB")
print(loaded - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_model(tmp_path):
    """200 MB are read in little more than 200 MB, in shards or in one file, and written again in one shard more."""
    large = GPT2Config(vocab_size=20_000, hidden_size=768, num_hidden_layers=5, max_position_embeddings=64)
    small = GPT2Config(vocab_size=20, hidden_size=12, num_hidden_layers=1, max_position_embeddings=64)
    for name, config in (("small", small), ("large", large)):
        save_hf(LanguageModel(config, build(config), init(config)), tmp_path / name)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 200e6
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    loaded, saved = map(int, run.stdout.split())
    print(f"file {size / 1e6:.0f} MB, peak of loading {loaded / 1e6:.0f} MB, and of saving {saved / 1e6:.0f} MB")
    assert loaded < 1.25 * size
    assert saved < 1.5 * size


def test_a_tokenizer_of_the_hub_comes_without_weights(theirs, monkeypatch, tmp_path):
    there = ["config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "run.py", "a/b.json"]
    there += ["additional_chat_templates/tool_use.jinja", "original/tokenizer.model", "onnx/merges.txt"]

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        wanted = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert (repo_id, revision) == ("org/tiny", "v1")
        assert wanted == [
            "config.json",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "additional_chat_templates/tool_use.jinja",
        ]
        fallback_tokenizer().save(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = load_tokenizer("org/tiny@v1")
    assert tokenizer.name == "org/tiny@v1" and tokenizer.encode("hi") == fallback_tokenizer().encode("hi")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda **wanted: str(tmp_path / "none"))
    with pytest.raises(BadInput, match=r"org/tiny: has no file on the Hugging Face hub"):
        load_tokenizer("org/tiny")
