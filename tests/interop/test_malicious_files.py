"""Models made to do harm: no code of theirs runs, no file but theirs is opened, and what is wrong is said in one line.

Pickles that run code are in test_torch_files.py, templates that take all time or memory in tests/data/
test_chat_template.py, damaged files of all formats in tests/fuzz.
"""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from gguf import GGUFWriter

from llmq_jax.adapters import load_adapter
from llmq_jax.data import tokenizer_in
from llmq_jax.interop.architectures import config_from_hf, config_to_hf, to_state_dict
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.gguf_files import open_gguf
from llmq_jax.interop.safetensors_files import open_safetensors
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load
from llmq_jax.models import build
from llmq_jax.models.llama3 import Llama3Config
from tests.fuzz.bounds import bounded, bounded_time
from tests.fuzz.readers import gguf_file, tokenizer_files
from tests.interop import refusals
from tests.weights import draw_variables

CONFIG = Llama3Config(
    vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, labels=("no", "yes")
)
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
MESSAGES = [{"role": "user", "content": "Hello"}]

_seen: list | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _seen is not None:
        if event in PROGRAMS:
            _seen.append((event, str(arguments)))
        elif event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[1], str):
            _seen.append((f"open {arguments[1]}", os.fsdecode(arguments[0])))


sys.addaudithook(_watch)  # there is no way to take it back


@pytest.fixture
def watched(tmp_path):
    """A folder for a model. While a test runs no program is started, nothing is written elsewhere, and what lies beside
    the folder is not opened."""
    global _seen
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
    secret.write_text("secret")
    _seen = []
    yield folder
    seen, _seen = _seen, None
    for event, what in seen:
        assert event.startswith("open "), (event, what)
        assert "secret" not in what, what
        written = any(mode in event for mode in "wax+")
        ours = (os.devnull, "/proc/", str(jax.config.jax_compilation_cache_dir))  # JAX keeps what it compiles
        assert not written or str(tmp_path) in what or what.startswith(ours), what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret", "secret.safetensors"]
    assert secret.read_text() == "secret"


def refused(call, *arguments, **named) -> str:
    with bounded(60):
        return refusals.refused(call, *arguments, **named)


class Harm:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_model(folder: Path, **fields) -> None:
    safetensors.numpy.save_file(to_state_dict(draw_variables(CONFIG), CONFIG), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config_to_hf(CONFIG), **fields}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.pt"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_that_open_files(watched, name, is_zip):
    state = {"w": torch.zeros(2), "harm": Harm(watched.parent / "made")}
    torch.save(state, watched / name, _use_new_zipfile_serialization=is_zip)
    said = f"it holds {open.__module__}.open, which is not loaded because that could run any code"
    assert said in refused(load, watched / name)


@pytest.mark.parametrize("protocol", range(5))
def test_bare_pickles(watched, protocol):
    (watched / "model.pth").write_bytes(pickle.dumps(Harm(watched.parent / "made"), protocol=protocol))
    assert refused(load, watched / "model.pth").startswith(f"{watched / 'model.pth'}: ")


def test_a_zip_of_paths_that_leave_it(watched):
    torch.save({"w": torch.zeros(2)}, watched / "model.pth")
    with zipfile.ZipFile(watched / "model.pth", "a") as file:
        file.writestr("../../made", "made")
        file.writestr("/tmp/made-by-a-model", "made")
    with bounded(60):
        refused(load, watched / "model.pth")  # it has no config; what lies in it is not unpacked
    assert not Path("/tmp/made-by-a-model").exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "name",
    ["../secret{0}", "{1}/secret{0}", "a/../../secret{0}", "sub/model{0}", "model{0}.txt", "/etc/passwd", "..", ""],
)
def test_an_index_that_leaves_its_folder(watched, weights, name):
    index, suffix = watched / f"{weights}.index.json", Path(weights).suffix
    name = name.format(suffix, watched.parent)
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert refused(load, watched) == f"{index}: names {name!r}, which is no {suffix} file in the same folder"


def safetensors_file(path: Path, header: dict | bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(written) if length is None else length).to_bytes(8, "little") + written + data)
    return path


def tensor(start: int, end: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"a": tensor(0, 8)}, 2**63 - 1),
        ({"a": tensor(0, 8)}, 2**40),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, None),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, None),
        ({"a": tensor(0, 2**40, (2**38,))}, None),
        ({"a": tensor(0, 16, (2**62, 2))}, None),
        ({"a": tensor(8, 0)}, None),
        ({"a": tensor(0, 8, (-2,))}, None),
        (b'{"a":' * 5000, None),
        (b"", None),
    ],
)
def test_safetensors_headers_are_held_against_the_file(watched, header, length):
    path = safetensors_file(watched / "model.safetensors", header, length=length)
    assert "not a safetensors file, or truncated or damaged" in refused(open_safetensors, path)


def test_a_config_that_asks_for_code(watched):
    """transformers would import it, if told to trust it; here it is not looked at."""
    (watched / "modeling_harm.py").write_text(f"open({str(watched.parent / 'made')!r}, 'w')\n")
    code = {"AutoConfig": "modeling_harm.Config", "AutoModelForCausalLM": "modeling_harm.Model"}
    write_model(watched, auto_map=code, trust_remote_code=True)
    with pytest.warns(UserWarning, match="unknown fields are ignored: auto_map, trust_remote_code"):
        load(watched)
    write_model(watched, auto_map=code, model_type="harm")
    assert "model_type 'harm' is not supported" in refused(load, watched)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**62},
        {"max_position_embeddings": 10**12},
        {"head_dim": 2**30},
        {"num_labels": 2**40, "id2label": None},
        {"hidden_size": 2**31 - 2, "num_attention_heads": 1},
    ],
)
def test_sizes_that_no_memory_holds(watched, fields):
    write_model(watched, **fields)
    assert refused(load, watched).startswith(f"{watched}")


@pytest.mark.parametrize("layers", [10**8, 2**62])
def test_layers_that_are_not_listed_one_by_one(watched, layers):
    fields = {"num_hidden_layers": layers, "sliding_window_pattern": 6}
    with bounded_time():
        assert "num_hidden_layers=" in refused(config_from_hf, {"model_type": "gemma3_text", **fields})


def test_labels_cannot_write_to_the_terminal(watched):
    write_model(watched, id2label={"0": "\x1b]0;harm\x07\n\x1b[2J", "1": "\x1b[2J", "7": "x"})
    assert refused(load, watched).isprintable()
    write_model(watched, model_type="\x1b[2J\nharm")
    assert refused(load, watched).isprintable()


TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ messages.__class__.__init__.__globals__ }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('touch made') }}": "unsafe",
    "{% include '../secret' %}": "no loader",
    "{% import '/etc/passwd' as x %}": "no loader",
    "{{ open('../secret').read() }}": "undefined",
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{{ 'a' * 10000000000 }}": "steps",
    "{{ 'a' | center(10000000000) }}": "could make more than",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja", "gguf"])
def test_chat_templates(watched, place, template):
    if place == "gguf":
        gguf_file(watched, template)
        tokenizer = load(watched / "model.gguf").tokenizer
    else:
        tokenizer_files(watched)
        tokenizer = None
        path = watched / place
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(template if place.endswith("jinja") else json.dumps({**values, "chat_template": template}))
    message = refused(lambda: (tokenizer or tokenizer_in(watched)).chat_template.render(MESSAGES))
    assert TEMPLATES[template] in message


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("place", ["tensors", "pairs", "key", "string", "array", "axis", "offset"])
def test_gguf_sizes_are_held_against_the_file(watched, place, length):
    writer = GGUFWriter(watched / "model.gguf", "llama")
    writer.add_token_list(["aaaa", "bbbb"])
    writer.add_tensor("weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray((watched / "model.gguf").read_bytes())
    name = content.index(b"weight")
    at = {
        "tensors": 8,
        "pairs": 16,
        "key": 24,
        "string": content.index(b"aaaa") - 8,
        "array": content.index(b"aaaa") - 16,
        "axis": name + 6 + 4,
        "offset": name + 6 + 4 + 16 + 4,
    }[place]
    content[at : at + 8] = length.to_bytes(8, "little")
    (watched / "model.gguf").write_bytes(content)
    assert "not a GGUF file, or truncated or damaged" in refused(open_gguf, watched / "model.gguf")


def adapted(folder: Path, **fields) -> LanguageModel:
    """A model with the adapter that is written into a folder, which is at the queries of its only layer."""
    lm = LanguageModel(CONFIG, build(CONFIG), draw_variables(CONFIG), None, GenerationConfig())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    state = {name.format("A"): np.ones((2, 8), np.float32), name.format("B"): np.ones((8, 2), np.float32)}
    safetensors.numpy.save_file(state, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return load_adapter(lm, folder)


@pytest.mark.parametrize(
    "pattern", ["(.*.*)*x", "((a+)+)+$", ".*.*.*.*.*.*x", ".?" * 200 + "X", "(.|.)" * 40 + "X", "q_proj|(.*.*)*x"]
)
def test_an_adapter_whose_patterns_take_for_ever(watched, pattern):
    """By Python's own search."""
    with bounded(60), bounded_time():
        lm = adapted(watched, alpha_pattern={pattern: 6})
    scale = lm.variables["lora_fixed"]["group_0"]["block_0"]["attention"]["query"]["kernel"]["scale"]
    assert scale.tolist() == [3.0 if pattern.startswith("q_proj") else 2.0]


@pytest.mark.parametrize("pattern", ["(", "a" * 5000, "a{1000}", r"(.+)\1", "(?!x)q_proj", "\ud800", "(?:" * 300])
def test_an_adapter_whose_patterns_are_not_searched_for(watched, pattern):
    assert refused(adapted, watched, rank_pattern={pattern: 4}).endswith("; name the modules")
