"""SimPO as docs/dpo.md shows it: loss, metrics and gradients are those of TRL's CPOTrainer, and its script runs."""

import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.interop import to_state_dict
from llmq_jax.training.metrics import read_metrics
from tests.documented_disk import LLAMA, chat_tokenizer
from tests.parity.references import PAIRS, assert_same_gradients, numpy_gradients, randomise

PAGE = (Path(__file__).parents[2] / "docs" / "dpo.md").read_text()
MARK = "<!-- executed by tests/parity/test_simpo_trl.py -->"
OBJECTIVE, RUN = re.findall(rf"{re.escape(MARK)}\n```python\n(.*?)```", PAGE, re.DOTALL)
DOCUMENTED: dict = {}
exec(compile(OBJECTIVE, "docs/dpo.md", "exec"), DOCUMENTED)
CONTEXT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of transformers with random weights."""
    tokenizer = ByteTokenizer()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    sizes = {**LLAMA, "hidden_size": 24, "max_position_embeddings": CONTEXT}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes, **ends))
    randomise(model, 0)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


def their_trainer(folder, tmp_path, **arguments):
    datasets = pytest.importorskip("datasets")
    cpo = pytest.importorskip("trl.experimental.cpo")
    config = cpo.CPOConfig(
        output_dir=str(tmp_path),
        loss_type="simpo",
        cpo_alpha=0.0,  # without CPO's own likelihood of the chosen answer
        max_length=CONTEXT,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **arguments,
    )
    return cpo.CPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


def our_batch(theirs):
    """TRL's batch as ours, and one empty pair, which does not count."""

    def paired(name, padding):
        sides = [theirs[f"{side}_{name}"].numpy() for side in ("chosen", "rejected")]
        width = max(side.shape[1] for side in sides)
        filled = [np.pad(side, ((0, 1), (0, width - side.shape[1])), constant_values=padding) for side in sides]
        empty = np.stack(filled, axis=1)
        empty[-1] = padding
        return empty

    batch = {
        "tokens": paired("input_ids", 0).astype(np.int32),
        "lengths": paired("attention_mask", 0).sum(-1).astype(np.int32),
        "response_mask": (paired("labels", -100) != -100).astype(np.float32),
        "mask": (np.arange(len(PAIRS) + 1) < len(PAIRS)).astype(np.float32),
    }
    return {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), pytest.param(0.7, 0.0, marks=pytest.mark.exhaustive)])
def test_loss_metrics_and_gradients(folder, tmp_path, caplog, beta, gamma):
    caplog.set_level(logging.ERROR)
    trainer = their_trainer(folder, tmp_path, beta=beta, simpo_gamma=gamma)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss, theirs = trainer.get_batch_loss_metrics(trainer.model, inputs)
    loss.backward()

    policy, batch = lq.load(folder), our_batch(inputs)
    objective = DOCUMENTED["SimPO"](policy.model, beta, gamma)

    def our_loss(params):
        value, metrics, _ = objective.loss({"params": params}, batch, objective.weights(batch))
        return value, metrics

    (value, metrics), gradients = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(policy.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    for name, found in metrics.items():
        np.testing.assert_allclose(found, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    gradients = to_state_dict({"params": gradients}, policy.config)
    assert_same_gradients(gradients, numpy_gradients(trainer.model, gradients))


def test_the_script_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    config = lq.Llama3Config(vocab_size=tokenizer.vocab_size, **LLAMA)
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.vocab_size - 1,))
    lm = lq.LanguageModel(config, lq.build(config), lq.init(config, seed=1), tokenizer, ends)
    (tmp_path / "HuggingFaceTB").mkdir()
    lq.save_hf(lm, tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    pairs = [{"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": f"{word}?"} for word in "abcdefghijkl"]
    (tmp_path / "prefs.json").write_text(json.dumps(pairs))

    code = RUN.replace("SimPO(lm.model)", "SimPO(lm.model, beta=BETA)")
    # The same lines on a smaller scale.
    for large, small in (("steps=200", "steps=30"), ("warmup_steps=20", "warmup_steps=2"), ("peak=5e-5", "peak=1e-2")):
        assert large in code
        code = code.replace(large, small)
    program = compile(code, "docs/dpo.md", "exec")
    exec(program, {**DOCUMENTED, "BETA": 2.0})
    assert "finished: 30 steps" in capsys.readouterr().out
    records = read_metrics(tmp_path / "runs" / "simpo" / "metrics.jsonl")
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert len(validation) == 10 and validation[-1] < validation[0]
    assert records[-1]["validation_rewards/accuracies"] == 1.0
    assert (tmp_path / "runs" / "simpo" / "report.html").is_file()
    with pytest.raises(lq.BadInput, match="beta"):
        exec(program, {**DOCUMENTED, "BETA": 1.0})
