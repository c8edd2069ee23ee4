"""Classifiers of every architecture: their config, their head, where it reads, and what they refuse."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.errors import BadInput
from llmq_jax.generation import generate
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.model_files import load, save
from llmq_jax.models import ARCHITECTURES, PRESETS, abstract_variables, build, fields_from_text, override
from llmq_jax.models.heads import last_hidden
from llmq_jax.objectives import NextToken
from tests.interop.refusals import refused
from tests.weights import draw_variables

LABELS = ("ham", "spam")
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "max_position_embeddings": 64, "initializer_range": 0.3}
CONFIGS = {
    "gpt2": lq.GPT2Config(vocab_size=257, num_attention_heads=2, **SIZES),
    "llama": override(PRESETS["llama-10m"], **SIZES, num_attention_heads=2, num_key_value_heads=1),
    "mistral": lq.MistralConfig(
        vocab_size=257, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, sliding_window=16, **SIZES
    ),
    "ministral": lq.MinistralConfig(
        vocab_size=257,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
        **SIZES,
    ),
    "qwen2": lq.Qwen2Config(
        vocab_size=257, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, **SIZES
    ),
    "qwen3": lq.Qwen3Config(
        vocab_size=257, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24, **SIZES
    ),
    "mixtral": override(PRESETS["mixtral-10m"], **SIZES, num_attention_heads=2, num_key_value_heads=1),
    "qwen3_moe": override(
        PRESETS["qwen3-moe-10m"], **SIZES, num_attention_heads=2, num_key_value_heads=1, mlp_only_layers=[0]
    ),
    "deepseek_v3": override(PRESETS["deepseek-10m"], **SIZES, num_attention_heads=2, tie_word_embeddings=False),
    "gemma2": lq.Gemma2Config(
        vocab_size=257, num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=16, **SIZES
    ),
    "gemma3_text": override(PRESETS["gemma3-10m"], **SIZES, num_attention_heads=2, num_key_value_heads=1),
}


def language_model(model_type, **changes):
    config = override(CONFIGS[model_type], **changes)
    return LanguageModel(config, build(config), draw_variables(config, seed=3), ByteTokenizer())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request):
    return language_model(request.param)


@pytest.fixture(scope="module")
def classifier(lm):
    return with_classifier(lm, LABELS, seed=1)


@pytest.mark.exhaustive
def test_a_classifier_has_a_head_of_its_own(lm):
    config = override(lm.config, labels=["ham", "spam", "eggs"])
    assert config.labels == ("ham", "spam", "eggs") and hash(config)
    params = abstract_variables(config)["params"]
    assert params["score"]["kernel"].shape == (16, 3) and "bias" not in params["score"]
    assert "lm_head" not in params and "token_embedding" in params and "mtp" not in params
    logits = jax.eval_shape(build(config).apply, abstract_variables(config), np.ones((2, 5), np.int32))
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels=[] must name at least one class; None is a language model"),
        (["a", "b", "a"], "labels=['a', 'b', 'a'] names 'a' twice"),
        (["a", ""], "must be the names of the classes"),
    ],
)
def test_labels_that_cannot_be(model_type, labels, message):
    with pytest.raises(BadInput) as error:
        override(CONFIGS[model_type], labels=labels)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("none", [[], ()])
def test_no_text_is_told(classifier, none):
    with pytest.raises(BadInput, match=r"^there is nothing to classify: give one text or row of tokens, or more$"):
        classifier.classify(none)


def test_labels_are_a_field_like_others(lm, classifier):
    config_class = type(lm.config)
    assert fields_from_text(config_class, ['labels=["a", "b"]']) == {"labels": ["a", "b"]}
    again = json.loads(json.dumps(dataclasses.asdict(classifier.config)))
    assert config_class(**again) == classifier.config


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("a", """; a list is written 'labels=["a"]'"""),
        ("not spam, spam", """; a list is written 'labels=["not spam", "spam"]'"""),
        ("['not spam', spam]", """; a list is written 'labels=["not spam", "spam"]'"""),
        ("[1, 2]", ""),
        ("3", ""),
    ],
)
def test_how_a_list_is_written(text, advice):
    assignment = f"labels={text}"
    with pytest.raises(BadInput) as error:
        fields_from_text(lq.GPT2Config, [assignment])
    assert str(error.value) == f"{assignment} is not of the type tuple[str, ...] | list[str] | None{advice}"


def test_the_last_token_of_a_row_is_found_wherever_the_padding_is():
    hidden = jnp.arange(24.0).reshape(3, 4, 2)
    segments = np.array([[1, 2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(last_hidden(hidden, jnp.asarray(segments)), hidden[[0, 1, 2], [1, 3, 0]])
    np.testing.assert_array_equal(last_hidden(hidden), hidden[:, -1])


def test_padding_changes_nothing(classifier):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (3, 12))
    lengths = np.array([12, 5, 1])
    expected = classifier.classify(tokens, lengths=lengths)
    assert expected.dtype == np.float32 and expected.shape == (3, 2)
    real = np.arange(12) < lengths[:, None]
    for filler in (0, 256):
        np.testing.assert_array_equal(classifier.classify(np.where(real, tokens, filler), lengths=lengths), expected)
    left = np.stack([np.roll(row, 12 - length) for row, length in zip(np.where(real, tokens, 7), lengths, strict=True)])
    found = classifier.classify(left, segment_ids=(np.arange(12) >= 12 - lengths[:, None]).astype(int))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.exhaustive
def test_texts_in_batches_are_what_each_is_alone():
    """Rows of other widths, with as much padding as their batch makes it, and with none."""
    classifier = with_classifier(language_model("llama"), LABELS, seed=1)
    texts = ["Win a prize!", "See you at noon, " * 3, "ok", "Ü"]
    together = classifier.classify(texts)
    assert together.shape == (4, 2)
    np.testing.assert_array_equal(classifier.classify(np.array(texts)), together)
    for text, expected in zip(texts, together, strict=True):
        np.testing.assert_allclose(classifier.classify(text)[0], expected, atol=1e-4)
    rows, cut = classifier.class_tokens(texts)
    assert cut == 0
    for size in (1, 2, 100):
        np.testing.assert_allclose(classifier.classify_rows(rows, batch_size=size), together, atol=1e-4)
    np.testing.assert_allclose(classifier.classify([rows[0]])[0], together[0], atol=1e-4)


@pytest.mark.exhaustive
def test_with_classifier_keeps_all_but_the_head(lm, classifier):
    assert classifier.config.labels == LABELS
    expected, found = abstract_variables(classifier.config), classifier.variables
    assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, expected)
    for collection, tree in found.items():
        for name, leaf in tree.items():
            if name != "score":
                assert leaf is lm.variables[collection][name]
    if lm.config.model_type == "deepseek_v3":  # whose modules go as well
        np.testing.assert_allclose(lm.hidden([[5, 6, 7]]), classifier.hidden([[5, 6, 7]]), atol=1e-5)
    other = with_classifier(lm, LABELS, seed=2).params["score"]["kernel"]
    assert not np.allclose(other, found["params"]["score"]["kernel"])
    assert "score" not in lm.params and lm.config.labels is None  # the model that it is made of is as it was


def test_the_fresh_head_is_drawn_as_transformers_draws_it():
    lm = language_model("llama", hidden_size=512, initializer_range=0.05)
    narrow = lm.replace(variables=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.variables))
    classifier = with_classifier(narrow, [f"class {i}" for i in range(100)])
    kernel = classifier.params["score"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert float(jnp.std(kernel.astype(jnp.float32))) == pytest.approx(0.05, rel=0.02)
    logits = jax.eval_shape(classifier.model.apply, classifier.variables, np.ones((1, 3), np.int32))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("tied", [{}, {"variant": "tinylora", "tied": True}])
def test_adapters_of_the_old_head_alone_leave_none(tied):
    """So that a recipe adds its own, in place of training the head alone."""
    lm = language_model("llama", tie_word_embeddings=False)
    alone, beside = (with_classifier(lq.lora(lm, targets=names, **tied), LABELS) for names in ("lm_head", "*"))
    assert sorted(alone.variables) == sorted(lm.variables)
    assert "lora" in beside.variables and "lm_head" not in beside.variables["lora_fixed"]


@pytest.mark.exhaustive
def test_a_classifier_may_be_given_other_labels():
    classifier = with_classifier(language_model("llama"), LABELS)
    other = with_classifier(classifier, ["a", "b", "c"])
    assert other.classify([[1, 2]]).shape == (1, 3)
    assert with_classifier(classifier, ["reward"]).classify([[1, 2]]).shape == (1, 1)


def test_our_own_format_keeps_labels(classifier, tmp_path):
    save(classifier, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == classifier.config
    jax.tree.map(np.testing.assert_array_equal, again.variables, classifier.variables)


@pytest.mark.exhaustive
@pytest.mark.parametrize("lm", ["gpt2", "deepseek_v3"], indirect=True)
def test_what_a_classifier_refuses(classifier):
    what = "is a classifier (ham, spam) and gives no token"
    assert what in refused(classifier.logits, [[1, 2]])
    assert what in refused(generate, classifier, [[1, 2]], max_new_tokens=2)
    assert what in refused(classifier.mtp_logits, [[1, 2]])
    batch = {name: jnp.ones((1, 4), jnp.int32) for name in ("tokens", "targets", "mask")}
    objective = NextToken(classifier.model)
    assert what in refused(objective.loss, classifier.variables, batch, objective.weights(batch))


@pytest.mark.exhaustive
@pytest.mark.parametrize("lm", ["gpt2", "deepseek_v3"], indirect=True)
def test_what_a_language_model_refuses(lm):
    assert "this model is a language model, which knows no classes" in refused(lm.classify, [[1, 2]])
    assert "knows no classes" in refused(lm.model.apply, lm.variables, np.ones((1, 2), np.int32), method="classify")


def test_rows_that_cannot_be_classified():
    lm = with_classifier(language_model("llama"), LABELS)
    assert "row 1 is empty" in refused(lm.classify, [[1, 2], [3, 4]], lengths=[2, 0])
    assert "row 0 holds 2 documents" in refused(lm.classify, [[1, 2]], segment_ids=[[1, 2]])
    assert "give texts alone" in refused(lm.classify, ["a"], lengths=[1])
    assert "text 1 has 65 tokens, and the model takes 1 to 64" in refused(lm.classify, ["a", "a" * 65])
    assert "holds no tokenizer" in refused(lm.replace(tokenizer=None).classify, ["a"])
    assert "text 1 must be a string, not list" in refused(lm.classify, ["a", [1, 2]])
    assert "text 0 must be a string, not list" in refused(lm.classify, [[1, 2], "a"])
    for empty in ("", " \n"):
        assert "text 1 is empty" in refused(lm.classify, ["a", empty])
    assert "batch_size is 0 and must be at least 1" in refused(lm.classify_rows, [[1]], batch_size=0)
    assert lm.classify_rows([]).shape == (0, 2)
