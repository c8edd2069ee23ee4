"""What fine-tuning leaves behind, in transformers and PEFT: whole models, and adapters on their base."""

import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import linen as nn

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.lora import STAYS, TRAINS
from llmq_jax.models import ARCHITECTURES, Architecture, parameter_count
from llmq_jax.training.parts import whole
from tests.programs import ended
from tests.weights import draw_variables
from train.exports import export_commands
from train.instruct import Options
from train.what_trains import flops_of, prepared

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder of a tiny language model."""
    config = lq.Llama3Config(
        vocab_size=257,
        max_position_embeddings=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.1,
    )
    lm = LanguageModel(config, lq.build(config), lq.init(config, seed=1), ByteTokenizer())
    return lq.save_hf(lm, tmp_path_factory.mktemp("base") / "lm")


TINY = ("--steps=4", "--learning-rate=0.05", "--batch-size=2", "--sample-every=0", "--lora-rank=2", "--device=cpu")


@pytest.mark.exhaustive
def test_adapters_that_were_instructed(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("a", "b", "ab", "ba", "abc")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert ended("train.instruct", "--data=data.json", f"--init-from={base}", "--out=run", *TINY) == 0
    assert "training 928 of" in capsys.readouterr().out
    lm = lq.load("run")
    expected = lm.logits(TOKENS)
    assert np.abs(expected - lq.load(base).logits(TOKENS)).max() > 0.01

    assert ended("convert.to_hf", "run", "adapter", "--adapter", f"--base={base}") == 0
    assert "next: peft.PeftModel.from_pretrained(base" in capsys.readouterr().out
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert ended("convert.to_hf", "run", "whole") == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        for model in (theirs, whole):
            np.testing.assert_allclose(model(torch.tensor(TOKENS)).logits, expected, atol=1e-4)
    # The run is a model like any other, and goes on as one.
    assert len(lq.generate(lm, "a", max_new_tokens=3, sampler=Sampler(temperature=0.0)).text) == 1
    assert ended("train.instruct", "--data=data.json", "--init-from=run", "--out=on", *TINY[:-2], "--device=cpu") == 0
    assert ended("train.instruct", "--data=data.json", "--init-from=run", "--out=no", *TINY) == 2
    assert "--lora-rank has no effect on --init-from, which has adapters already" in capsys.readouterr().err

    assert ended("convert.to_hf", base, "none", "--adapter") == 2
    assert "this model has no adapters to write" in capsys.readouterr().err
    assert ended("convert.to_hf", "run", "none", "--base=x") == 2
    assert "--base has no effect without --adapter" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [("--train=lora", "--lora-targets=q_proj,v_proj"), ("--train=head",)])
def test_classifiers_of_which_a_part_was_trained(base, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{word} {i}", "label": word} for i in range(10) for word in ("ham", "spam")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = TINY if "lora" in options[0] else (*TINY[:-2], "--device=cpu")
    assert ended("train.classifier", "--data=data.jsonl", f"--init-from={base}", "--out=run", *tiny, *options) == 0
    lm = lq.load("run")
    tokens, lengths = np.where(np.arange(9) < np.array([[9], [4]]), TOKENS, 256), [9, 4]
    expected = lm.classify(tokens, lengths)
    assert ended("convert.to_hf", "run", "whole") == 0
    theirs = [transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()]
    assert theirs[0].config.id2label == {0: "ham", 1: "spam"}
    if "lora" in options[0]:
        assert ended("convert.to_hf", "run", "adapter", "--adapter", f"--base={base}") == 0
        adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2).eval()
        adapted.config.pad_token_id = 256
        theirs.append(adapted)
    with torch.no_grad():
        for model in theirs:
            found = model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 256)).logits
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train=all", "--lora-rank=4"), "--lora-rank has no effect without --train lora; leave it out"),
        (("--train=all", "--lora-rank=0"), "--lora-rank has no effect without --train lora; leave it out"),
        (("--lora-numbers=4",), "--lora-numbers has no effect without --lora-variant tinylora; leave it out"),
        (("--blocks=2",), "--blocks has no effect without --train blocks; leave it out"),
        (("--train=blocks", "--blocks=3"), "3 blocks cannot train: the model has 2"),
        (("--train=head",), "--train head: this model's head is its embedding; choose blocks, lora or all"),
        (("--lora-targets=q_prj",), "LoRA: 'q_prj' matches no matrix; did you mean q_proj?"),
        (("--lora-rank=99",), "--lora-rank 99 is above that of"),
        (("--lora-rank=0",), "--lora-rank is 0 and must be at least 1"),
        (("--lora-layers=0-7",), "LoRA: layer 2 does not exist; the model has layers 0 to 1"),
        (("--lora-layers=first",), "--lora-layers 'first' is no list of layers; write 0,1,2 or 20-29"),
        (("--lora-whole=lm_haed",), "--lora-whole lm_haed is no embedding or head of this model; choose from"),
        (("--lora-whole=lm_head", "--train=all"), "--lora-whole has no effect without --train lora; leave it out"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(base, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    config = lq.load(base).config
    lm = lq.load(base).replace(config=config)
    if "--train=head" in options:
        lm = tied(lm)
    lq.save(lm, "lm")
    rows = [{"prompt": "a", "completion": answer} for answer in "bcd"]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    given = ("--data=data.json", "--init-from=lm", "--out=run", "--steps=1", "--device=cpu")
    assert ended("train.instruct", *given, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_came_with_adapters_trains_on_or_is_told(base):
    lm, options = lq.load(base), Options(data="data.json", init_from="lm")
    variables = whole(prepared(lm, options).variables)
    variables["lora_fixed"]["whole"] = {"token_embedding": jnp.asarray(TRAINS), "lm_head": jnp.asarray(STAYS)}
    learner = prepared(lm.replace(variables=variables), options)
    assert learner.trainable == ("params", "lora") and learner.variables["params"].keys() == {"token_embedding"}
    told = "(lora, token_embedding); what came with the adapters, but not as modules_to_save, stays as it is: lm_head"
    assert learner.described.endswith(told)
    assert flops_of(options, learner, [8]) is None


def test_modules_that_the_loss_does_not_read_stay_as_they_are():
    """Weight decay would shrink what gets no gradient."""
    sizes = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = lq.DeepSeekV3Config(**sizes, num_nextn_predict_layers=1, first_k_dense_replace=1)
    lm = LanguageModel(config, lq.build(config), draw_variables(config))
    learner = prepared(lm, Options(data="data.json", init_from="lm", train="all"))
    assert learner.variables["frozen"].keys() == {"mtp"} and "mtp" not in learner.variables["params"]
    jax.tree.map(np.testing.assert_array_equal, whole(learner.variables), lm.variables)
    rest, everything = (parameter_count(tree) for tree in (learner.variables["params"], lm.params))
    assert learner.described.startswith(f"training {rest:,} of {everything:,} parameters (all but those of multi-token")


@pytest.mark.parametrize("given", [{"lora_rank": 4}, {"lora_dropout": 0.0}, {"lora_whole": "lm_head"}])
def test_adapters_that_are_there_take_no_options(base, given):
    lm, options = lq.load(base), Options(data="data.json", init_from="lm")
    adapted = lm.replace(variables=whole(prepared(lm, options).variables))
    assert prepared(adapted, options).trainable == ("lora",)
    with pytest.raises(BadInput, match=r"--lora-\w+ has no effect on --init-from, which has adapters already"):
        prepared(adapted, replace(options, **given))


def tied(lm):
    """The same with the embedding for a head."""
    params = {name: leaf for name, leaf in lm.params.items() if name != "lm_head"}
    config = lq.models.override(lm.config, tie_word_embeddings=True)
    return lm.replace(config=config, variables={"params": params})


@dataclass(frozen=True)
class Scaled(lq.Llama3Config):
    my_scale: float | None = None


class ScaledLlama(lq.Llama3):
    def setup(self):
        super().setup()
        self.scale = self.param("my_scale", nn.initializers.ones, ())


def test_an_export_is_not_promised_of_what_transformers_lacks(monkeypatch):
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert export_commands("a run", lq.Llama3Config(**sizes)) == ["python -m convert.to_hf 'a run' 'a run-hf'"]
    assert export_commands("run", Scaled(**sizes))
    assert not export_commands("run", Scaled(**sizes, my_scale=1.0))  # a field
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture(Scaled, ScaledLlama))
    assert not export_commands("run", Scaled(**sizes, intermediate_size=16))  # a weight
