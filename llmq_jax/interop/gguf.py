"""Models in GGUF files: config, weights, tokenizer and chat template, all of them in one file's metadata and tensors.

Source: ggml-org/llama.cpp (`convert_hf_to_gguf.py` writes such files, `src/models/` reads them). Architectures: llama,
as llama.cpp calls Llama 1 to 3, Mistral, SmolLM2 and all others that compute the same, Mixtral among them; qwen2 (Qwen
2 and 2.5); qwen3 and qwen3moe; gemma2; gemma3 (the text model: vision is in a file of its own).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmq_jax.data.gguf_tokenizer import CHAT_TEMPLATE, CONTROL, gguf_tokenizer
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput, at_place, warn
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.gguf_files import GGUF, open_gguf
from llmq_jax.interop.huggingface import Contents, is_hf, read_state
from llmq_jax.interop.tensor_files import TensorFiles
from llmq_jax.layers.positions import Llama3Rope, Rope, inverse_frequencies
from llmq_jax.models.config import GLOBAL, LOCAL
from llmq_jax.models.gemma import Gemma2Config, Gemma3Config
from llmq_jax.models.llama3 import Llama3Config
from llmq_jax.models.mixtral import MixtralConfig
from llmq_jax.models.qwen import Qwen2Config, Qwen3Config, Qwen3MoeConfig

LAYOUT = "gguf"


class Kinds(NamedTuple):
    """The configs of an architecture's models, None where it has none of the kind."""

    dense: type[Llama3Config] | type[Gemma2Config] | None
    of_experts: type[MixtralConfig] | None = None


ARCHITECTURES = {
    "llama": Kinds(Llama3Config, MixtralConfig),
    "qwen2": Kinds(Qwen2Config),
    "qwen3": Kinds(Qwen3Config),
    "qwen3moe": Kinds(None, Qwen3MoeConfig),
    "gemma2": Kinds(Gemma2Config),
    "gemma3": Kinds(Gemma3Config),
}
"""By `general.architecture`."""
EMBEDDING, QUERY, HEAD, ROPE_DIVISORS = "token_embd.weight", "blk.0.attn_q.weight", "output.weight", "rope_freqs.weight"

FIXED = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
"""{metadata key that changes what is computed, without its prefix: the only value that we compute}."""
HARMLESS = ("expert_used_count", "rope.scaling.finetuned", "tensor_data_layout")
SCALED_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}
"""{architecture: layers of its model of 27 billion parameters}: the one that divides attention's scores by the square
root of hidden_size / heads, not of a head's width. No metadata tell this, and llama.cpp goes by the layers, too."""

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""The name of a file that holds a part of a model."""

LLAMA3_LENGTHS: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The parameters that Llama 3.1, 3.2 and 3.3 share; their factors differ."""

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>")
"""Tokens with which chat models end a turn, for files that do not name theirs."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a `.gguf` file, or a folder with one and without weights in Hugging Face's formats."""
    if path.is_file():
        return path.suffix == ".gguf"
    return not is_hf(path) and any(path.glob("*.gguf"))


def read_gguf(path: Path, config: Any = None, dtype: Any = None) -> Contents:
    """Read a GGUF file or the parts of one, or the only model in a folder; a given `config` takes the place of the
    file's, or changes it."""
    file, *others = _files_of(path)
    gguf = _with_parts(file, others)
    with at_place(file):
        _check_architecture(gguf.metadata)
        config, variables = read_state(gguf.tensors, LAYOUT, config, dtype, _Metadata(gguf).config)
        tokenizer = gguf_tokenizer(gguf.metadata, file.stem)
        generation = GenerationConfig() if tokenizer is None else generation_config(gguf.metadata)
    return Contents(config, variables, tokenizer, generation)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a GGUF file, whatever its model's architecture; None where it has none."""
    file = _files_of(path)[0]
    gguf = open_gguf(file)
    with at_place(file):
        return gguf_tokenizer(gguf.metadata, file.stem)


def _files_of(path: Path) -> list[Path]:
    """The file, or the only one in a folder; of a model in parts, named as llama.cpp names them, all of them."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    parts = [PART.fullmatch(file.name) for file in found]
    models = {(part[1], part[3]) if part else file.name for file, part in zip(found, parts, strict=True)}
    if len(models) != 1:
        raise BadInput(f"{path}: holds {len(found)} GGUF files ({', '.join(file.name for file in found)}); name one")
    if parts[0] is None:
        return found
    name, count = parts[0][1], parts[0][3]
    folder, wanted = found[0].parent, (f"{name}-{number:05}-of-{count}.gguf" for number in range(1, int(count) + 1))
    there = {file.name for file in folder.glob("*.gguf")}
    whole = [file for file in wanted if file in there]
    if missing := int(count) - len(whole):
        raise BadInput(f"{folder}: {missing} of the {int(count)} parts of {name} are not there")
    if found[0].name not in whole:
        raise BadInput(f"{found[0]}: is named as a part beyond the {int(count)} that there are")
    return [folder / file for file in whole]


def _with_parts(file: Path, others: Sequence[Path]) -> GGUF:
    """A model's metadata, which stand in its first file, and its tensors."""
    opened = {each: open_gguf(each) for each in (file, *others)}
    for number, (each, part) in enumerate(opened.items()):
        told, count = (part.metadata.get(f"split.{name}", default) for name, default in (("no", 0), ("count", 1)))
        if (told, count) != (number, len(opened)):
            raise BadInput(
                f"{each}: is part {told!r:.20} of {count!r:.20} of a model, counted from 0, and not {number} of "
                f"{len(opened)}; parts are found by their names, such as model-00001-of-00003.gguf"
            )
    return GGUF(opened[file].metadata, TensorFiles({each: part.tensors for each, part in opened.items()}))


def _check_architecture(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise BadInput(f"holds a model of the architecture {architecture!r:.60}; supported are {supported}")


class _Metadata:
    """The architecture's metadata (`llama.*`); it remembers which keys were read."""

    def __init__(self, gguf: GGUF):
        self._tensors = gguf.tensors
        self._architecture: str = gguf.metadata["general.architecture"]
        prefix = f"{self._architecture}."
        self._values = {
            key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)
        }
        self._read = {*FIXED, *HARMLESS}

    def config(self) -> Llama3Config | Gemma2Config:
        self._check_fixed()
        experts, (dense, of_experts) = self._integer("expert_count", 0), ARCHITECTURES[self._architecture]
        kind = of_experts if experts else dense
        if kind is None:
            raise BadInput(f"{self._architecture}.expert_count={experts} is not supported for this architecture")
        vocab_size, layers = self._integer("vocab_size", self._rows(EMBEDDING)), self._integer("block_count")
        heads, width = self._integer("attention.head_count"), self._integer("embedding_length")
        head_dim = self._head_dim(width // max(heads, 1))
        counted = len({name.split(".")[1] for name in self._tensors if name.startswith("blk.")})
        # The weight table is built from these numbers before shapes are compared: a damaged number would ask for any
        # amount of memory.
        for key, value, found, what in (
            ("vocab_size", vocab_size, self._rows(EMBEDDING), f"rows of {EMBEDDING}"),
            ("block_count", layers, counted, "layers with tensors"),
            (f"attention.head_count * {head_dim}", heads * head_dim, self._rows(QUERY), f"rows of {QUERY}"),
        ):
            if value != found:
                raise BadInput(f"{self._architecture}.{key} is {value}, but the file has {found} {what}")
        context = self._integer("context_length")
        fields: dict[str, Any] = {
            "vocab_size": vocab_size,
            "max_position_embeddings": context,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._integer("feed_forward_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(context, head_dim),
            "tie_word_embeddings": HEAD not in self._tensors,
        }
        fields |= self._gemma_fields(fields) if issubclass(kind, Gemma2Config) else self._biases()
        if experts:
            fields |= self._expert_fields(experts, fields["intermediate_size"])
        config = kind(**fields)
        unknown = sorted(set(self._values) - self._read)
        if unknown:
            warn(f"unknown metadata is ignored: {', '.join(unknown)}")
        return config

    def _biases(self) -> dict[str, Any]:
        attention_bias, output_bias = (f"blk.0.attn_{part}.bias" in self._tensors for part in ("q", "output"))
        return {
            "attention_bias": attention_bias,
            "attention_output_bias": None if output_bias == attention_bias else output_bias,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
        }

    def _expert_fields(self, experts: int, width: int) -> dict[str, Any]:
        """llama.cpp renormalises the weights of the chosen experts in all of these models."""
        chosen = self._integer("expert_used_count")
        fields: dict[str, Any] = {"num_local_experts": experts, "num_experts_per_tok": chosen}
        if self._architecture == "llama":
            return fields
        own_width = self._integer("expert_feed_forward_length", width // max(chosen, 1))
        return fields | {"moe_intermediate_size": own_width, "norm_topk_prob": True}

    def _gemma_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What Gemma's models have besides; what a file leaves out is as in llama.cpp."""
        own: dict[str, Any] = {}
        if self._architecture == "gemma2":
            every, window = 2, 4096
            own["attn_logit_softcapping"] = self._number("attn_logit_softcapping", 50.0)
            own["final_logit_softcapping"] = self._number("final_logit_softcapping", 30.0)
        else:
            every, window = 6, 0
            own["final_logit_softcapping"] = self._number("final_logit_softcapping", 0.0) or None
            own["local_rope_parameters"] = {"rope_theta": self._number("rope.freq_base_swa", 10_000.0)}
        if fields["rope_parameters"]["rope_type"] not in ("default", "linear"):
            raise BadInput(f"{self._architecture} with RoPE that is scaled otherwise than linearly is not supported")
        layers = fields["num_hidden_layers"]
        window = self._integer("attention.sliding_window", window)
        own["layer_types"] = self._layer_types(every, layers) if window else [GLOBAL] * layers
        if window:
            own["sliding_window"] = min(window, fields["max_position_embeddings"])
        by_hidden_size = layers == SCALED_BY_HIDDEN_SIZE[self._architecture]
        heads = max(fields["num_attention_heads"], 1)  # the config refuses 0
        width = fields["hidden_size"] // heads if by_hidden_size else fields["head_dim"]
        return own | {"query_pre_attn_scalar": width}

    def _layer_types(self, every: int, layers: int) -> list[str]:
        """Of each layer, by default every `every`th of them global. A file may have another distance, or a flag for
        each layer that is true if it is local."""
        key = "attention.sliding_window_pattern"
        pattern = self._get(key, every)
        if isinstance(pattern, list) and len(pattern) >= layers and all(type(flag) is bool for flag in pattern):
            return [LOCAL if flag else GLOBAL for flag in pattern[:layers]]
        every = self._integer(key, every)
        if every < 0:
            raise BadInput(f"{self._architecture}.{key}={every} is negative")
        return [LOCAL if every == 0 or layer % every < every - 1 else GLOBAL for layer in range(layers)]

    def _check_fixed(self) -> None:
        for key, supported in FIXED.items():
            value = self._values.get(key, supported)
            if value != supported:
                raise BadInput(f"{self._architecture}.{key}={value!r:.60} is not supported, only {supported!r}")

    def _rows(self, name: str) -> int:
        if name not in self._tensors or not self._tensors[name].shape:
            raise BadInput(f"has no matrix {name}, so it is not a language model that is supported")
        return self._tensors[name].shape[0]

    def _head_dim(self, default: int) -> int:
        turned = self._integer("rope.dimension_count", self._integer("attention.key_length", default))
        width = self._integer("attention.key_length", turned)
        values = self._integer("attention.value_length", width)
        if not turned == width == values:
            raise BadInput(
                f"its keys have {width} features a head, of which RoPE turns {turned}, and its values {values}; "
                "supported are models where the three are equal"
            )
        return width

    def _rope(self, context: int, head_dim: int) -> dict[str, Any]:
        theta = self._number("rope.freq_base", 10_000.0)
        # llama.cpp's defaults are linear scaling and a factor of 1.
        scaling = self._get("rope.scaling.type", "linear")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        trained = self._integer("rope.scaling.original_context_length", context)
        betas = {
            name: self._number(f"rope.scaling.yarn_{name}", default)
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
        }
        if scaling not in ("none", "linear", "yarn"):
            raise BadInput(
                f"{self._architecture}.rope.scaling.type={scaling!r} is not supported, only none, linear and yarn"
            )
        scaled = scaling != "none" and factor not in (0.0, 1.0)
        if ROPE_DIVISORS in self._tensors:
            if scaled:
                raise BadInput(f"has both {ROPE_DIVISORS} and {scaling} scaling of RoPE, which is not supported")
            # A scaling written out as a divisor for each frequency: Llama 3.1's, which other programs know by its own
            # name alone, or any other.
            divisors = np.asarray(self._tensors[ROPE_DIVISORS], np.float32).ravel().tolist()
            if not all(divisor > 0 for divisor in divisors):
                raise BadInput(f"{ROPE_DIVISORS} divides by a number that is not positive")
            llama3 = Llama3Rope(rope_theta=theta, factor=max(1.0, *divisors), **LLAMA3_LENGTHS)
            if _are_divisors(divisors, llama3, head_dim):
                return llama3.to_dict()
            lists = {"short_factor": divisors, "long_factor": divisors}
            return {"rope_type": "longrope", "rope_theta": theta, "factor": 1.0, "attention_factor": 1.0, **lists}
        if not scaled:
            return {"rope_type": "default", "rope_theta": theta}
        if scaling == "linear":
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        trained_length = {"original_max_position_embeddings": trained}
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **trained_length, **betas}

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise BadInput(f"the metadata lacks {self._architecture}.{key}")
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int:
            raise BadInput(f"{self._architecture}.{key}={value!r:.60} is not an integer")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise BadInput(f"{self._architecture}.{key}={value!r:.60} is not a number")
        return float(value)


def _are_divisors(divisors: list[float], rope: Rope, width: int) -> bool:
    """Whether heads of that width turn as these divisors say; the file has them rounded."""
    frequencies = inverse_frequencies(rope.rope_theta, width) / rope.frequencies(width, jnp.zeros(0))
    return len(frequencies) == len(divisors) and np.allclose(frequencies, divisors, rtol=1e-5, atol=0)


def generation_config(metadata: Mapping[str, Any]) -> GenerationConfig:
    """The tokens that begin, pad and end a text.

    A chat model ends a turn with a token of its own, which need not be the one that ends a document. Some files do not
    name it, so any of END_OF_TURN that the chat template writes ends a text too.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    template = metadata.get(CHAT_TEMPLATE, "")
    named = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "eos", "eot", "eom")}
    for name, number in named.items():
        if number is not None and type(number) is not int:
            raise BadInput(f"tokenizer.ggml.{name}_token_id={number!r:.60} is not an integer")
    ends = [named[name] for name in ("eos", "eot", "eom") if named[name] is not None]
    written = [text for text in END_OF_TURN if text in template]
    if written:
        ends += [number for number, kind in enumerate(kinds) if kind == CONTROL and tokens[number] in written]
    ids = {"eos_token_id": list(dict.fromkeys(ends)), "bos_token_id": named["bos"], "pad_token_id": named["padding"]}
    generation = GenerationConfig.from_hf(ids)
    if any(number >= len(tokens) for number in generation.eos_token_id):
        raise BadInput(f"the end tokens {ids['eos_token_id']} are not all in the vocabulary of {len(tokens)} tokens")
    return generation
