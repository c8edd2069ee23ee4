"""GGUF files: every type of tensor, whole models against transformers, files that are broken, and a real one."""

import math
import random
import re

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from llmq_jax.data.gguf_tokenizer import CHAT_TEMPLATE
from llmq_jax.errors import BadInput
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.gguf import END_OF_TURN, generation_config
from llmq_jax.interop.gguf_files import AT_ONCE, open_gguf
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.model_files import has_config, load
from llmq_jax.models.llama3 import Llama3Config
from llmq_jax.objectives.grpo import can_share_prompts
from tests.smollm2 import smollm2_gguf

LOGITS = 1e-4
VOCABULARY = 300


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(action, path, **arguments) -> str:
    with pytest.raises(BadInput) as caught:
        action(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Types and, where the package can quantise, how far their numbers may be from those that were stored.
ERRORS = {"Q8_0": 0.02, "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.4, "Q4_1": 0.4, "TQ1_0": 3.0, "TQ2_0": 3.0, "MXFP4": 1.0}
BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
BLOCKS += ["IQ4_NL", "IQ4_XS", "NVFP4"]


def stored_blocks(name: str, numbers: np.ndarray, rng) -> np.ndarray:
    """Bytes of a quantised tensor: of these numbers where the package can quantise, else any."""
    kind = GGMLQuantizationType[name]
    if name in ERRORS:
        return quantize(numbers, kind)
    block, size = GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (len(numbers), numbers.shape[1] // block * size), np.uint8)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # blocks of any bytes have any scales
def test_tensors_of_all_types(tmp_path):
    """Numbers as the package `gguf` works them out, in PyTorch's shapes; types that are not quantised are kept."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((3, 5)).astype(np.float32)
    plain = {"F32": numbers, "F16": numbers.astype(np.float16), "BF16": numbers.astype(ml_dtypes.bfloat16)}
    path = tmp_path / "types.gguf"
    writer = GGUFWriter(path, "llama")
    for name, array in plain.items():
        raw = array.view(np.uint8) if name == "BF16" else array
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[name])
    wide = rng.standard_normal((4, 512)).astype(np.float32)
    blocks = {name: stored_blocks(name, wide, rng) for name in (*ERRORS, *BLOCKS)}
    for name, raw in blocks.items():
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[name])
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    write(writer)

    tensors = open_gguf(path).tensors
    assert set(tensors) == {*plain, *blocks, "vector"}
    for name, array in plain.items():
        assert (tensors[name].shape, tensors[name].dtype) == ((3, 5), array.dtype)
        np.testing.assert_array_equal(np.asarray(tensors[name]), array)
    for name, raw in blocks.items():
        expected = dequantize(raw, GGMLQuantizationType[name])
        assert np.unique(expected).size > 2
        assert (tensors[name].shape, tensors[name].dtype) == ((4, 512), np.float32)
        np.testing.assert_array_equal(np.asarray(tensors[name]), expected)
        if name in ERRORS:
            np.testing.assert_allclose(np.asarray(tensors[name]), wide, atol=ERRORS[name])
    np.testing.assert_array_equal(np.asarray(tensors["vector"]), np.arange(7))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_tensors_of_more_numbers_than_are_worked_out_at_a_time(tmp_path):
    """Three axes, and the last part is shorter than the others."""
    rng = np.random.default_rng(0)
    raw = stored_blocks("Q5_K", np.empty((3 * 130, 1024)), rng).reshape(3, 130, -1)
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("large", raw, raw_dtype=GGMLQuantizationType.Q5_K)
    write(writer)
    found = open_gguf(path).tensors["large"]
    assert found.shape == (3, 130, 1024)
    assert 3 * 130 * 1024 % AT_ONCE > 0 < 3 * 130 * 1024 // AT_ONCE
    np.testing.assert_array_equal(np.asarray(found), dequantize(raw, GGMLQuantizationType.Q5_K))


def test_metadata_are_plain_values(tmp_path):
    path = tmp_path / "metadata.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_float32("epsilon", 1e-5)
    writer.add_float64("wide", 0.1)
    writer.add_bool("yes", True)
    writer.add_int8("negative", -3)
    writer.add_uint64("large", 2**63)
    writer.add_string("text", "naïve 你好")
    writer.add_array("texts", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.5, -1.0])
    write(writer)
    metadata = open_gguf(path).metadata
    assert metadata == {
        "general.architecture": "llama",
        "epsilon": 1e-5,
        "wide": 0.1,
        "yes": True,
        "negative": -3,
        "large": 2**63,
        "text": "naïve 你好",
        "texts": ["a", "", "ü"],
        "numbers": [1, -2, 3],
        "fractions": [0.5, -1.0],
    }
    assert type(metadata["yes"]) is bool


@pytest.mark.parametrize("name", ["Q8_K", "Q1_0", "I32", "F64"])
def test_unsupported_types_are_named_before_anything_is_read(tmp_path, name):
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("fine", np.zeros(32, np.float32))
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    writer.add_tensor("odd.weight", np.zeros((2, size * 256 // block), np.uint8), raw_dtype=kind)
    write(writer)
    message = refused(open_gguf, path)
    assert f"odd.weight has the type {name}; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2" in message
    assert {*message.split("supported are ")[1].split(", ")} >= {"F32", "F16", "BF16", *ERRORS, *BLOCKS}


# Whole models.

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in NAMES.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of query and key rows in llama.cpp: within a head, features of the two halves in turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict, width: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for the scaling of Llama 3.1."""
    divisors = []
    for i in range(0, width, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (i / width))
        if turns > rope["high_freq_factor"]:
            divisors.append(1.0)
        elif turns < rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def write_llama(path, model, change=None, kind="F32") -> None:
    """A model of transformers as llama.cpp's converter writes it, with a vocabulary of bytes."""
    config, rope = model.config, model.config.rope_parameters
    is_llama = config.model_type == "llama"
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if is_llama:
        writer.add_rope_dimension_count(width)
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, width))
    if change is not None:
        change(writer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if is_llama else {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        for part, count in heads.items():
            if f".{part}." in name:
                array = permuted(array, count)
        raw_kind = GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(array), raw_kind), raw_dtype=raw_kind)
    write(writer)


BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))


def make_model(model_type="llama", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **BASE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases begin as zeros, norms as ones
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_models_against_transformers(tmp_path, name):
    model = make_model(**MODELS[name])
    path = tmp_path / "model.gguf"
    write_llama(path, model)
    lm = load(path)
    expected = their_logits(model)
    np.testing.assert_allclose(lm.logits(TOKENS), expected, atol=LOGITS)
    config, theirs = lm.config, model.config
    for field in ("vocab_size", "num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias"):
        assert getattr(config, field) == getattr(theirs, field), field
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert can_share_prompts(lm.model)  # the divisors are the same at any length
    if name == "llama3":  # the divisors are a scaling that transformers has as well, under another name
        exported = transformers.AutoModelForCausalLM.from_pretrained(save_hf(lm, tmp_path / "hf")).eval()
        np.testing.assert_allclose(their_logits(exported), expected, atol=LOGITS)


QWEN = {
    "qwen 2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": MODELS["plain"]["rope_parameters"]}),
    "qwen 2, yarn": ("qwen2", MODELS["yarn"]),
    "qwen 3": ("qwen3", {"head_dim": 128, "rope_parameters": MODELS["plain"]["rope_parameters"]}),
    "qwen 3, narrow heads": ("qwen3", {"head_dim": 10}),
}
NOT_READ_BY_TRANSFORMERS = ("qwen 2, yarn", "qwen 3, narrow heads")  # it takes heads of Qwen 3 to be 128 wide


@pytest.mark.parametrize("name", QWEN)
def test_qwen_against_transformers(tmp_path, name):
    """The model that was written, and what transformers' own reader makes of the file."""
    model_type, changes = QWEN[name]
    model = make_model(model_type, **changes)
    path = tmp_path / "model.gguf"
    write_llama(path, model)
    lm = load(path)
    assert lm.config.model_type == model_type
    np.testing.assert_allclose(lm.logits(TOKENS), their_logits(model), atol=LOGITS)
    if name not in NOT_READ_BY_TRANSFORMERS:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
        np.testing.assert_allclose(lm.logits(TOKENS), their_logits(theirs), atol=LOGITS)
    exported = transformers.AutoModelForCausalLM.from_pretrained(save_hf(lm, tmp_path / "hf")).eval()
    np.testing.assert_allclose(their_logits(exported), their_logits(model), atol=LOGITS)


def as_stored(model, kind: str):
    """The model with the weights that a file of that type stands for."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = quantize(parameter.numpy(), GGMLQuantizationType[kind])
                parameter.copy_(torch.tensor(dequantize(stored, GGMLQuantizationType[kind])))
    return model


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1"])
def test_quantised_models(tmp_path, kind):
    """The logits are those of transformers with the weights that the blocks stand for."""
    model = make_model(intermediate_size=64, tie_word_embeddings=True)
    path = tmp_path / "model.gguf"
    write_llama(path, model, kind=kind)
    np.testing.assert_allclose(load(path).logits(TOKENS), their_logits(as_stored(model, kind)), atol=LOGITS)
    half = load(path, dtype="bfloat16")
    assert half.params["token_embedding"]["embedding"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("kind", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_half_precision_is_kept(tmp_path, kind, dtype):
    """In memory, and norms are in float32, as in the file. What is computed is as exact as it is in transformers."""
    path = tmp_path / "model.gguf"
    model = make_model(attention_bias=True)
    write_llama(path, model, kind=kind)
    lm = load(path)
    assert lm.params["token_embedding"]["embedding"].dtype == dtype
    assert lm.params["final_norm"]["scale"].dtype == np.float32
    exact = their_logits(as_stored(model, kind))
    np.testing.assert_allclose(load(path, dtype="float32").logits(TOKENS), exact, atol=LOGITS)
    half = their_logits(model.to(torch.float16 if kind == "F16" else torch.bfloat16))
    assert 0 < np.abs(lm.logits(TOKENS) - exact).max() < 2 * np.abs(half - exact).max() < 0.2 * exact.std()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_llama(path, make_model(), add_vocabulary)
    return path


TOKEN_TEXTS = [*(chr(0x100 + i) for i in range(VOCABULARY - 4)), "<|end|>", "<s>", "</s>", "<|eot_id|>"]


def add_vocabulary(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKEN_TEXTS)
    writer.add_token_types([1] * (VOCABULARY - 4) + [3] * 4)
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_bos_token_id(VOCABULARY - 3)
    writer.add_eos_token_id(VOCABULARY - 2)
    writer.add_chat_template("{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}")


def test_a_folder_with_one_file_stands_for_it(tiny):
    whole = load(tiny.parent)
    assert whole.config == load(tiny, layout="gguf").config
    assert whole.tokenizer.name == "tiny"
    assert has_config(tiny)
    assert has_config(tiny.parent)


def test_several_files_in_a_folder(tiny, tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(tiny.read_bytes())
    assert "holds 2 GGUF files (a.gguf, b.gguf); name one" in refused(load, tmp_path)


def test_a_layout_would_have_no_effect(tiny):
    assert "is a GGUF file; layout='original' would have no effect" in refused(load, tiny, layout="original")


def test_a_given_config(tiny):
    config = load(tiny).config
    assert load(tiny, config=config).config == config
    assert load(tiny, config={"rms_norm_eps": 1e-6}).config.rms_norm_eps == 1e-6
    assert "the weights do not fit" in refused(load, tiny, config={"intermediate_size": 47})


def test_end_of_turn_ends_a_text_too(tiny):
    """The template writes <|eot_id|>, which the file does not name; <|end|> is there and not written."""
    assert "<|end|>" in END_OF_TURN
    expected = GenerationConfig(eos_token_id=(VOCABULARY - 2, VOCABULARY - 1), bos_token_id=VOCABULARY - 3)
    assert load(tiny).generation == expected
    text = {"tokens": ["<|eot_id|>"], "token_type": [1]}  # as that of a control token, which this one is not
    metadata = {f"tokenizer.ggml.{name}": value for name, value in text.items()}
    assert generation_config(metadata | {CHAT_TEMPLATE: "<|eot_id|>"}).eos_token_id == ()


def test_end_tokens_by_name(tmp_path):
    def change(writer):
        add_vocabulary(writer)
        writer.add_eot_token_id(VOCABULARY - 4)
        writer.add_pad_token_id(5)

    path = tmp_path / "model.gguf"
    write_llama(path, make_model(), change)
    generation = load(path).generation
    assert generation.eos_token_id == (VOCABULARY - 2, VOCABULARY - 4, VOCABULARY - 1)
    assert generation.pad_token_id == 5


@pytest.mark.parametrize(
    ("written", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # as older files name the factor
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 0.0}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_what_a_file_leaves_out_is_as_in_llama_cpp(tmp_path, written, rope):
    def change(writer):
        for key in ("rope.freq_base", "attention.head_count_kv"):
            del writer.kv_data[0][f"llama.{key}"]
        for key, value in written.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{key}", value)

    path = tmp_path / "model.gguf"
    write_llama(path, make_model(num_key_value_heads=4), change)
    config = load(path).config
    assert config.key_value_heads == 4
    assert config.rope_parameters.to_dict().items() >= (rope | {"rope_theta": 10_000.0}).items()


# Files that are not what they should be.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count=8 is not supported, only 0"),
        (lambda w: w.add_value_length(4), "and its values 4; supported are models where the three are equal"),
        (lambda w: w.add_key_length(16), "its keys have 16 features a head, of which RoPE turns 8"),
        (
            lambda w: w.add_string("llama.rope.scaling.type", "longrope"),
            "'longrope' is not supported, only none, linear",
        ),
        (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 2.0), "attn_factor=2.0 is not supported, only 1.0"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts of a model; join them"),
        (
            lambda w: w.add_tensor("blk.2.attn_norm.weight", np.ones(32, np.float32)),
            "block_count is 2, but the file has 3 layers",
        ),
        (lambda w: w.add_tensor("blk.0.extra", np.ones(3, np.float32)), "1 unread (blk.0.extra)"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)), "has 3 factors; heads of 8"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(4, np.float32)), "a number that is not positive"),
    ],
)
def test_models_that_are_not_supported(tmp_path, change, reason):
    path = tmp_path / "model.gguf"
    write_llama(path, make_model(), change)
    assert reason in refused(load, path)


def test_unknown_metadata_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path, make_model(), lambda writer: writer.add_uint32("llama.something.new", 1))
    with pytest.warns(UserWarning, match=r"unknown metadata is ignored: something\.new"):
        load(path)


@pytest.mark.parametrize("key", ["vocab_size", "block_count", "attention.head_count", "rope.dimension_count"])
def test_numbers_that_the_tensors_do_not_confirm(tiny, tmp_path, key):
    content = bytearray(tiny.read_bytes())
    start = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    content[start : start + 4] = (2**31).to_bytes(4, "little")
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    assert re.search(r"llama\.\S+.* is \d{10,}, but the file has \d+ ", refused(load, path))


def test_other_architectures(tmp_path):
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    write(writer)
    message = refused(load, path)
    assert "holds a model of the architecture 'qwen3moe'; supported are llama, qwen2, qwen3" in message


def test_missing_metadata(tmp_path):
    path = tmp_path / "bare.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    write(writer)
    assert "the metadata lacks llama.block_count" in refused(load, path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a GGUF file, or truncated or damaged"),
        (b"GGUF", "the header goes on to byte 8 of 4"),
        (b"PK\x03\x04" + bytes(100), "it does not begin with GGUF"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(50), "is GGUF of version 1, which is not supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(50), "is written for big-endian machines"),
    ],
)
def test_files_of_another_kind(tmp_path, content, reason):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    assert reason in refused(load, path)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


LENGTH = (2**60).to_bytes(8, "little")
UINT8, STRING, ARRAY = 0, 8, 9


@pytest.mark.parametrize(
    "pairs",
    [
        pair(b"key", STRING, LENGTH),
        pair(b"key", ARRAY, UINT8.to_bytes(4, "little") + LENGTH),
        pair(b"key", ARRAY, STRING.to_bytes(4, "little") + LENGTH),
        pair(b"key", ARRAY, ARRAY.to_bytes(4, "little") + LENGTH) + bytes(12) * 100,
        pair(b"key", 99, bytes(8)),
        LENGTH,
        pair(b"key", UINT8, b"1") * 2,
        pair(b"\xff\xfe", UINT8, b"1"),
    ],
    ids=["string", "array", "strings", "nested", "type", "key", "double", "encoding"],
)
def test_lengths_are_held_against_the_size_of_the_file(tmp_path, pairs):
    path = tmp_path / "file.gguf"
    counts = bytes(8) + LENGTH
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + pairs)
    assert "not a GGUF file, or truncated or damaged" in refused(load, path)


def test_truncated_files(tiny, tmp_path):
    content = tiny.read_bytes()
    path = tmp_path / "file.gguf"
    for size in [*range(0, len(content) - 32, 2003), len(content) - 100]:
        path.write_bytes(content[:size])
        assert "truncated" in refused(load, path)


def test_damaged_headers(tiny, tmp_path):
    """Any byte of the header changed: the file is read or refused in one line, whatever the byte says."""
    content, rng = tiny.read_bytes(), random.Random(0)
    path = tmp_path / "file.gguf"
    seen = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(8, 6000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except BadInput as error:
            seen += 1
            assert "\n" not in str(error)
    assert seen > 15


def test_a_file_that_shrinks_after_it_was_opened(tiny, tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(tiny.read_bytes())
    tensors = open_gguf(path).tensors
    path.write_bytes(tiny.read_bytes()[:-5000])
    with pytest.raises(BadInput, match="the file has changed since it was opened"):
        [np.asarray(tensor) for tensor in tensors.values()]


# The real thing.


@pytest.fixture(scope="module")
def smollm2():
    return load(smollm2_gguf())


def test_smollm2_config(smollm2):
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    expected = Llama3Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=True,
    )
    assert smollm2.config == expected
    assert smollm2.generation == GenerationConfig(eos_token_id=(2,), bos_token_id=1, pad_token_id=2)
    assert smollm2.tokenizer.end_of_text == 2


def test_smollm2_answers(smollm2):
    text = smollm2.tokenizer.chat_template.render([{"role": "user", "content": "What is the capital of France?"}])
    tokens = smollm2.tokenizer.encode(text, allow_special=True)
    for _ in range(8):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(smollm2.logits(row, lengths=[len(tokens)])[0, len(tokens) - 1])))
        if tokens[-1] in smollm2.generation.eos_token_id:
            break
    answer = smollm2.tokenizer.decode(tokens)[len(text) :]
    assert answer == "The capital of France is Paris.<|im_end|>"
