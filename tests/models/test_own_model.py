"""The models that docs/own_model.md shows train, go to disk and back, and decode with caches as without."""

import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax.errors import BadInput
from llmq_jax.models import ARCHITECTURES, PRESETS
from llmq_jax.training.roles import ROLES

PAGE = (Path(__file__).parents[2] / "docs" / "own_model.md").read_text()
MARK = "<!-- executed by tests/models/test_own_model.py -->"
PRESET, RUNS = (MARK.replace(" -->", f": {what} -->") for what in ("sizes", "with_capped"))
SIZES = {"vocab_size": 257, "max_position_embeddings": 32, "hidden_size": 16, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 3, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def shown():
    """What the page defines; its entries are taken out again."""
    before, roles = dict(ARCHITECTURES), dict(ROLES)
    scope: dict = {"__name__": "own_model"}
    for code in re.findall(rf"{re.escape(MARK)}\n```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "docs/own_model.md", "exec"), scope)
    yield scope
    for name in ARCHITECTURES.keys() - before.keys():
        del ARCHITECTURES[name]
    for name in ROLES.keys() - roles.keys():
        del ROLES[name]


@pytest.mark.parametrize("name", ["CappedConfig", "TopKeysConfig", "ValueResidualConfig", "SwishConfig", "GainConfig"])
def test_models_of_the_page_train_and_come_back(name, shown, tmp_path):
    config = shown[name](**SIZES)
    tokens = np.frombuffer(b"abcdefgh" * 200, np.uint8)
    batches = lq.data.training_batches(tokens, context=16, batch_size=4, seed=0)
    optimizer = lq.training.adamw(1e-2)
    step = lq.training.make_train_step(lq.objectives.NextToken(lq.build(config)), optimizer)
    state = lq.training.create_state(lq.init(config), optimizer)
    options = lq.training.RunOptions(steps=20, plot=False, log_every=1)
    files = {"folder": tmp_path / "run", "model_config": config, "tokenizer": lq.ByteTokenizer()}
    result = lq.training.run(state, step, batches, options, **files)
    assert result.loss < 3.0  # of log(257) = 5.5 in the beginning
    lm = lq.load(tmp_path / "run")
    assert type(lm.config).__name__ == name
    prompt, greedy = list(b"cde"), lq.Sampler(temperature=0.0)
    made = lq.generate(lm, "cde", max_new_tokens=12, sampler=greedy).tokens[0].tolist()
    # The models are causal: of the whole text each place says what comes next.
    whole = lm.logits([prompt + made])[0, len(prompt) - 1 : -1]
    assert whole.argmax(axis=-1).tolist() == made


@pytest.mark.parametrize("name", ["CappedConfig", "ValueResidualConfig", "GainConfig"])
def test_models_of_the_page_take_adapters(name, shown):
    config = shown[name](**SIZES)
    lm = lq.language_model.LanguageModel(config, lq.build(config), lq.init(config))
    learner = lq.lora(lm, rank=2, targets="attention" if name != "ValueResidualConfig" else ("qkv",))
    np.testing.assert_array_equal(learner.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]))
    assert lq.merge(learner).logits([[1, 2, 3]]).shape == (1, 3, 257)


def test_commands_know_a_model_of_another_folder(shown, tmp_path, monkeypatch, capsys):
    """By the page's script, which imports the file with the model and then runs the command that follows its name."""
    model, sizes, script = (
        re.search(rf"{re.escape(mark)}\n```python\n(.*?)```", PAGE, re.DOTALL)[1] for mark in (MARK, PRESET, RUNS)
    )
    (tmp_path / "capped.py").write_text(model + sizes)
    (tmp_path / "with_capped.py").write_text(script)
    (tmp_path / "my.txt").write_text("A text to train on. " * 100)
    monkeypatch.chdir(tmp_path)
    for table, name in ((ARCHITECTURES, "capped"), *((PRESETS, name) for name in ("capped", "baseline"))):
        monkeypatch.setitem(table, name, None)  # so that what the file puts there is taken out again
    monkeypatch.setitem(sys.modules, "capped", None)
    monkeypatch.delitem(sys.modules, "capped")
    monkeypatch.syspath_prepend(tmp_path)

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["with_capped.py", *arguments])
        with pytest.raises(SystemExit):
            runpy.run_path("with_capped.py", run_name="__main__")
        return "".join(capsys.readouterr())

    assert "unknown preset 'caped': did you mean capped?" in said("train.pretrain", "--preset", "caped")
    command = re.search(r"with_capped\.py (train\.pretrain .* --out) ", PAGE)[1].split()
    small = "run --num-hidden-layers 1 --steps 1 --batch-size 2 --context 16 --evaluate-every 0 --sample-every 0"
    out = said(*command, *small.split(), "--config", "logit_cap=20")
    assert re.search(r"llmq generate run --prompt The +# by a script that registers capped: docs/own_model.md\n", out)
    assert lq.load("run").config.logit_cap == 20
    assert said("llmq", "generate", "run", "--prompt", "The ", "--max-new-tokens", "2").startswith("The ")


def test_gains_begin_as_the_model_that_they_join(shown):
    gpt2 = lq.GPT2Config(**SIZES)
    lm = lq.language_model.LanguageModel(gpt2, lq.build(gpt2), lq.init(gpt2))
    np.testing.assert_allclose(shown["with_gains"](lm).logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=1e-5)


def test_the_choice_of_attention_knows_that_a_layer_may_have_a_formula_of_its_own(shown):
    """Those of this package have none."""
    capped, own = (lq.build(shown[name](**SIZES)) for name in ("CappedConfig", "TopKeysConfig"))
    assert capped.attention_choice() == "attention: blocked"
    assert own.attention_choice() == "attention: blocked; plain where a layer has a formula of its own"
    assert own.clone(attention="masked").attention_choice() == "attention: masked"


def test_capped_logits_are_capped(shown):
    config = shown["CappedConfig"](**SIZES, logit_cap=2.0)
    logits = lq.build(config).apply(lq.init(config), np.arange(16)[None])
    assert 1.5 < float(np.abs(logits).max()) <= 2.0


def test_other_layers_mix_values_of_the_first(shown):
    """With none of their own, where they look would not matter."""
    config = shown["ValueResidualConfig"](**SIZES)

    def changed(variables, part, factor):
        def scaled(path, leaf):
            others = "group_1" in str(path) and "qkv" in str(path)
            return leaf.at[..., part, :, :].multiply(factor) if others else leaf

        return jax.tree_util.tree_map_with_path(scaled, variables)

    without_values = changed(lq.init(config), 2, 0.0)
    pair = [lq.build(config).apply(v, np.arange(16)[None]) for v in (without_values, changed(without_values, 0, 3.0))]
    assert float(np.abs(pair[0] - pair[1]).max()) > 1e-2


def test_a_model_that_is_registered_anew_has_its_own_shapes(shown):
    """As in a notebook, where the cell that defines it is edited and run again."""
    config = shown["CappedConfig"](**SIZES)
    before = ARCHITECTURES["capped"]

    class Edited(shown["Capped"]):
        def setup(self):
            super().setup()
            self.more = self.param("more", lambda key: jax.numpy.zeros(3))

    assert "more" not in lq.models.abstract_variables(config)["params"]
    ARCHITECTURES["capped"] = before._replace(model_class=Edited)
    try:
        assert "more" in lq.models.abstract_variables(config)["params"]
    finally:
        ARCHITECTURES["capped"] = before
    assert "more" not in lq.models.abstract_variables(config)["params"]


def test_a_model_of_ones_own_has_no_place_in_transformers(shown, tmp_path):
    config = shown["CappedConfig"](**SIZES)
    lm = lq.LanguageModel(config, lq.build(config), {})
    with pytest.raises(BadInput, match=r"transformers has no model of the type 'capped', .*; lq.save keeps it"):
        lq.save_hf(lm, tmp_path / "exported")


def test_a_model_with_the_weights_of_a_published_one_is_exported_as_that(shown, tmp_path):
    """Whose fields it has besides those of its own."""
    config = shown["CappedConfig"](**SIZES, logit_cap=1e6)
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config))
    exported = lq.load(lq.save_hf(shown["as_gpt2"](lm), tmp_path / "exported"))
    assert exported.config == lq.GPT2Config(**SIZES)
    np.testing.assert_allclose(exported.logits([[1, 2, 3]]), lm.logits([[1, 2, 3]]), atol=1e-5)


def test_a_model_that_is_not_registered_is_told(shown):
    class Unknown(shown["CappedConfig"]):
        model_type = "unknown"

    with pytest.raises(BadInput, match="no model is registered for model_type 'unknown'; before it is built"):
        lq.init(Unknown(**SIZES))


def test_layers_are_looked_into(shown):
    config = lq.GPT2Config(**SIZES)
    model, variables = lq.build(config), lq.init(config)
    text, other = np.array([[3, 1, 4, 1, 5]]), np.array([[2, 7, 1, 8, 2]])
    plain, others = (shown["streams"](model, variables, tokens) for tokens in (text, other))
    assert plain.shape == (4, 1, 5, 16)
    np.testing.assert_allclose(shown["lens"](model, variables, plain)[-1], model.apply(variables, text), atol=1e-5)

    ablated = shown["streams"](model, variables, text, shown["without_head"](1, 0, 2))
    assert (ablated[:2] == plain[:2]).all()
    assert (ablated[2] != plain[2]).any()
    patched = shown["streams"](model, variables, text, shown["patched"](1, 2, others))
    assert (patched[1, :, 2] == others[1, :, 2]).all()
    assert (patched[:, :, :2] == plain[:, :, :2]).all()  # the past does not see it
    assert (patched[3, :, 4] != plain[3, :, 4]).any()
