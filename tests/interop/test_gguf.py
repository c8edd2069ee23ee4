"""Models in GGUF files: against transformers, files that do not fit, and a real one."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from llmq_jax.data.gguf_tokenizer import CHAT_TEMPLATE
from llmq_jax.errors import BadInput
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.gguf import END_OF_TURN, generation_config
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.model_files import has_config, load
from llmq_jax.models.llama3 import Llama3Config
from llmq_jax.objectives.grpo import can_share_prompts
from tests.interop.llama_cpp import VOCABULARY, add_vocabulary, make_model, refused, write, write_llama
from tests.smollm2 import smollm2_gguf

LOGITS = 1e-4
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 40))


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


@pytest.mark.parametrize(("name", "factor"), [("llama 3.1", 8.0), ("llama 3.2", 32.0)])
def test_the_scaling_of_llama3_by_its_name(tmp_path, name, factor):
    """Other programs do not know an export's divisors in a Llama, and llama.cpp's converter drops them silently."""
    rope = LLAMA3_ROPE | {"rope_theta": 500_000.0, "factor": factor, "original_max_position_embeddings": 8192}
    model = make_model(rope_parameters=rope, head_dim=64)
    write_llama(tmp_path / "model.gguf", model)
    lm = load(tmp_path / "model.gguf")
    assert lm.config.rope_parameters.to_dict() == rope
    np.testing.assert_allclose(lm.logits(TOKENS), their_logits(model), atol=LOGITS)
    exported = transformers.AutoConfig.from_pretrained(save_hf(lm, tmp_path / "hf"))
    assert exported.rope_parameters == rope
    write_llama(tmp_path / "near.gguf", make_model(rope_parameters=rope | {"low_freq_factor": 1.01}, head_dim=64))
    assert load(tmp_path / "near.gguf").config.rope_parameters.to_dict()["rope_type"] == "longrope"


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


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_key_value_heads": 1}
GEMMA |= {"tie_word_embeddings": True}
OTHERS = {
    "mixtral": ("mixtral", {"num_local_experts": 4}, {}),
    "qwen 3 with experts": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
        {},
    ),
    "gemma 2": ("gemma2", {**GEMMA, "num_hidden_layers": 3}, {}),
    "gemma 3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        {},
    ),
    "gemma 3, what files may say": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        {
            "final_logit_softcapping": 3.0,
            "rope.freq_base_swa": 300.0,
            "attention.sliding_window_pattern": [True, False, False, True],
        },
    ),
    "gemma 3, another distance": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"attention.sliding_window_pattern": 2},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_experts_and_gemma_against_transformers(tmp_path, name):
    model_type, changes, written = OTHERS[name]

    def change(writer):
        for key, value in written.items():
            add = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}[type(value)]
            add(f"{writer.arch}.{key}", value)

    model = make_model(model_type, **changes)
    write_llama(tmp_path / "model.gguf", model, change)
    lm = load(tmp_path / "model.gguf")
    assert lm.config.model_type == model_type
    expected = their_logits(model)
    np.testing.assert_allclose(lm.logits(TOKENS), expected, atol=LOGITS)
    exported = transformers.AutoModelForCausalLM.from_pretrained(save_hf(lm, tmp_path / "hf")).eval()
    np.testing.assert_allclose(their_logits(exported), expected, atol=LOGITS)


@pytest.mark.parametrize(("model_type", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_scale_scores_by_the_hidden_size(tmp_path, model_type, layers):
    for count, expected in ((layers, 8), (layers - 1, 16)):
        model = make_model(model_type, **GEMMA, num_hidden_layers=count)
        write_llama(tmp_path / "model.gguf", model)
        assert load(tmp_path / "model.gguf").config.query_pre_attn_scalar == expected


def test_a_distance_of_0_is_no_global_layer(tmp_path):
    def change(writer):
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 0)

    write_llama(tmp_path / "model.gguf", make_model("gemma3_text", **GEMMA, num_hidden_layers=6), change)
    assert load(tmp_path / "model.gguf").config.layer_types == ("sliding_attention",) * 6


def test_older_files_of_mixtral(tmp_path):
    """Before April 2024 each matrix of each expert was a tensor."""
    model = make_model("mixtral", num_local_experts=3)
    write_llama(tmp_path / "model.gguf", model, experts_apart=True)
    np.testing.assert_allclose(load(tmp_path / "model.gguf").logits(TOKENS), their_logits(model), atol=LOGITS)


def as_stored(model, kind: str):
    """The model with the weights that a file of that type stands for."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                stored = quantize(parameter.numpy(), GGMLQuantizationType[kind])
                parameter.copy_(torch.tensor(dequantize(stored, GGMLQuantizationType[kind])))
    return model


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_quantised_models(tmp_path, kind, model_type):
    """The logits are those of transformers with the weights that the blocks stand for."""
    model = make_model(model_type, intermediate_size=64, tie_word_embeddings=True)
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


def test_a_model_in_parts(tmp_path):
    """As llama.cpp's converter splits it: the whole by any of its parts, or by their folder."""
    model, folder = make_model("gemma3_text", **GEMMA), tmp_path / "parts"
    folder.mkdir()
    write_llama(folder / "m.gguf", model, add_vocabulary, split_max_tensors=12)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in (folder, *parts):
        lm = load(path)
        np.testing.assert_allclose(lm.logits(TOKENS), their_logits(model), atol=LOGITS)
        assert lm.tokenizer is not None
    (folder / "other.gguf").write_bytes(b"")
    assert "holds 4 GGUF files" in refused(load, folder)
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(
        BadInput, match=r"00003-of-00003.gguf: is part 1 of 3 of a model, counted from 0, and not 2 of 3"
    ):
        load(parts[0])
    beyond = parts[-1].with_name("m-00004-of-00003.gguf")
    beyond.touch()
    with pytest.raises(BadInput, match=r"m-00004-of-00003.gguf: is named as a part beyond the 3 that there are"):
        load(beyond)
    parts[-1].rename(folder / "x.gguf").write_bytes(last)
    with pytest.raises(BadInput, match="parts: 1 of the 3 parts of m are not there"):
        load(parts[0])


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


def test_end_tokens_that_are_no_numbers():
    metadata = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eot_token_id": [1]}
    with pytest.raises(BadInput, match=r"tokenizer.ggml.eot_token_id=\[1\] is not an integer"):
        generation_config(metadata)


def test_end_tokens_by_name(tmp_path):
    def change(writer):
        add_vocabulary(writer)
        writer.add_eot_token_id(VOCABULARY - 4)
        writer.add_eom_token_id(VOCABULARY - 5)
        writer.add_pad_token_id(5)

    path = tmp_path / "model.gguf"
    write_llama(path, make_model(), change)
    generation = load(path).generation
    assert generation.eos_token_id == (VOCABULARY - 2, VOCABULARY - 4, VOCABULARY - 5, VOCABULARY - 1)
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
        (lambda w: w.add_uint32("llama.expert_count", 8), "the metadata lacks llama.expert_used_count"),
        (lambda w: w.add_value_length(4), "and its values 4; supported are models where the three are equal"),
        (lambda w: w.add_key_length(16), "its keys have 16 features a head, of which RoPE turns 8"),
        (
            lambda w: w.add_string("llama.rope.scaling.type", "longrope"),
            "'longrope' is not supported, only none, linear",
        ),
        (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 2.0), "attn_factor=2.0 is not supported, only 1.0"),
        (
            lambda w: w.add_uint16("split.count", 3),
            "is part 0 of 3 of a model, counted from 0, and not 0 of 1; parts are",
        ),
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
    writer = GGUFWriter(path, "qwen2moe")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    write(writer)
    message = refused(load, path)
    assert "holds a model of the architecture 'qwen2moe'; supported are llama, qwen2, qwen3, qwen3moe" in message


@pytest.mark.parametrize(
    ("model_type", "key", "value", "reason"),
    [
        ("qwen2", "expert_count", 8, "qwen2.expert_count=8 is not supported for this architecture"),
        ("gemma3_text", "rope.scaling.type", "yarn", "gemma3 with RoPE that is scaled otherwise than linearly is not"),
        ("gemma3_text", "attention.sliding_window_pattern", [True], "sliding_window_pattern=[True] is not an integer"),
        ("gemma3_text", "attention.sliding_window_pattern", [2, 3], "sliding_window_pattern=[2, 3] is not an integer"),
        ("gemma3_text", "attention.sliding_window_pattern", -6, "sliding_window_pattern=-6 is negative"),
        ("gemma2", "attn_logit_softcapping", 0.0, "attn_logit_softcapping=0.0 must be positive and finite, or None"),
    ],
)
def test_metadata_of_experts_and_gemma_that_are_not_supported(tmp_path, model_type, key, value, reason):
    def change(writer):
        kinds = {int: writer.add_int32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        writer.kv_data[0].pop(f"{writer.arch}.{key}", None)
        kinds[type(value)](f"{writer.arch}.{key}", value)
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", 4.0)

    write_llama(tmp_path / "model.gguf", make_model(model_type, head_dim=8, sliding_window=8), change)
    assert reason in refused(load, tmp_path / "model.gguf")


def test_a_gemma_without_heads(tmp_path, monkeypatch):
    """Of the size whose queries are scaled by the width of a head on average."""
    monkeypatch.setattr("llmq_jax.interop.gguf.SCALED_BY_HIDDEN_SIZE", {"gemma2": 1})
    path = tmp_path / "gemma.gguf"
    writer = GGUFWriter(path, "gemma2")
    for name, value in {"embedding_length": 2, "block_count": 1, "feed_forward_length": 2, "context_length": 8}.items():
        writer.add_uint32(f"gemma2.{name}", value)
    writer.add_uint32("gemma2.attention.head_count", 0)
    writer.add_float32("gemma2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((0, 2), np.float32))
    write(writer)
    assert "num_attention_heads=0 must be at least 1" in refused(load, path)


def test_missing_metadata(tmp_path):
    path = tmp_path / "bare.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    write(writer)
    assert "the metadata lacks llama.block_count" in refused(load, path)


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
