import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llmq_jax as lq
import train.dpo
from llmq_jax.data import ByteTokenizer
from llmq_jax.data.prompt_templates import style_of
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import abstract_variables
from llmq_jax.training.metrics import TIME_FIELDS, read_metrics

SIZES = {
    "max_position_embeddings": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
}
EXPERTS = {"num_experts": 4, "selection_bias": True, "balance": {"bias_rate": 0.1}}
WORDS = ["ab", "ba", "aa", "bb", "abab", "a", "b", "bab", "aba", "bba", "aab", "abb"]


def make_model(folder, seed=0, **fields):
    tokenizer = ByteTokenizer()
    config = lq.Llama3Config(**{"vocab_size": tokenizer.vocab_size, **SIZES, **fields})
    ends = GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=seed), tokenizer, ends), folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name in a command: path}"""
    folder = tmp_path_factory.mktemp("files")
    pairs = [{"prompt": f"say {word}:", "chosen": f" {word}.", "rejected": f" {word}?"} for word in WORDS]
    path = folder / "pairs.json"
    path.write_text(json.dumps([*pairs, {"prompt": "x", "chosen": "same", "rejected": "same"}]))
    return {
        "MODEL": make_model(folder / "model"),
        "OTHER": make_model(folder / "other", seed=5),
        "WIDE": make_model(folder / "wide", vocab_size=300),
        "EXPERTS": make_model(folder / "experts", experts=EXPERTS),
        "PAIRS": path,
    }


TINY = ("--data=PAIRS", "--init-from=MODEL", "--steps=8", "--batch-size=4", "--log-every=1", "--out=run")


@pytest.fixture
def dpo(program, monkeypatch, tmp_path, files):
    """`dpo(*options)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*options, tiny=TINY):
        arguments = []
        for option in (*tiny, *options):
            name, _, value = option.partition("=")
            arguments.append(f"{name}={files.get(value, value)}" if value else option)
        return program("train.dpo", *arguments)

    return call


def test_what_is_preferred_becomes_likelier(dpo, tmp_path, drawn):
    options = ("--steps=30", "--sample-every=10", "--checkpoint-every=20")
    code, output, _ = dpo("--train=all", "--learning-rate=3e-3", *options)
    assert code == 0, output
    assert "12 pairs in" in output
    assert "1 of two equal answers left out" in output
    assert "\nstep 0: validation loss" in output and ", rewards/accuracies 0.5000" in output
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (records[0]["step"], records[0]["validation_rewards/margins"]) == (0, 0.0)
    first, *_, last = (record for record in records if "loss" in record)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5
    assert last["rewards/margins"] > 0.05
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "grad_norm"} <= last.keys()
    held_out = [record for record in records if "validation_loss" in record][-1]
    assert held_out["validation_rewards/accuracies"] == 1.0
    assert "KL to the reference on 1 sampled answer: " in output
    assert float(output.split("sampled answer: ")[1].split()[0]) != 0  # of either sign: an estimate by few answers
    assert lq.load(tmp_path / "run").tokenizer is not None


def test_a_run_on_alpacas_records_is_asked_as_it_learned(dpo, tmp_path):
    records = [{"instruction": f"Say {word}.", "input": "", "chosen": word, "rejected": "no"} for word in WORDS]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    code, output, errors = dpo("--data=alpaca.json", "--steps=1", "--sample-every=0", "--evaluate-every=0")
    assert (code, errors) == (0, "") and "(template: alpaca)" in output and "\n  llmq chat run\n" in output
    assert style_of(lq.load("run").tokenizer.chat_template) == "alpaca"


OWN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}A: {{ m['content'] }}"
    "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def test_a_chat_template_for_a_model_that_has_none(dpo, tmp_path):
    (tmp_path / "own.jinja").write_text(OWN)
    said = [{"role": "user", "content": "Hi"}]
    pairs = [
        {side: [*said, {"role": "assistant", "content": f"{side} {word}"}] for side in ("chosen", "rejected")}
        for word in WORDS
    ]
    for i, pair in enumerate(pairs):
        for side in pair:
            pair[side] = [{"role": "user", "content": f"say {i}"}, *pair[side][1:]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ("--data=chats.jsonl", "--chat-template=own.jinja", "--steps=2", "--sample-every=0")
    code, output, errors = dpo(*given)
    assert (code, errors) == (0, "") and "(template: chat)" in output and "will not learn to stop" not in output
    assert lq.load(tmp_path / "run").tokenizer.chat_template.source == OWN
    assert "is finished already" in dpo(*given)[1]
    _, output, _ = dpo("--init-from=run", "--steps=1", "--sample-every=0", "--evaluate-every=0", "--out=texts")
    assert "(template: plain)" in output and "\n  llmq chat texts\n" in output  # though it learns from texts
    (tmp_path / "own.jinja").write_text(OWN + "{# the same #}")
    code, _, errors = dpo(*given)
    assert code == 2 and "other options: chat_template_sha256 " in errors


def test_the_reference_attends_as_the_policy(dpo, files, monkeypatch):
    """Where a kernel fails, --attention names another for both."""
    from llmq_jax.models.decoder import Decoder

    abstract_variables(lq.load(files["MODEL"]).config)  # traces a forward pass, once, for its shapes alone
    seen, forward = set(), Decoder.forward

    def watched(model, *arguments, **named):
        seen.add(model.attention)
        return forward(model, *arguments, **named)

    monkeypatch.setattr(Decoder, "forward", watched)
    options = ("--attention=masked", "--reference=OTHER", "--steps=1", "--sample-every=0")
    assert dpo(*options, "--train=all")[0] == 0
    assert seen == {"masked"}
    saved = Path("run/reference_logprobs.npz")
    saved.write_bytes(saved.read_bytes()[:-100])
    code, _, errors = dpo(*options, "--train=all")
    assert code == 2 and "reference_logprobs.npz is damaged (" in errors and errors.count("\n") == 1
    # As a run leaves its folder that failed before its first step: what it asked may be of other pairs.
    shutil.rmtree("run/checkpoints")
    for file in ("finished.json", "metrics.jsonl", "samples.txt"):
        Path("run", file).unlink(missing_ok=True)
    code, output, _ = dpo(*options, "--train=all", "--split-seed=3")
    assert code == 0 and "begun anew" in output and "asking the reference" in output


def test_the_reference_is_asked_for_no_pair_that_the_run_does_not_reach(dpo):
    """A first look at a large file, by few --steps, does not wait for all of it."""
    quick = ("--sample-every=0", "--evaluate-every=0", "--lora-rank=2")
    code, output, _ = dpo("--steps=2", *quick)  # of 3 an epoch
    some = dict(np.load("run/reference_logprobs.npz"))
    asked = np.isfinite(some["training"]).all(axis=1).sum()
    assert some["training"].shape == (11, 2) and asked in (7, 8)  # one of the batches of 4 has 3
    assert code == 0 and f"asking the reference for both answers of {asked + 1} pairs\n" in output
    assert dpo("--steps=4", *quick, "--out=all")[0] == 0
    every = dict(np.load("all/reference_logprobs.npz"))
    there = np.isfinite(some["training"])
    np.testing.assert_allclose(some["training"][there], every["training"][there], rtol=1e-5)
    assert np.isfinite(every["training"]).all() and np.isfinite(some["validation"]).all()


def test_the_distance_to_a_reference_of_a_shorter_context(dpo, tmp_path, monkeypatch):
    """Only prompts that leave room for an answer in both contexts are asked, and no more of them rendered than that."""
    from train import dpo as recipe

    rendered, prompts_to_ask = [], recipe.prompts_to_ask

    def watched(*arguments):
        for prompt, asked in prompts_to_ask(*arguments):
            rendered.append(prompt)
            yield prompt, asked

    monkeypatch.setattr(recipe, "prompts_to_ask", watched)
    monkeypatch.setattr(recipe, "ANSWERS", 2)
    make_model(tmp_path / "short", max_position_embeddings=80)
    for name, count in (("training", 4), ("validation", 5)):
        pairs = [
            {"prompt": f"{name} {i} " + "x" * (130 if i == 0 else 1), "chosen": "a", "rejected": "b"}
            for i in range(count)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(pairs))
    data = ("--data=training.json", "--validation-data=validation.json", "--reference=short", "--context=80")
    code, output, _ = dpo(*data, "--steps=1", "--train=all", "--sample-every=0")
    assert code == 0 and "KL to the reference on 2 sampled answers" in output
    assert [len(tokens) > 80 for tokens in rendered] == [True, False, False]


@pytest.mark.exhaustive
def test_runs_resume_from_the_same_reference(dpo, tmp_path, files):
    """A killed run goes on bit for bit; the reference is not asked again, though its name stands for another model by
    now. A run that begins anew asks that one."""
    shutil.copytree(files["OTHER"], "named")
    options = (
        "--checkpoint-every=4",
        "--reference=named",
        "--label-smoothing=0.1",
        "--lora-rank=2",
        "--sample-every=0",
    )
    assert dpo(*options)[0] == 0
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000008")
    shutil.rmtree("named")
    shutil.copytree(files["MODEL"], "named")
    code, output, _ = dpo(*options)
    assert code == 0
    assert "resuming run from step" in output
    assert "asking the reference" not in output
    assert "KL to the reference: not measured, since named holds other weights than when this run began" in output

    def without_times(text):
        return [
            {name: value for name, value in json.loads(line).items() if name not in TIME_FIELDS}
            for line in text.splitlines()
        ]

    again = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert without_times(again) == without_times(whole)
    first = next(record for record in map(json.loads, whole.splitlines()) if "loss" in record)
    assert first["rewards/margins"] != 0  # the reference is another model
    (tmp_path / "run" / "finished.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    code, output, _ = dpo(*options)
    assert code == 0
    assert "named holds other weights than when this run began; it is asked anew\nasking the reference" in output
    assert "KL to the reference on" in output
    first = next(record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)  # now it is the policy's own start


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("EXPERTS", ("--train=blocks", "--blocks=1")),  # with a bias for selection, which moves
        ("MODEL", ("--train=lora", "--lora-layers=1", "--seed=4294967295")),
        ("MODEL", ("--train=lora", "--lora-layers=1", "--lora-whole=embed_tokens,lm_head")),
    ],
)
def test_a_part_may_train(dpo, tmp_path, files, monkeypatch, model, part):
    """The reference is the model as it was, of which a part was kept: nothing is loaded again to measure how far the
    policy went."""
    asked = []

    def distance(options, policy, reference, *rest):
        asked.append(reference.variables)
        return measured(options, policy, reference, *rest)

    measured = train.dpo.distance
    monkeypatch.setattr(train.dpo, "distance", distance)
    code, output, _ = dpo("--learning-rate=1e-2", f"--init-from={model}", *part)
    assert code == 0
    policy, reference = lq.load(tmp_path / "run"), lq.load(files[model])
    for name, tree in reference.variables.items():
        jax.tree.map(np.testing.assert_array_equal, asked[0][name], tree)
    assert "KL to the reference on 1 sampled answer: " in output
    told = float(output.split("sampled answer: ")[1].split()[0])
    assert told != 0
    below = [jax.tree.map(lambda leaf: leaf[0], lm.params["group_0"]) for lm in (policy, reference)]
    jax.tree.map(np.testing.assert_array_equal, *below)
    for name in ("token_embedding", "lm_head") if "--lora-whole" in part[-1] else ():
        assert all(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, policy.params[name], reference.params[name]))))


@pytest.mark.parametrize("reference", [[], ["--reference=OTHER"]])
def test_layers_that_are_cut_are_in_memory_once_and_no_reference(dpo, beside_state, reference):
    dpo("--train=blocks", *reference)
    assert len(beside_state) == 1 and beside_state[0] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-smoothing=0.5"], "--label-smoothing is 0.5 and must be at least 0 and below 0.5"),
        (["--label-smoothing=0.1", "--loss=hinge"], "--label-smoothing has no effect with --loss hinge; leave it out"),
        (["--normalise", "--loss=ipo"], "--normalise has no effect with --loss ipo"),
        (["--lora-dropout=0.1"], "--lora-dropout has no effect in DPO"),
        (["--beta=0"], "--beta is 0.0 and must be positive"),
        (["--reference=WIDE"], "has a vocabulary of 300 ids and the model one of 257; take one of the same"),
        (["--evaluate-batches=0"], "--evaluate-batches is 0 and must be at least 1"),
        (["--epochs=2"], "--epochs has no effect beside --steps; leave it out"),
        (["--template=chat"], "has no chat template, so it cannot converse; give one with --chat-template FILE, or"),
        (["--template=plain", "--chat-template=PAIRS"], "--chat-template has no effect with --template plain; leave"),
        (["--chat-template=none.jinja"], "none.jinja cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line(dpo, tmp_path, options, message):
    code, _, errors = dpo(*options)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_with_splits(dpo, at_first_step, files):
    """Its validation files are held out, and prompts that are in them too are not learned."""
    pairs = json.loads(files["PAIRS"].read_text())
    Path("data", "test").mkdir(parents=True)
    for name, part in {"train.json": pairs[:9], "dev.json": pairs[8:11], "test/a.json": pairs[11:]}.items():
        Path("data", name).write_text(json.dumps(part))
    _, out, err = dpo("--data=data", "--train=all")
    assert err == at_first_step and "8 pairs to learn, 3 held out" in out
    assert "data: train.json to learn, dev.json held out, test/a.json left out\n" in out
    assert "9 pairs in data (train)\nnot learned, since their prompts are held out too: 1 pair\n" in out
    _, _, err = dpo("--data=data/train.json", "--validation-data=data/dev.json", "--train=all")
    assert err == at_first_step
