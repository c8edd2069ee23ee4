"""The readers that are given damaged input: for each the parts of a valid one, how they are written, how it is read."""

import functools
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gguf
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import tokenizers
import torch

from llmq_jax.commands.kept_lines import KeptLines
from llmq_jax.data import ByteTokenizer, FileTokenizer, Tokenizer, tokenizer_in
from llmq_jax.data.conversations import read_conversations
from llmq_jax.data.labelled import read_labelled
from llmq_jax.data.nanogpt_tokens import read_nanogpt_tokens
from llmq_jax.data.preferences import read_preferences
from llmq_jax.data.prompts import read_prompts
from llmq_jax.data.sources import read_documents
from llmq_jax.data.token_files import read_tokens, write_tokens
from llmq_jax.interop import huggingface, peft_reader
from llmq_jax.interop.architectures import config_from_hf, config_to_hf, to_state_dict
from llmq_jax.interop.gguf import read_gguf
from llmq_jax.interop.huggingface import read_hf
from llmq_jax.interop.nanogpt import config_from_model_args
from llmq_jax.interop.openai import checkpoint_index, config_from_hparams
from llmq_jax.interop.peft import sites_of
from llmq_jax.interop.peft_reader import base_of, read_adapter
from llmq_jax.interop.safetensors_files import open_safetensors
from llmq_jax.interop.tensor_files import read_json
from llmq_jax.interop.tensorflow_bundle import FOOTER, MAGIC, open_tensorflow
from llmq_jax.interop.torch_files import open_torch
from llmq_jax.model_files import _config
from llmq_jax.models import abstract_variables
from llmq_jax.models.config import GLOBAL, LOCAL
from llmq_jax.models.deepseek3 import DeepSeekV3Config
from llmq_jax.models.gemma import Gemma2Config, Gemma3Config
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.models.llama3 import Llama3Config
from llmq_jax.models.ministral import MinistralConfig
from llmq_jax.models.mistral import MistralConfig
from llmq_jax.models.mixtral import MixtralConfig
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config, Qwen3MoeConfig
from llmq_jax.option_files import read_options
from llmq_jax.training.checkpoints import Checkpoints, config_dict, read_info
from llmq_jax.training.manifest import verify_manifest, write_manifest
from llmq_jax.training.plots import read_run, training_curve
from llmq_jax.training.run_folder import RunFolder
from tests.data.tool_calls import LOOP, TOOLS
from tests.weights import draw_variables

Parts = dict[str, bytes]
DATA = Path(__file__).parent.parent / "interop" / "data"


def write_files(folder: Path, parts: Mapping[str, bytes]) -> None:
    for name, content in parts.items():
        (folder / name).write_bytes(content)


class Reader(NamedTuple):
    parts: Callable[[], Parts]
    """What is damaged: files by their names, or parts of a file."""
    read: Callable[[Path], Any]
    """Reads a folder in which they were written."""
    write: Callable[[Path, Mapping[str, bytes]], None] = write_files
    cost: int = 1
    """How many times as long as others it takes; so many fewer inputs it gets."""


def files_of(save: Callable[[Path], Any]) -> Callable[[], Parts]:
    """The files that are saved into a folder, as parts."""

    def parts() -> Parts:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

    return parts


def read_all(tensors: Mapping[str, Any]) -> None:
    for tensor in tensors.values():
        assert np.asarray(tensor).shape == tensor.shape


# Weights

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}
LLAMA = Llama3Config(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=6,
    max_position_embeddings=16,
)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


def gguf_file(path: Path, template: str = TEMPLATE, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path / "model.gguf", architecture)
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 16),
        (writer.add_embedding_length, 4),
        (writer.add_feed_forward_length, 4),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_tokenizer_model, "llama"),
        (writer.add_token_list, ["<unk>", "</s>", "▁", "a", "b", "▁a", "ab"]),
        (writer.add_token_types, [2, 3, 1, 1, 1, 1, 4]),
        (writer.add_token_scores, [0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]),
        (writer.add_eos_token_id, 1),
        (writer.add_chat_template, template),
    ):
        add(value)
    blocks = {"attn_q": (4, 4), "attn_k": (2, 4), "attn_v": (2, 4), "attn_output": (4, 4)}
    blocks |= {"attn_norm": (4,), "ffn_norm": (4,)}
    if architecture == "qwen3moe":
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(3)
        blocks |= {"ffn_gate_exps": (2, 3, 4), "ffn_up_exps": (2, 3, 4), "ffn_down_exps": (2, 4, 3)}
        blocks |= {"ffn_gate_inp": (2, 4)}
    else:
        blocks |= {"ffn_gate": (4, 4), "ffn_up": (4, 4), "ffn_down": (4, 4)}
    if architecture != "llama":
        blocks |= {"attn_q_norm": (2,), "attn_k_norm": (2,)}
    if architecture == "gemma3":
        writer.add_sliding_window(8)
        writer.add_sliding_window_pattern([True])
        writer.add_final_logit_softcapping(30.0)
        blocks |= {"post_attention_norm": (4,), "post_ffw_norm": (4,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in blocks.items()}
    for name, shape in {"token_embd.weight": (7, 4), "output_norm.weight": (4,), **shapes}.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_file(folder: Path) -> None:
    """Without taking the tensors into a model, which takes longer than all the rest."""
    with mock.patch.object(huggingface, "from_state_dict", lambda state, *_: read_all(state)):
        contents = read_gguf(folder / "model.gguf")
    if contents.tokenizer is not None:
        use_tokenizer(contents.tokenizer)


def checkpoint_files(folder: str) -> Callable[[], Parts]:
    return lambda: {path.name: path.read_bytes() for path in sorted((DATA / folder).iterdir())}


def tensorflow_blocks() -> Parts:
    """The blocks of an index, whose checksums are made afterwards, so that damage gets past them."""
    values = np.arange(6, dtype=np.float32).tobytes()
    mark = _checksum(values)
    dimensions = b"\x12\x02\x08\x02" + b"\x12\x02\x08\x03"
    entry = b"\x08\x01" + b"\x12" + bytes([len(dimensions)]) + dimensions + b"\x28\x18" + b"\x35" + mark
    pairs = [(b"", b"\x08\x01"), (b"w", entry)]
    content = b"".join(b"\0" + bytes([len(key), len(value)]) + key + value for key, value in pairs)
    return {"block": content + bytes(4) + (1).to_bytes(4, "little"), "data": values}


def write_tensorflow(folder: Path, parts: Mapping[str, bytes]) -> None:
    file = b""

    def add(content: bytes) -> bytes:
        nonlocal file
        handle = _varint(len(file)) + _varint(len(content))
        file += content + b"\0" + _checksum(content + b"\0")
        return handle

    end = bytes(4) + (1).to_bytes(4, "little")
    handle = add(parts["block"])
    footer = add(end) + add(b"\0" + bytes([1, len(handle)]) + b"w" + handle + end)
    (folder / "model.ckpt.index").write_bytes(file + footer.ljust(FOOTER - 8, b"\0") + MAGIC)
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(parts["data"])


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _checksum(content: bytes) -> bytes:
    value = google_crc32c.value(content)
    return (((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def safetensors_parts() -> Parts:
    file = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})
    end = 8 + int.from_bytes(file[:8], "little")
    return {"header.json": file[8:end].rstrip(), "data": file[end:]}


def write_safetensors_parts(folder: Path, parts: Mapping[str, bytes]) -> None:
    """A header that says how long it is, whatever it is."""
    header = parts["header.json"]
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + parts["data"])


def shards(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, (tensor, values) in zip(names, TENSORS.items(), strict=True):
        safetensors.numpy.save_file({tensor: values}, folder / name)
    index = {"metadata": {"total_size": 56}, "weight_map": dict(zip(TENSORS, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def torch_file(is_zip: bool) -> Callable[[Path], None]:
    state = {name: torch.from_numpy(values) for name, values in TENSORS.items()}
    return lambda folder: torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=is_zip)


# Models

CONFIGS = {
    "gpt2": GPT2Config(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, labels=("no", "yes")),
    "llama": LLAMA,
    "mistral": MistralConfig(vocab_size=12),
    "ministral": MinistralConfig(vocab_size=12, num_hidden_layers=2, layer_types=[LOCAL, GLOBAL]),
    "qwen2": Qwen2Config(vocab_size=12, sliding_window=8),
    "qwen3": Qwen3Config(vocab_size=12),
    "mixtral": MixtralConfig(vocab_size=12),
    "qwen3_moe": Qwen3MoeConfig(vocab_size=12, sliding_window=8, mlp_only_layers=(3,)),
    "deepseek": DeepSeekV3Config(vocab_size=12),
    "gemma2": Gemma2Config(vocab_size=12),
    "gemma3": Gemma3Config(vocab_size=12),
}


def json_file(name: str, values: Any) -> Callable[[], Parts]:
    return lambda: {name: json.dumps(values, indent=1).encode()}


def model_files(folder: Path) -> None:
    state = to_state_dict(draw_variables(LLAMA), LLAMA)
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config_to_hf(LLAMA), "eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))


def only_json(parts: Callable[[], Parts]) -> tuple[Callable[[], Parts], Callable[[Path, Parts], None]]:
    """The JSON files among the parts, and how to write them beside the others, which stay as they are."""
    every = functools.cache(parts)

    def write(folder: Path, changed: Mapping[str, bytes]) -> None:
        write_files(folder, {**every(), **changed})

    return lambda: {name: content for name, content in every().items() if name.endswith(".json")}, write


# Adapters


def adapter_files(folder: Path) -> None:
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    state = {
        name.format(layer, part): np.ones(shape, np.float32)
        for layer in (0, 1)
        for part, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    safetensors.numpy.save_file(state, folder / "adapter_model.safetensors")
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 8},
        "target_parameters": None,
        "modules_to_save": None,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))


@functools.cache
def llama_adapters() -> tuple:
    """What does not depend on the folder, and takes most of the time."""
    return draw_variables(LLAMA), abstract_variables(LLAMA), sites_of(LLAMA)


def read_peft(folder: Path) -> None:
    variables, abstract, sites = llama_adapters()
    base_of(folder)
    with mock.patch.multiple(peft_reader, abstract_variables=lambda _: abstract, sites_of=lambda _: sites):
        read_adapter(folder, LLAMA, variables)


# Tokenizers


def use_tokenizer(tokenizer: Any) -> None:
    """Chat and text, to tokens and back."""
    messages = [{"role": "user", "content": "ab a"}]
    text = "a b" if tokenizer.chat_template is None else tokenizer.chat_template.render(messages)
    tokenizer.decode(tokenizer.encode(text, allow_special=True, add_special_tokens=True))
    tokenizer.encode_with_offsets(text)
    tokenizer.encode_arrays(["ab\nb"])


def tokenizer_files(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "Ġ": 2, "a": 3, "b": 4, "ab": 5, "Ċ": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "unk_token": "<unk>"})
    )


def read_tokenizer(folder: Path) -> None:
    use_tokenizer(tokenizer_in(folder))


def vocabulary_files(folder: Path) -> None:
    characters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    characters += [chr(256 + place) for place in range(68)]
    ids = {token: number for number, token in enumerate([*characters, "ab", "abc", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": len(ids)}))
    config = {
        "eos_token": "<end>",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {len(ids) + 1: {"content": "<end>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def read_vocabulary(folder: Path) -> None:
    tokenizer = tokenizer_in(folder)
    use_tokenizer(tokenizer)
    tokenizer.files()


# Data

MESSAGES = [{"role": "user", "content": "Hello é"}, {"role": "assistant", "content": "Good day"}]
OTHER = [MESSAGES[0], {"role": "assistant", "content": "What?"}]
ROWS: dict[str, tuple[list[dict], Callable[[Path], Any]]] = {
    "documents": ([{"text": "one"}, {"text": "two é"}], read_documents),
    "labelled": ([{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}], read_labelled),
    "preferences": (
        [
            {"prompt": "1 + 1?", "chosen": "2", "rejected": "3", "margin": "0.5"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ],
        read_preferences,
    ),
    "prompts": (
        [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "3 * 3?", "answer": "9"}],
        lambda path: read_prompts(path, ByteTokenizer(), prompt_format="{prompt}: {answer}"),
    ),
    "conversations": (
        [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "2", "completion": "3"}],
        read_conversations,
    ),
}


@functools.cache
def chat_tokenizer() -> Tokenizer:
    return FileTokenizer.from_files(files_of(tokenizer_files)(), "chat")


def read_chat_prompts(path: Path) -> None:
    read_prompts(path, chat_tokenizer(), longest=100)


NESTED: dict[str, tuple[list[dict], Callable[[Path], Any]]] = {
    "preferences": (
        [{"chosen": MESSAGES, "rejected": OTHER}, {"chosen": OTHER, "rejected": MESSAGES}],
        read_preferences,
    ),
    "prompts": ([{"prompt": MESSAGES[:1], "n": 1}], read_chat_prompts),
    "conversations": ([{"messages": MESSAGES}, {"messages": OTHER}], read_conversations),
    "conversations with tools": ([{"messages": LOOP, "tools": TOOLS}, {"messages": MESSAGES}], read_conversations),
}


def _json(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def _json_lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _table(separator: str, rows: list[dict]) -> bytes:
    names = list(rows[0])
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    return "".join(separator.join(line) + "\n" for line in lines).encode()


def _parquet(rows: list[dict]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[list[dict]], bytes]] = {
    "json": _json,
    "jsonl": _json_lines,
    "csv": functools.partial(_table, ","),
    "tsv": functools.partial(_table, "\t"),
    "parquet": _parquet,
    "jsonl.gz": lambda rows: gzip.compress(_json_lines(rows), mtime=0),
}


def rows_reader(rows: list[dict], read: Callable[[Path], Any], suffix: str) -> Reader:
    return Reader(lambda: {f"data.{suffix}": FORMATS[suffix](rows)}, lambda folder: read(folder / f"data.{suffix}"))


# Runs

RUN = {"options": {"steps": 5, "name": "é"}, "model": {"labels": ["a", "b"]}}


def read_run_folder(folder: Path) -> None:
    with RunFolder(folder, RUN) as run:
        if run.finished:
            run.report()


def run_files() -> Parts:
    config = {"run_format": 1, **RUN}
    return {"config.json": json.dumps(config).encode(), "finished.json": b'{"loss": 1.5, "steps": 5}'}


def checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    write_manifest(folder)


def metrics() -> Parts:
    rows = [{"step": step, "tokens": 10 * step, "loss": 2.0 / step, "learning_rate": 1e-3} for step in (1, 2, 3)]
    return {"metrics.jsonl": _json_lines([*rows, {"step": 3, "validation_loss": 1.0}])}


def read_checkpoint_info(folder: Path) -> None:
    read_info(folder)
    Checkpoints(folder.parent).judged_by()


MODEL, WRITE_MODEL = only_json(files_of(model_files))
ADAPTER, WRITE_ADAPTER = only_json(files_of(adapter_files))


def token_files(folder: Path) -> None:
    pieces = [np.arange(9, dtype=np.uint16)], [np.arange(3, dtype=np.uint16)]
    write_tokens(folder / "tokens", ByteTokenizer(), *pieces, separated=True, sample="A text.", about={"data": "x"})
    for path in (folder / "tokens").iterdir():
        path.rename(folder / path.name)


def read_token_files(folder: Path) -> None:
    files = read_tokens(folder)
    files.check_tokenizer(ByteTokenizer())
    assert files.training.sum() + (0 if files.validation is None else files.validation.sum()) + files.largest_id >= 0


MODEL_ARGS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 12, "dropout": 0.1, "bias": True}
INFO = {"step": 5, "tokens": 50, "judged_by": "reward", "best": "highest", "value": 0.9, "version": 2}
OLD_INFO = {"step": 5, "tokens": 50, "validation_loss": 1.5, "version": 1}
OPTIONS = {"heat": float, "betas": tuple[float, float], "cream": bool, "spices": tuple[str, ...]}
READERS: dict[str, Reader] = {
    "gguf": Reader(files_of(gguf_file), read_gguf_file),
    **{
        f"gguf of {architecture} to model": Reader(
            files_of(functools.partial(gguf_file, architecture=architecture)),
            lambda folder: read_gguf(folder / "model.gguf"),
            cost=10,
        )
        for architecture in ("llama", "qwen3moe", "gemma3")
    },
    "tensorflow": Reader(checkpoint_files("types"), lambda folder: read_all(open_tensorflow(checkpoint_index(folder)))),
    "tensorflow index with right checksums": Reader(
        tensorflow_blocks, lambda folder: read_all(open_tensorflow(folder / "model.ckpt.index")), write_tensorflow
    ),
    "hparams.json": Reader(
        json_file("hparams.json", {"n_vocab": 12, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}),
        lambda folder: config_from_hparams(folder / "hparams.json"),
    ),
    "model_args of nanoGPT": Reader(
        json_file("model_args.json", MODEL_ARGS),
        lambda folder: config_from_model_args(read_json(folder / "model_args.json")),
    ),
    "safetensors": Reader(
        lambda: {"model.safetensors": safetensors.numpy.save(TENSORS)},
        lambda folder: read_all(open_safetensors(folder)),
    ),
    "safetensors header": Reader(
        safetensors_parts, lambda folder: read_all(open_safetensors(folder)), write_safetensors_parts
    ),
    "safetensors index": Reader(files_of(shards), lambda folder: read_all(open_safetensors(folder))),
    "torch": Reader(files_of(torch_file(is_zip=True)), lambda folder: read_all(open_torch(folder / "model.pth"))),
    "torch before 1.6": Reader(
        files_of(torch_file(is_zip=False)), lambda folder: read_all(open_torch(folder / "model.pth"))
    ),
    **{
        f"config.json of {name}": Reader(
            json_file("config.json", config_to_hf(config)),
            lambda folder: config_from_hf(read_json(folder / "config.json")),
        )
        for name, config in CONFIGS.items()
    },
    "model folder": Reader(MODEL, read_hf, WRITE_MODEL, cost=10),
    "adapter": Reader(files_of(adapter_files), read_peft),
    "adapter_config.json": Reader(ADAPTER, read_peft, WRITE_ADAPTER),
    "tokenizer.json": Reader(files_of(tokenizer_files), read_tokenizer),
    "tokens": Reader(files_of(token_files), read_token_files),
    "tokens of nanoGPT": Reader(
        lambda: {"train.bin": np.arange(60, 90, dtype="<u2").tobytes(), "val.bin": b"a\0b\0"},
        lambda folder: read_nanogpt_tokens(folder).text_of_beginning(ByteTokenizer()),
    ),
    "vocab.json and merges.txt": Reader(files_of(vocabulary_files), read_vocabulary),
    **{f"{name}.{suffix}": rows_reader(*ROWS[name], suffix) for name in ROWS for suffix in FORMATS},
    **{
        f"{name} of messages.{suffix}": rows_reader(*NESTED[name], suffix)
        for name in NESTED
        for suffix in ("json", "jsonl", "parquet")
    },
    "options": Reader(
        lambda: {"options.yaml": b"heat: 1e2\nbetas: [0.5, 9e-1]\ncream: no\nspices: [\"salt=1\", 'pepper']\n"},
        lambda folder: read_options(str(folder / "options.yaml"), OPTIONS, ()),
    ),
    "lines of a command that was stopped": Reader(
        lambda: {"out.jsonl.partial": b'{"lines of": {"seed": 1}}\n{"prompt": "a", "tokens": 2}\n'},
        lambda folder: KeptLines(folder / "out.jsonl", {"seed": 1}, [{"prompt": "a"}, {"prompt": "b"}]),
    ),
    "run folder": Reader(run_files, read_run_folder),
    "metrics.jsonl": Reader(metrics, lambda folder: training_curve(read_run(folder))),
    "manifest.json": Reader(files_of(checkpoint), verify_manifest),
    "checkpoint.json": Reader(json_file("checkpoint.json", INFO), read_checkpoint_info),
    "checkpoint.json of format 1": Reader(json_file("checkpoint.json", OLD_INFO), read_checkpoint_info),
    "config of a checkpoint": Reader(
        json_file("config.json", config_dict(LLAMA)), lambda folder: _config(folder, read_json(folder / "config.json"))
    ),
}
