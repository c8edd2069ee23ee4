"""Models of another config start from weights: what is taken over, drawn and left out, by name."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel
from tests.models.test_deepseek3 import TINY
from tests.models.test_own_model import SIZES, shown  # noqa: F401  a fixture

TOKENS = np.arange(16)[None]
GPT2 = lq.GPT2Config(**SIZES)


def model(config, seed=0):
    return LanguageModel(config, lq.build(config), lq.init(config, seed), lq.ByteTokenizer())


@pytest.fixture(scope="module")
def gpt2():
    return model(GPT2)


def test_the_same_config_takes_all_arrays_as_they_are(gpt2):
    again = lq.with_config(gpt2, GPT2)
    for ours, theirs in zip(jax.tree.leaves(again.variables), jax.tree.leaves(gpt2.variables), strict=True):
        assert ours is theirs


def test_a_config_of_ones_own_brings_its_model(gpt2, shown):  # noqa: F811
    capped = lq.with_config(gpt2, shown["CappedConfig"](**vars(GPT2), logit_cap=2.0))
    logits = gpt2.logits(TOKENS)
    np.testing.assert_allclose(capped.logits(TOKENS), 2 * np.tanh(logits / 2), rtol=1e-6)
    assert capped.tokenizer is gpt2.tokenizer
    replaced = gpt2.replace(config=shown["CappedConfig"](**vars(GPT2), logit_cap=2.0))
    np.testing.assert_array_equal(replaced.logits(TOKENS), capped.logits(TOKENS))


@pytest.mark.parametrize("config", [{"num_hidden_layers": 5}, None, lq.GPT2Config])
def test_what_is_no_config_is_told(gpt2, config):
    for take in (lambda: lq.with_config(gpt2, config), lambda: gpt2.replace(config=config)):
        with pytest.raises(BadInput, match=r"is no config of a model: give an instance"):
            take()


def test_layers_are_taken_from_whatever_stacks_they_stand_in(gpt2, shown):  # noqa: F811
    """The page's model has its first layer in a stack of its own, and queries, keys and values in no module."""
    config = shown["ValueResidualConfig"](**vars(GPT2))
    with pytest.raises(
        BadInput, match=r"the model has no layers/\*/out/bias.*no place for layers/\*/attention/out/bias"
    ):
        lq.with_config(gpt2, config)
    other = lq.with_config(gpt2, config, renamed=shown["in_gpt2"])
    before, after = ([layer["params"] for layer in of.model.slice_layers(of.variables)[1]] for of in (gpt2, other))
    assert len(after) == GPT2.num_hidden_layers
    for old, new in zip(before, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, {**old, **old["attention"]}, {**new, "attention": old["attention"]})
    assert float(np.abs(other.logits(TOKENS) - gpt2.logits(TOKENS)).max()) > 1e-3


def test_layers_are_added_and_left_out(gpt2):
    deeper = dataclasses.replace(GPT2, num_hidden_layers=5)
    grown = lq.with_config(gpt2, deeper, fresh=["layers/3/*", "layers/4/*"], seed=7)
    before, after = (of.model.slice_layers(of.variables)[1] for of in (gpt2, grown))
    jax.tree.map(np.testing.assert_array_equal, before, after[:3])
    drawn = lq.build(deeper).slice_layers(lq.init(deeper, 7))[1]
    jax.tree.map(np.testing.assert_array_equal, drawn[3:], after[3:])
    back = lq.with_config(grown, GPT2, unused=["layers/3/*", "layers/4/*"])
    jax.tree.map(np.testing.assert_array_equal, back.variables, gpt2.variables)


def test_layers_go_to_other_places_and_to_several(gpt2):
    """New layers 0, 1, 2, 3 are the old 2, 0, 0, 1; without the last, old layer 1 is lost unless it is named."""
    order = (2, 0, 0, 1)

    def renamed(name):
        part, *rest = name.split("/", 2)
        return "/".join((part, str(order[int(rest[0])]), rest[1])) if part == "layers" else name

    before = gpt2.model.slice_layers(gpt2.variables)[1]
    for count in (4, 3):
        config, unused = dataclasses.replace(GPT2, num_hidden_layers=count), ["layers/1/*"][: 4 - count]
        moved = lq.with_config(gpt2, config, renamed=renamed, unused=unused)
        after = moved.model.slice_layers(moved.variables)[1]
        jax.tree.map(np.testing.assert_array_equal, after, tuple(before[at] for at in order[:count]))
    with pytest.raises(BadInput, match=r"no place for .*to leave them out, unused=\['layers/\*/"):
        lq.with_config(gpt2, config, renamed=renamed)


def test_what_is_named_fresh_is_drawn_though_it_is_there(gpt2):
    again = lq.with_config(gpt2, GPT2, fresh="token_embedding/*", seed=3)
    drawn = lq.init(GPT2, 3)["params"]
    for name, leaf in again.params.items():
        jax.tree.map(np.testing.assert_array_equal, leaf, (drawn if name == "token_embedding" else gpt2.params)[name])


def test_what_is_drawn_has_the_type_of_the_weights(gpt2):
    half = gpt2.replace(variables=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), gpt2.variables))
    wider = dataclasses.replace(GPT2, vocab_size=300)
    again = lq.with_config(half, wider, fresh=["token_embedding/*"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again.variables)} == {"bfloat16"}
    assert again.params["token_embedding"]["embedding"].shape == (300, GPT2.hidden_size)


def test_modules_of_further_tokens_are_left_out_and_a_routers_bias_stays():
    lm = model(TINY)
    same = lq.with_config(lm, TINY)
    assert flatten_dict(same.variables).keys() == flatten_dict(lm.variables).keys()
    without = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    less = lq.with_config(lm, without, unused=["layers/3/*", "layers/4/*"])
    np.testing.assert_array_equal(less.logits(TOKENS), lm.logits(TOKENS))
    assert "router" in less.variables
    half = lm.variables | {"params": jax.tree.map(lambda leaf: leaf.astype("bfloat16"), lm.params)}
    drawn = lq.with_config(lm.replace(variables=half), TINY, fresh=["layers/*/router/*"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(drawn.variables["router"])} == {"float32"}


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (
            {"vocab_size": 300},
            {},
            r"token_embedding/embedding is \[257, 16\] in the model and \[300, 16\] by the config; "
            r"to draw them anew, fresh=\['token_embedding/embedding'\]",
        ),
        ({"num_hidden_layers": 4}, {}, r"the model has no layers/\*/"),
        (
            {"num_hidden_layers": 2},
            {},
            r"the config has no place for layers/\*/.*to leave them out, unused=\['layers/\*/",
        ),
        ({}, {"fresh": ["nothing/*"]}, "fresh: 'nothing/\\*' matches no weight of those that may be named; there are "),
        (
            {},
            {"unused": ["nothing/*"]},
            "unused: 'nothing/\\*' matches no weight of those that may be named; there are none",
        ),
    ],
)
def test_what_is_not_named_is_refused(gpt2, change, given, message):
    with pytest.raises(BadInput, match=message):
        lq.with_config(gpt2, dataclasses.replace(GPT2, **change), **given)


def test_adapters_are_refused(gpt2):
    with pytest.raises(BadInput, match=r"merge them first: lq\.merge"):
        lq.with_config(lq.lora(gpt2, rank=2), GPT2)
