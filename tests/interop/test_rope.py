"""RoPE in config.json: what is passed over, what is warned of and what is refused, in words that help."""

import copy
import json
import warnings

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.interop.architectures import TABLES, resolve_config
from llmq_jax.models import PRESETS, override, preset
from tests.interop.refusals import refused

YARN = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}


def read(**values):
    return config_from_hf({"model_type": "llama", "max_position_embeddings": 65536, **values}).rope_parameters


def test_what_yarns_own_configs_say_besides_is_passed_over():
    """NousResearch/Yarn-Llama-2-7b-64k and its kind."""
    expected = read(rope_scaling=YARN)
    assert (expected.rope_type, expected.factor) == ("yarn", 16.0)
    neutral = {"finetuned": False, "attn_factor": 1.0, "extrapolation_factor": 1}
    with warnings.catch_warnings(action="error"):
        assert read(rope_scaling=YARN | {"finetuned": True}) == expected
        assert read(rope_scaling=YARN | neutral) == expected


def test_a_factor_of_attention_by_the_name_in_yarns_own_code_counts_as_little_as_in_transformers():
    """deepseek-ai/DeepSeek-R1-0528-Qwen3-8B. What reads the name, as vLLM does, computes with another scale."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}
    with pytest.warns(UserWarning, match=r"'yarn' has attn_factor=0\.878, which counts for nothing"):
        rope = read(max_position_embeddings=131072, rope_scaling=dict(scaling))
    theirs = transformers.LlamaConfig(max_position_embeddings=131072, rope_parameters={**scaling, "rope_theta": 1e4})
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    assert rope.attention_scale == pytest.approx(factor)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": YARN | {"beta": 2.0}}, "rope_parameters.beta is not a parameter of rope_type 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor and lacks rope_type; name one of default, linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "rope_parameters has factor and lacks rope_type"),
        (json.loads('{"rope_theta": NaN}'), "rope_parameters.rope_theta=nan is not a number"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "20000.0 is said of it elsewhere; keep one"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attn_factor": 0.5}}, "attn_factor is not a parameter of"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not an object of parameters"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "=0 is not a positive whole number"),
    ],
)
def test_what_is_refused(values, message):
    assert message in refused(read, **values)


def test_without_a_type_nothing_is_scaled():
    parameters = {"rope_theta": 500.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096}
    assert read(rope_parameters=parameters).to_dict() == {"rope_type": "default", "rope_theta": 500.0}


def test_a_trained_length_is_passed_over_by_types_that_do_not_read_it():
    """As in transformers."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling=scaling, original_max_position_embeddings=4096) == read(rope_scaling=scaling)
    yarn = {"type": "yarn", "factor": 16.0}
    assert read(rope_scaling=yarn, original_max_position_embeddings=4096) == read(rope_scaling=YARN)


def test_a_factor_of_yarn_beside_another_ratio_of_lengths_is_warned_of():
    """transformers warns as well, and computes with the factor."""
    with pytest.warns(
        UserWarning, match=r"has factor=2\.0, which counts, and max_position_embeddings=65536 is 16 times"
    ):
        assert read(rope_scaling=YARN | {"factor": 2.0}).factor == 2.0


@pytest.mark.parametrize(
    ("longest", "scaling"),
    [
        (65536, YARN),
        (4096, YARN),
        (
            131072,
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_ratios_that_are_in_order(longest, scaling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(max_position_embeddings=longest, rope_scaling=scaling)


def test_rope_parameters_beside_rope_scaling():
    """transformers reads the latter alone, without the former's base; of Gemma 3 it reads both."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    both = {"model_type": "llama", "rope_parameters": {"rope_theta": 500.0}, "rope_scaling": scaling}
    assert transformers.AutoConfig.for_model(**copy.deepcopy(both)).rope_parameters["rope_theta"] == 10_000.0
    with pytest.raises(BadInput, match="rope_parameters has rope_theta, which rope_scaling lacks"):
        config_from_hf(both)
    assert config_from_hf({**both, "rope_theta": 500.0}).rope.rope_theta == 500.0
    old = {"type": "linear", "factor": 2.0}
    assert read(rope_parameters=old, rope_scaling=old) == read(rope_scaling=scaling)
    by_kind = {**both, "model_type": "gemma3_text", "rope_parameters": {"full_attention": both["rope_parameters"]}}
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(by_kind)).rope_parameters["full_attention"]
    assert config_from_hf(by_kind).rope.to_dict() == theirs


OLD = ("rope_theta", "rope_scaling", "rope_local_base_freq", "original_max_position_embeddings")
DIVISORS = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 8.0]}
TYPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 16},
    "ntk": {"factor": 2.0},
    "by_parts": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.7},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16, **DIVISORS},
}
WIDTHS = {"head_dim": 6, "qk_rope_head_dim": 6, "sliding_window": 16}
EXPORTED = {
    **PRESETS,
    **{
        f"{model_type}, {rope_type}": (tables.config.config_class, rope_type)
        for model_type, tables in TABLES.items()
        if model_type != "gpt2"
        for rope_type in TYPES
    },
}


def understood(values):
    return transformers.AutoConfig.for_model(**copy.deepcopy(values))


@pytest.mark.parametrize("name", EXPORTED)
def test_both_spellings_are_written_and_say_the_same(name):
    """Version 4 of transformers reads the older one alone; 5 reads the newer, and here too nothing changes by the
    other. Without the newer one the older says all of it."""
    config = EXPORTED[name]
    if isinstance(config, tuple):
        kind, rope_type = config
        model_type = kind.model_type
        widths = {field: width for field, width in WIDTHS.items() if hasattr(kind, field)}
        rope = {"rope_type": rope_type, "rope_theta": 700.0, **TYPES[rope_type]}
        longest = 16 if (model_type, rope_type) == ("gemma3_text", "dynamic") else 64  # one for both kinds of layers
        config = override(kind(), max_position_embeddings=longest, rope_parameters=rope, **widths)
    written = config_to_hf(config)
    new = {field: value for field, value in written.items() if field not in OLD}
    old = {field: value for field, value in written.items() if field != "rope_parameters"}
    assert ("rope_theta" in old and "rope_scaling" in old) == (config.model_type != "gpt2")
    assert "rope_theta" not in (written.get("rope_scaling") or {})  # an unknown parameter there
    ours, theirs = config_from_hf(new), understood(new)
    for values in (written, old):
        assert config_from_hf(values) == ours
        assert understood(values).to_diff_dict() | {OLD[-1]: None} == theirs.to_diff_dict() | {OLD[-1]: None}


def test_a_trained_length_that_version_4_reads_outside():
    """Of longrope alone; of yarn and llama3 it reads it beside the factor."""
    rope = {"rope_type": "longrope", **TYPES["longrope"]}
    config = config_from_hf({"model_type": "llama", "max_position_embeddings": 64, "head_dim": 6, "rope_scaling": rope})
    assert config_to_hf(config)["original_max_position_embeddings"] == 16


@pytest.mark.parametrize("name", ["llama3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("said", [{}, {"rope_theta": None}])
def test_a_scaling_that_is_put_over_a_config_keeps_its_base(name, said):
    """A model card's YaRN says nothing of the base."""
    changes = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **said}}
    config, base = preset(name), PRESETS[name].rope.rope_theta
    for changed in (preset(name, **changes), override(config, **changes), resolve_config(changes, config, {}, "hf")):
        assert (changed.rope.rope_type, changed.rope.rope_theta) == ("yarn", base)
    changes["rope_parameters"]["rope_theta"] = 700.0
    assert override(config, **changes).rope.rope_theta == 700.0
