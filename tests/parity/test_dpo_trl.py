"""DPO against TRL's DPOTrainer: tokens, loss, metrics and gradients of one batch."""

import json
import logging
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.interop import to_state_dict
from llmq_jax.objectives.preference import DPO, dpo_loss, pair_logprobs
from tests.parity.references import PAIRS, assert_same_gradients, numpy_gradients, randomise

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

CONTEXT = 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(policy, reference) of transformers with random weights."""
    tokenizer = ByteTokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 1,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.end_of_text,
        bos_token_id=tokenizer.end_of_text,
    )
    folders = []
    for seed, name in enumerate(("policy", "reference")):
        model = transformers.LlamaForCausalLM(config)
        randomise(model, seed)
        folders.append(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[-1])
        tokenizer.save(folders[-1])
        file = folders[-1] / "tokenizer_config.json"
        named = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
        file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folders


def their_trainer(folders, tmp_path, **arguments):
    policy, reference = folders
    return trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(policy),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(reference),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_length=CONTEXT,
            per_device_train_batch_size=len(PAIRS),
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            bf16=False,
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=transformers.AutoTokenizer.from_pretrained(policy),
    )


@pytest.fixture(scope="module")
def ours(folders):
    """(the policy, a function that gives a batch's log-probabilities by the reference), which all cases share."""
    policy, reference = map(lq.load, folders)
    return policy, jax.jit(lambda batch: pair_logprobs(reference.model, reference.variables, batch)[0])


def our_batch(theirs, by_reference):
    """TRL's batch, chosen rows before rejected ones, as ours."""

    def paired(name):
        return np.stack(np.split(theirs[name].numpy(), 2), axis=1)

    batch = {
        "tokens": paired("input_ids").astype(np.int32),
        "lengths": paired("attention_mask").sum(-1).astype(np.int32),
        "response_mask": paired("completion_mask").astype(np.float32),
        "mask": np.ones(len(PAIRS), np.float32),
    }
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    return batch | {"reference_logprobs": by_reference(batch)}


CASES = {
    "sigmoid": ({"loss_type": ["sigmoid"]}, {}),
    "sigmoid, sharper": ({"loss_type": ["sigmoid"], "beta": 0.7}, {"beta": 0.7}),
    "normalised": ({"loss_type": ["sigmoid_norm"], "beta": 0.7}, {"beta": 0.7, "normalise": True}),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.4}, {"loss_type": "ipo", "beta": 0.4}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "robust": (
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.2},
    ),
}


# Another temperature of the same loss, which the normalised one has too.
MORE = {"sigmoid, sharper"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.exhaustive] if case in MORE else []) for case in CASES]
)
def test_loss_metrics_and_gradients(folders, ours, tmp_path, case, caplog):
    caplog.set_level(logging.ERROR)
    theirs, options = CASES[case]
    trainer = their_trainer(folders, tmp_path, **theirs)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    policy, by_reference = ours
    batch = our_batch(inputs, by_reference)
    objective = DPO(policy.model, **options)

    def our_loss(params):
        value, metrics, _ = objective.loss({"params": params}, batch, objective.weights(batch))
        return value, metrics

    (value, metrics), gradients = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(policy.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name, found in metrics.items():
        np.testing.assert_allclose(found, logged[name], rtol=1e-4, atol=1e-5, err_msg=name)
    gradients = to_state_dict({"params": gradients}, policy.config)
    assert_same_gradients(gradients, numpy_gradients(trainer.model, gradients))


@pytest.mark.filterwarnings("ignore")
def test_conservative_dpo(folders, ours, tmp_path, caplog):
    """TRL's sigmoid ignores label smoothing; its "aot" of one pair is cDPO."""
    caplog.set_level(logging.ERROR)
    trainer = their_trainer(folders, tmp_path, loss_type=["aot"], label_smoothing=0.2, beta=0.3)
    policy, by_reference = ours
    objective = DPO(policy.model, beta=0.3, label_smoothing=0.2)
    rows = list(trainer.train_dataset)
    losses = []
    with torch.no_grad():
        for row in rows:
            losses.append(trainer.compute_loss(trainer.model, trainer.data_collator([row])).item())
    batch = our_batch(trainer.data_collator(rows), by_reference)

    @jax.jit
    def both(variables, batch):
        objectives = objective, DPO(policy.model, beta=0.3)
        return [which.loss(variables, batch, which.weights(batch))[0] for which in objectives]

    value, plain = both(policy.variables, batch)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
    assert abs(float(value) - float(plain)) > 0.01


FAR = [sign * gap for gap in (100.0, 1e4, 1e9) for sign in (1, -1)]


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ("sigmoid", {}),
        ("robust", {"loss_type": "robust", "label_smoothing": 0.2}),
        ("hinge", {"loss_type": "hinge"}),
        ("ipo", {"loss_type": "ipo"}),
        ("aot", {"label_smoothing": 0.2}),  # of one pair: conservative DPO
    ],
)
def test_a_policy_that_has_moved_far_away(theirs, options):
    """The trainer's own code, given log-ratios of up to a milliard in place of a model's: nothing overflows."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def their_loss(logprobs, references):
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
            loss_types=[theirs],
            loss_weights=[1.0],
            beta=0.1,
            label_smoothing=options.get("label_smoothing", 0.0),
            f_divergence_type="reverse_kl",
            precompute_ref_logps=True,
            ld_alpha=None,
            aux_loss_enabled=False,
            use_weighting=False,
            _total_train_tokens=0,
            _tp_size=1,
            _metrics={"train": defaultdict(list)},
        )
        zeros = torch.zeros(2, 1)
        outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        inputs = {
            "input_ids": torch.zeros(2, 2, dtype=torch.long),
            "attention_mask": torch.ones(2, 2),
            "completion_mask": torch.tensor([[0, 1], [0, 1]]),
            "ref_chosen_logps": references[:1],
            "ref_rejected_logps": references[1:],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)

    @jax.jit
    @jax.vmap
    def found(policy, reference):
        return jax.value_and_grad(lambda x: dpo_loss(*x[:, None], *reference[:, None], **options)[0][0])(policy)

    references = [[-1 - gap, -1.0] for gap in FAR] + [[-1.0, -1 - gap] for gap in FAR]
    losses, gradients = found(jnp.full((len(references), 2), -1.0), jnp.asarray(references))
    for reference, loss, gradient in zip(references, losses, gradients, strict=True):
        logprobs = torch.full((2, 1), -1.0, requires_grad=True)
        expected = their_loss(logprobs, torch.tensor(reference))
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
        np.testing.assert_allclose(gradient, logprobs.grad[:, 0], rtol=1e-4, atol=1e-9)
