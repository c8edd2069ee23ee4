"""Hugging Face folders: what transformers writes we read, what we write it reads, and files that are broken."""

import dataclasses
import json
import os
import re
import stat
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import load_file, save_file

from llmq_jax.data import ByteTokenizer, GPT2Tokenizer
from llmq_jax.errors import BadInput
from llmq_jax.interop.architectures import to_state_dict, weight_table
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.interop.safetensors_files import open_safetensors, write_safetensors
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load, save
from llmq_jax.models import build
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.weight_type import weight_type
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


@pytest.mark.parametrize("size", ["0GB", "0.0 MB", "-5GB", "5GiB", "5", "infGB", "nanGB", "GB", 0, -1, 2.5, True, None])
def test_sizes_of_shards_that_are_none(lm, tmp_path, size):
    with pytest.raises(BadInput, match=re.escape(f'max_shard_size={size!r} is no size; write "5GB" or "500MB"')):
        save_hf(lm, tmp_path / "ours", max_shard_size=size)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5GB", "5 GB", " .5kb ", "1.KB", 700])
def test_sizes_of_shards_are_those_of_huggingface_hub(lm, tmp_path, size):
    files = sorted(path.name for path in save_hf(lm, tmp_path / "ours", max_shard_size=size).glob("*.safetensors"))
    split = split_state_dict_into_shards_factory(
        to_state_dict(lm.variables, lm.config),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=size,
    )
    assert files == sorted(split.filename_to_tensors)


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


def test_readers_are_mappings(sharded):
    tensors = open_safetensors(sharded)
    assert len(tensors) == 28
    tensor = tensors["transformer.wte.weight"]
    assert (tensor.shape, tensor.dtype) == ((257, 12), np.float32)
    assert np.asarray(tensor).shape == (257, 12)
