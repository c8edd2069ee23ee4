"""PyTorch's files: what torch and transformers write we read; pickles that hold more than tensors are never run."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llmq_jax.interop.huggingface import save_hf
from llmq_jax.interop.tensor_files import TensorFiles
from llmq_jax.interop.torch_files import open_torch
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load
from llmq_jax.models import build
from llmq_jax.models.gpt2 import GPT2Config
from tests.interop.refusals import refused
from tests.weights import draw_variables

TENSORS = {
    "float32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bfloat16": torch.arange(6).to(torch.bfloat16) / 7,
    "float16": torch.arange(6, dtype=torch.float16) / 7,
    "float64": torch.arange(3, dtype=torch.float64) / 7,
    "float8_e4m3fn": torch.arange(3).to(torch.float8_e4m3fn),
    "int64": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "strided": torch.arange(6, dtype=torch.float32)[::2],
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.fixture
def theirs(tmp_path):
    """A folder of transformers with pytorch_model.bin, as versions before 4.30 wrote it."""
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "model.safetensors")
    # In memory the head is there too, under its own name.
    torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    return tmp_path / "theirs"


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_of_all_types(tmp_path, is_zip):
    """Files of today, and those from before PyTorch 1.6, as the first GPT-2 on the hub is one."""
    state = {name: tensor for name, tensor in TENSORS.items() if is_zip or not name.startswith("float8")}
    torch.save(state, tmp_path / "state.pth", _use_new_zipfile_serialization=is_zip)
    tensors = open_torch(tmp_path / "state.pth")
    assert list(tensors) == list(state)
    for name, expected in state.items():
        tensor, array = tensors[name], np.asarray(tensors[name])
        assert tensor.shape == array.shape == tuple(expected.shape)
        assert str(tensor.dtype) == str(array.dtype) == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float64), expected.detach().double().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers(theirs, tmp_path, dtype):
    state = torch.load(theirs / "pytorch_model.bin")
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, theirs / "pytorch_model.bin")
    lm = load(theirs)
    assert lm.params["final_norm"]["bias"].dtype == str(dtype).removeprefix("torch.")
    assert lm.generation.eos_token_id == (2,)
    exported = save_hf(lm, tmp_path / "ours")
    if dtype == torch.float32:
        assert (exported / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    for path in (str(theirs), theirs / "pytorch_model.bin"):
        np.testing.assert_array_equal(load(path).logits([[1, 2]]), lm.logits([[1, 2]]))


def test_safetensors_come_first(theirs, tmp_path):
    (tmp_path / "model.safetensors").rename(theirs / "model.safetensors")
    (theirs / "pytorch_model.bin").write_bytes(b"never read")
    assert load(theirs).config.vocab_size == 37


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_models_that_were_wrapped_for_training(theirs, prefix):
    """By DistributedDataParallel, by torch.compile, or by both."""
    expected = load(theirs).logits([[1, 2]])
    state = torch.load(theirs / "pytorch_model.bin")
    torch.save({prefix + name: tensor for name, tensor in state.items()}, theirs / "checkpoint.pth")
    np.testing.assert_array_equal(load(theirs / "checkpoint.pth").logits([[1, 2]]), expected)


@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict"])
def test_checkpoints_of_training_scripts(theirs, wrapper):
    """{"model_state_dict": ..., "optimizer_state_dict": ...}: the optimizer's state is passed over."""
    expected = load(theirs).logits([[1, 2]])
    state = torch.load(theirs / "pytorch_model.bin")
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    wrapped = {wrapper: state, "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}
    torch.save(wrapped, theirs / "checkpoint.pth")
    np.testing.assert_array_equal(load(theirs / "checkpoint.pth").logits([[1, 2]]), expected)


def test_the_hub_is_asked_for_bin_files_only_where_there_are_no_safetensors(theirs, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        kinds = ("pytorch_model*.bin", "model*.safetensors", "*.json")
        asked.append(next(kind for kind in kinds if kind in allow_patterns))
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = load(theirs).logits([[1, 2]])
    np.testing.assert_array_equal(load("org/old").logits([[1, 2]]), expected)
    (tmp_path / "model.safetensors").rename(theirs / "model.safetensors")
    np.testing.assert_array_equal(load("org/new").logits([[1, 2]]), expected)
    text, safetensors = ("*.json", "model*.safetensors")
    assert asked == [text, safetensors, "pytorch_model*.bin", text, safetensors]


def shard(folder, names=("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")):
    """Split pytorch_model.bin in two, and give the index."""
    state = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for part, name in enumerate(names):
        keys = list(state)[part::2]
        torch.save({key: state[key].clone() for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(theirs):
    expected = load(theirs).logits([[1, 2]])
    index = shard(theirs)
    np.testing.assert_array_equal(load(theirs).logits([[1, 2]]), expected)
    tensors = open_torch(theirs)
    assert isinstance(tensors, TensorFiles)
    assert len({tensors.file_of(name) for name in tensors}) == 2
    (theirs / "pytorch_model-00002-of-00002.bin").unlink()
    assert f"{index}: 1 of 2 shards are not there: pytorch_model-00002-of-00002.bin" in refused(load, theirs)


def test_an_index_that_lies(theirs):
    index = shard(theirs)
    values = json.loads(index.read_text())
    values["weight_map"]["transformer.h.7.ln_1.bias"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(values))
    assert "says that pytorch_model-00001-of-00002.bin holds transformer.h.7.ln_1.bias" in refused(load, theirs)


# Pickles that are no plain state dicts.


class Malicious:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_torch(content, path):
    torch.save(content, path)


def write_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def write_old_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [write_torch, write_old_torch, write_pickle, write_old_pickle])
@pytest.mark.parametrize("wrapped", [True, False])
def test_code_is_never_run(tmp_path, write, wrapped):
    proof = tmp_path / "it_ran"
    content = {"wte.weight": torch.zeros(2), "evil": Malicious(proof)}
    path = tmp_path / "model.pth"
    write({"model_state_dict": content} if wrapped else content, path)
    message = refused(load, path)
    assert message.startswith(f"{path}: ")
    assert not proof.exists()
    if write in (write_torch, write_old_torch):
        assert "is no plain state dict: it holds posix.system, which is not loaded because" in message
    # And the pickle does what it is there for.
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()


def test_a_whole_module(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    message = refused(load, tmp_path / "model.pt")
    assert "it holds torch.nn.modules.linear.Linear" in message
    assert message.endswith("save model.state_dict() alone")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}, "epoch": 3}, "holds no tensors"),
        ([torch.zeros(2)], "holds a list, not a state dict; save model.state_dict()"),
        (torch.zeros(2), "holds a Tensor, not a state dict"),
        ({"wte.weight": torch.zeros(2), "epoch": 3}, "'epoch' is of the type int, where only tensors belong"),
        ({"model_state_dict": {"wte": {"weight": torch.zeros(2)}}}, "'wte' is of the type dict, where only tensors"),
        ({3: torch.zeros(2)}, "3 is of the type Tensor, where only tensors belong"),
        ({"w": torch.zeros(2).to_sparse()}, "w is of the type torch.float32 (torch.sparse_coo, cpu), which is not"),
        ({"w": torch.zeros(2, device="meta")}, "w is of the type torch.float32 (torch.strided, meta)"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    assert message in refused(load, tmp_path / "model.pth")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files(tmp_path, is_zip, share):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(20, 20).state_dict(), path, _use_new_zipfile_serialization=is_zip)
    os.truncate(path, int(share * path.stat().st_size))
    message = refused(load, path)
    assert message.startswith(f"{path}: ") and len(message) < len(str(path)) + 250
    assert "truncated or damaged" in message or "no plain state dict" in message


@pytest.mark.parametrize("content", [b"not a pickle", b"PK\x03\x04 nor a zip file", b"\x80\x02."])
def test_files_of_something_else(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert refused(load, path).startswith(f"{path}: not a file of PyTorch's, or truncated or damaged (")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a Git LFS pointer; run `git lfs pull`" in refused(load, tmp_path)


def test_without_torch(theirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = theirs / "pytorch_model.bin"
    assert refused(load, theirs) == (
        f"{path}: only PyTorch reads this file, and it is not installed: pip install -e '.[torch]'"
    )


def test_torch_is_imported_only_when_it_is_needed(tmp_path):
    config = GPT2Config(
        vocab_size=9, max_position_embeddings=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    folder = save_hf(LanguageModel(config, build(config), draw_variables(config)), tmp_path / "hf")
    code = "import sys, llmq_jax as lq; lq.load(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=Path(__file__).parents[2])


def test_bfloat16_keeps_its_bits(tmp_path):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    torch.save({"w": bits.view(torch.bfloat16)}, tmp_path / "model.pth")
    found = np.asarray(open_torch(tmp_path / "model.pth")["w"])
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.int16), bits.numpy())
