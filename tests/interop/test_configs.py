"""config.json, read and written."""

import dataclasses
from dataclasses import dataclass

import pytest
import transformers
from flax import linen as nn
from huggingface_hub.errors import StrictDataclassFieldValidationError

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.interop.architectures import TABLES
from llmq_jax.interop.configs import FIXED
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import ARCHITECTURES, PRESETS, Architecture, build, init, preset
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.models.llama3 import Llama3, Llama3Config
from tests.interop.refusals import refused
from tests.parity.references import config_of_transformers
from tests.weights import draw_variables

# The config.json of the hub's gpt2, written years ago and never changed.
ORIGINAL = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


pytestmark = pytest.mark.filterwarnings("error")


def test_original_file():
    assert config_from_hf(ORIGINAL) == GPT2Config()


def test_there_and_back():
    config = GPT2Config(
        vocab_size=13, hidden_size=20, num_attention_heads=5, num_hidden_layers=3, intermediate_size=7,
        max_position_embeddings=9, attn_pdrop=0.0, tie_word_embeddings=False, activation_function="gelu",
    )  # fmt: skip
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("inner", [{}, {"n_inner": None}, {"n_inner": 80}])
def test_inner_width_defaults_to_four_times_the_width(inner):
    assert config_from_hf({"model_type": "gpt2", "n_embd": 20, "n_head": 5, **inner}).mlp_width == 80


def test_our_names_are_read_too():
    """transformers' GPT2Config has them as other names of the same fields."""
    config = config_from_hf({"model_type": "gpt2", "hidden_size": 20, "num_attention_heads": 5})
    assert (config.hidden_size, config.num_attention_heads) == (20, 5)
    for fields in ({"n_inner": None, "intermediate_size": 512}, {"intermediate_size": 512, "n_inner": None}):
        assert config_from_hf({"model_type": "gpt2", **fields}).intermediate_size == 512


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_weights", None),  # null is false
        ("add_cross_attention", True),
        ("is_causal", False),  # as in models that embed texts
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("per_layer_config", {"1": {"layer_norm_epsilon": 0.5}}),
        ("mtp_hidden_states_first", True),
        ("chain_hidden_post_norm", False),
        # What transformers' modules of multi-token prediction read of any config.
        ("mtp_per_layer_config", {"0": {"num_experts_per_tok": 1}}),
        ("logits_mup_width_multiplier", 24.0),
        ("quantization_config", {"quant_method": "gptq"}),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("activation_function", "prelu"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(field, value):
    with pytest.raises(BadInput, match=field) as caught:
        config_from_hf({**ORIGINAL, field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reorder_and_upcast_attn", True),
        ("use_cache", False),
        ("pruned_heads", {}),
        ("dtype", "x"),
        ("unsloth_version", "2025.3"),  # which its fine-tuned models carry
        ("_attn_implementation_autoset", True),  # and those that transformers 4.47 and its like saved
    ],
)
def test_what_does_not_is_passed_over(field, value):
    assert config_from_hf({**ORIGINAL, field: value}) == GPT2Config()


@pytest.mark.parametrize("field", FIXED)
def test_null_is_what_is_not_said(field):
    values = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 4}
    assert config_from_hf({**values, field: None}) == config_from_hf(values)
    theirs = [transformers.AutoConfig.for_model(**values, **said) for said in ({}, {field: None})]
    assert theirs[0].rope_parameters == theirs[1].rope_parameters


@pytest.mark.parametrize("model_type", [name for name in TABLES if name != "gpt2"])
def test_a_null_dropout_is_none_where_transformers_takes_it(model_type):
    values = {"model_type": model_type, "attention_dropout": None}
    try:
        transformers.AutoConfig.for_model(**values)
    except StrictDataclassFieldValidationError:
        with pytest.raises(BadInput, match="attention_dropout=None is not of the type float"):
            config_from_hf(values)
    else:
        assert config_from_hf(values).attention_dropout == 0.0


@pytest.mark.parametrize(
    ("theirs", "ours"), [("gelu_fast", "gelu_new"), ("gelu_python", "gelu"), ("gelu_pytorch_tanh", "gelu_pytorch_tanh")]
)
def test_spellings_of_gelu(theirs, ours):
    assert config_from_hf({**ORIGINAL, "activation_function": theirs}).activation_function == ours


def test_unknown_fields_are_named_in_one_warning():
    with pytest.warns(UserWarning, match="unknown fields are ignored: frobnicate, zap") as caught:
        config_from_hf({**ORIGINAL, "zap": 1, "frobnicate": 2})
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("value", ["768", 768.0, None, True])
def test_a_value_of_another_type(value):
    with pytest.raises(BadInput, match=r"n_embd=.* is not of the type int"):
        config_from_hf({**ORIGINAL, "n_embd": value})


def test_values_that_do_not_fit_together():
    with pytest.raises(BadInput, match="num_attention_heads=7 must divide hidden_size=768"):
        config_from_hf({**ORIGINAL, "n_head": 7})


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_other_names_of_fields(model_type):
    """transformers' attribute_map; where both names stand it goes by their order."""
    attribute_map = transformers.AutoConfig.for_model(model_type).attribute_map
    for other, name in attribute_map.items():
        names = TABLES[model_type].config.names
        (ours,) = [field for field, spelt in names.items() if {other, name} <= {field, *spelt}]
        for said in ({other: 24}, {name: 24}, {name: 24, other: 24}):
            values = {"model_type": model_type, **said}
            theirs = transformers.AutoConfig.for_model(**values)
            assert getattr(config_from_hf(values), ours) == getattr(theirs, name) == 24
        message = refused(config_from_hf, {"model_type": model_type, name: 24, other: 12})
        assert message.endswith("are one field; keep one of them")
        assert f"{name}=24" in message and f"{other}=12" in message


def test_unknown_architecture():
    with pytest.raises(BadInput, match="model_type 'bert' is not supported; supported: gpt2"):
        config_from_hf({"model_type": "bert"})
    with pytest.raises(BadInput, match="no model_type"):
        config_from_hf({})


@pytest.mark.parametrize("model_type", TABLES)
def test_every_field_is_known_to_be_transformers_or_not(model_type):
    table = TABLES[model_type].config
    groups = (table.shared | table.names.keys(), table.own, table.training, ["labels"])
    known = [name for group in groups for name in group]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(table.config_class))


@pytest.mark.parametrize("model_type", TABLES)
def test_defaults_are_those_of_transformers(model_type):
    expected = TABLES[model_type].config.config_class()
    assert config_from_hf({"model_type": model_type}) == expected
    assert config_from_hf(transformers.AutoConfig.for_model(model_type).to_dict()) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_understood_by_transformers(name):
    theirs = config_of_transformers(preset(name), "head_dim", "num_nextn_predict_layers")
    assert config_from_hf(theirs.to_dict()) == preset(name)


@pytest.mark.parametrize("model_type", TABLES)
def test_what_is_written_is_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    # Gemma 3's second rope is a part of transformers' rope_parameters; of some Qwens the model alone reads head_dim.
    undeclared = {"local_rope_parameters"} | ({"head_dim"} if model_type in ("qwen2", "qwen3_moe") else set())
    # What transformers 4 and other readers need.
    older = {
        "gpt2": {"n_ctx"},
        "qwen3_moe": {"num_experts"},
        "deepseek_v3": {"scoring_func", "topk_method", "moe_layer_freq"},
        "gemma3_text": {"rope_local_base_freq"},
    }.get(model_type, set())
    older |= set() if model_type == "gpt2" else {"rope_theta", "rope_scaling"}
    assert config_to_hf(TABLES[model_type].config.config_class()).keys() <= theirs.keys() | undeclared | older
    assert TABLES[model_type].config.shared - undeclared <= theirs.keys()


def test_llama_cpp_finds_the_context_of_gpt_2():
    """By a second name, which is in the hub's files, and which nothing else reads."""
    written = config_to_hf(GPT2Config(max_position_embeddings=96))
    assert (written["n_positions"], written["n_ctx"]) == (96, 96)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mixtral-10m", {"router_aux_loss_coef": 0, "initializer_range": 1}),
        ("deepseek-10m", {"routed_scaling_factor": 2}),
        ("gemma3-270m", {"final_logit_softcapping": 30}),
        ("gpt2-124m", {"attn_pdrop": 0}),
    ],
)
def test_whole_numbers_in_fields_of_floats(name, fields):
    """transformers refuses integers there."""
    config = preset(name)
    # Fields of the package's own classes are checked by beartype, in tests alone.
    unchecked = dataclasses.make_dataclass("Unchecked", [], bases=(type(config),), frozen=True)
    written = config_to_hf(unchecked(**vars(config) | fields))
    assert written.items() >= fields.items()
    transformers.AutoConfig.for_model(**written)


SIZES = {
    "vocab_size": 11,
    "max_position_embeddings": 8,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 8,
}


@dataclass(frozen=True)
class Scaled(Llama3Config):
    """With a field and, where it is given, a weight that transformers' Llama lacks."""

    my_scale: float | None = None


class ScaledLlama(Llama3):
    config: Scaled

    def setup(self):
        super().setup()
        self.scale = self.param("my_scale", nn.initializers.ones, ())


REFUSED = (
    "my_scale=1.0 cannot be exported: transformers' llama has no such field; keep such a model in our own format "
    "(lq.save)"
)


def test_a_field_that_transformers_lacks_is_exported_at_its_default_alone(tmp_path):
    assert config_to_hf(Scaled(**SIZES)) == config_to_hf(Llama3Config(**SIZES))
    config = Scaled(**SIZES, my_scale=1.0)
    assert refused(config_to_hf, config) == REFUSED
    lm = LanguageModel(config, build(config), draw_variables(config))
    assert refused(lq.save_hf, lm, tmp_path / "hf") == REFUSED
    assert not (tmp_path / "hf").exists()


def test_such_a_field_in_the_config_class_itself(monkeypatch):
    """As someone has it who edits the model's file."""
    table = dataclasses.replace(TABLES["llama"].config, config_class=Scaled)
    monkeypatch.setitem(TABLES, "llama", TABLES["llama"]._replace(config=table))
    assert refused(config_to_hf, Scaled(**SIZES, my_scale=1.0)) == REFUSED


def test_a_field_of_another_architecture_is_none_of_this_one():
    config = dataclasses.make_dataclass(
        "Capped", [("final_logit_softcapping", float | None, None)], bases=(Llama3Config,), frozen=True
    )(**SIZES, final_logit_softcapping=30.0)
    assert "final_logit_softcapping=30.0 cannot be exported: transformers' llama" in refused(config_to_hf, config)


def test_defaults_that_are_made_and_fields_without_any():
    fields = [("sizes", tuple, dataclasses.field(default_factory=lambda: (1,)))]
    made = dataclasses.make_dataclass("Made", fields, bases=(Llama3Config,), frozen=True)
    assert config_to_hf(made(**SIZES)) == config_to_hf(Llama3Config(**SIZES))
    assert "sizes=(2,) cannot be exported" in refused(config_to_hf, made(**SIZES, sizes=(2,)))
    fields = [("size", int, dataclasses.field(kw_only=True))]
    needed = dataclasses.make_dataclass("Needed", fields, bases=(Llama3Config,), frozen=True)
    assert "size=1 cannot be exported" in refused(config_to_hf, needed(**SIZES, size=1))


def test_a_weight_that_the_layout_has_no_place_for(monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture(Scaled, ScaledLlama))
    config = Scaled(**SIZES)
    lm = LanguageModel(config, build(config), init(config))
    assert refused(save_hf, lm, tmp_path / "hf") == (
        "the variables do not fit Scaled: 1 without a place in this layout (params/my_scale); keep such a model in our "
        "own format (lq.save)"
    )
