"""Heads of classifiers in config.json and in files of weights: what is read, written and refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.interop import config_from_hf, config_to_hf
from llmq_jax.interop.architectures import TABLES, config_from_state_dict, from_state_dict, to_state_dict
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.model_files import load
from llmq_jax.models import build
from tests.interop.refusals import refused
from tests.weights import draw_variables

LABELS = ("ham", "spam")
CONFIG = lq.GPT2Config(
    vocab_size=257,
    max_position_embeddings=16,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    labels=LABELS,
)
LANGUAGE_MODEL = lq.GPT2Config(
    vocab_size=257, max_position_embeddings=16, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
)


def model(config=CONFIG, **fields):
    return LanguageModel(config, build(config), draw_variables(config, seed=3), **fields)


@pytest.mark.parametrize("model_type", TABLES)
def test_weights_go_both_ways(model_type):
    from tests.models.test_heads import CONFIGS

    config = lq.models.override(CONFIGS[model_type], labels=["a", "b", "c"])
    variables = draw_variables(config)
    state = to_state_dict(variables, config)
    assert state["score.weight"].shape == (3, 16) and "lm_head.weight" not in state
    back = from_state_dict(state, config)
    np.testing.assert_array_equal(back["params"]["score"]["kernel"], variables["params"]["score"]["kernel"])


def test_config_json():
    values = config_to_hf(CONFIG)
    assert values["architectures"] == ["GPT2ForSequenceClassification"]
    assert values["id2label"] == {"0": "ham", "1": "spam"} and values["label2id"] == {"ham": 0, "spam": 1}
    assert config_from_hf(json.loads(json.dumps(values))) == CONFIG
    # A language model's says nothing of classes, whatever defaults transformers writes.
    values = config_to_hf(LANGUAGE_MODEL)
    assert "id2label" not in values and values["architectures"] == ["GPT2LMHeadModel"]
    assert config_from_hf(values | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}) == LANGUAGE_MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label_classification' is not supported"),
        ({"problem_type": ["regression"]}, "is not supported: a text has one of the classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "does not number the classes 0, 1, ..."),
        ({"id2label": {}}, "does not number the classes"),
        ({"id2label": ["a", "b"]}, "does not number the classes"),
        ({"id2label": {"0": "a", "1": "a"}}, "names 'a' twice"),
        ({"problem_type": "regression"}, "problem_type='regression' with 2 labels is not supported"),
        ({"problem_type": "regression", "id2label": None, "num_labels": 3}, "with 3 labels is not supported"),
    ],
)
def test_config_json_that_is_refused(changes, message):
    assert message in refused(config_from_hf, config_to_hf(CONFIG) | changes)


def test_a_regression_of_one_number_is_a_scalar_head():
    values = config_to_hf(CONFIG) | {"id2label": {"0": "reward"}, "problem_type": "regression"}
    assert config_from_hf(values).labels == ("reward",)


def test_numbers_may_be_in_any_order():
    values = config_to_hf(CONFIG) | {"id2label": {"1": "spam", "0": "ham"}}
    assert config_from_hf(values).labels == LABELS


def test_a_folder_there_and_back(tmp_path):
    lm = model(tokenizer=ByteTokenizer(), generation=GenerationConfig(eos_token_id=(256,)))
    folder = save_hf(lm, tmp_path / "saved")
    again = load(folder)
    assert again.config == CONFIG
    np.testing.assert_array_equal(again.classify(["spam?"]), lm.classify(["spam?"]))


@pytest.mark.parametrize(
    ("fields", "padding"),
    [
        ({"generation": GenerationConfig(pad_token_id=7, eos_token_id=(3,)), "tokenizer": ByteTokenizer()}, 7),
        ({"generation": GenerationConfig(eos_token_id=(3,)), "tokenizer": ByteTokenizer()}, 256),
        ({"generation": GenerationConfig(eos_token_id=(3, 4))}, 3),
        ({"generation": GenerationConfig(pad_token_id=300, eos_token_id=(3, 4))}, 3),  # which is in no table
    ],
)
def test_transformers_is_told_what_padding_is(fields, padding, tmp_path):
    save_hf(model(**fields), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pad_token_id"] == padding


class EndingTokenizer(ByteTokenizer):
    """Its template ends every text with token 256."""

    def encode(self, text, *, allow_special=False, add_special_tokens=False):
        return [*super().encode(text, allow_special=allow_special), *([256] if add_special_tokens else [])]


def test_padding_is_no_token_that_ends_texts(tmp_path):
    """transformers would take it for padding, and read the token before."""
    generation = GenerationConfig(eos_token_id=(256, 5), pad_token_id=256)
    lm = model(tokenizer=EndingTokenizer(), generation=generation)
    assert lm.class_tokens(["a"]) == ([[97, 256]], 0)
    save_hf(lm, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pad_token_id"] == 5


def test_what_a_template_adds_is_not_cut_off():
    lm = model(tokenizer=EndingTokenizer())
    assert lm.class_tokens(["abcdef", "ab", "abcd"], longest=4) == (
        [[97, 98, 99, 256], [97, 98, 256], [97, 98, 99, 256]],
        2,
    )
    assert "at most 1 token has no room beside the 1" in refused(lm.class_tokens, ["ab"], longest=1)


def test_without_a_token_for_padding_nothing_is_exported(tmp_path):
    assert "this model names none; give it one" in refused(save_hf, model(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_of_the_other_kind(tmp_path):
    """A language model's weights with labels, and the other way round: each is told what to do."""
    classifier, language_model = model(), model(LANGUAGE_MODEL)
    weights = to_state_dict(language_model.variables, LANGUAGE_MODEL)
    message = refused(from_state_dict, weights, CONFIG)
    assert "1 missing (score.weight)" in message and "lq.with_classifier(lm, labels)" in message
    weights = to_state_dict(classifier.variables, CONFIG)
    message = refused(from_state_dict, weights, LANGUAGE_MODEL)
    assert "1 unread (score.weight)" in message and "these are the weights of a classifier: name its classes" in message
    own_head = lq.models.override(LANGUAGE_MODEL, tie_word_embeddings=False)
    left_over = to_state_dict(draw_variables(own_head), own_head)["lm_head.weight"]
    for is_tied in (True, False):
        state = to_state_dict(classifier.variables, CONFIG) | {"lm_head.weight": left_over}
        message = refused(from_state_dict, state, lq.models.override(CONFIG, tie_word_embeddings=is_tied))
        assert message.endswith(
            "GPT2Config: lm_head.weight is a language model's head, which no classifier has; leave it out"
        )
    save_hf(language_model, tmp_path / "lm")
    assert str(tmp_path / "lm") in refused(load, tmp_path / "lm", config={"labels": ["a", "b"]})


def test_labels_may_be_renamed(tmp_path):
    folder = save_hf(model(tokenizer=ByteTokenizer()), tmp_path / "saved")
    assert load(folder, config={"labels": ["fine", "junk"]}).config.labels == ("fine", "junk")
    message = refused(load, folder, config={"labels": ["a", "b", "c"]})
    assert "score.weight is [2, 12] instead of [3, 12]" in message


def test_weights_without_a_config(tmp_path):
    """Their shapes tell how many classes there are."""
    state = to_state_dict(draw_variables(CONFIG, seed=3), CONFIG)
    assert config_from_state_dict(state, num_attention_heads=3).labels == ("LABEL_0", "LABEL_1")
    save_file(state, tmp_path / "model.safetensors")
    lm = load(tmp_path / "model.safetensors", config={"num_attention_heads": 3, "labels": ["ham", "spam"]})
    assert lm.config.labels == LABELS
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (2, 12)


@pytest.mark.parametrize("layout", ["book", "original", "openai"])
def test_layouts_without_classifiers(layout):
    assert "without a place in this layout (params/score/kernel)" in refused(
        to_state_dict, draw_variables(CONFIG), CONFIG, layout=layout
    )
