"""The recipe on rewards that a tiny model can earn: it learns, tells, resumes bit for bit, refuses."""

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llmq_jax as lq
import train.grpo
from llmq_jax.data import ByteTokenizer
from llmq_jax.data.prompts import Prompt
from llmq_jax.errors import BadInput
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.training import Checkpoints
from llmq_jax.training.metrics import TIME_FIELDS, read_metrics
from llmq_jax.training.rollout_scores import Scores
from llmq_jax.training.rollouts import Rollout
from train.grpo import Options, resolved, shared_by, validated
from train.rewards import replayed

SIZES = {
    "max_position_embeddings": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "initializer_range": 0.1,
}
# Of another architecture, which reads fewer tokens than the policy's rows are padded to.
NARROW = lq.GPT2Config(
    vocab_size=257, max_position_embeddings=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
)
REWARDS = """
def small(prompts, completions, **_):
    return [sum(byte < 128 for byte in text.encode()) / max(len(text.encode()), 1) for text in completions]

def expected(prompts, completions, answer, **_):
    return [float(number in text) for number, text in zip(answer, completions)]

def equal(prompts, completions, **_):
    return [1.0] * len(completions)

def broken(prompts, completions, **_):
    raise RuntimeError("no such\\nlab")

def short(prompts, completions, **_):
    return [1.0]

def infinite(prompts, completions, **_):
    return [float("inf")] * len(completions)
"""


@cache
def initial(config, seed):
    """What models of the same weights share: each initialisation is a program to compile."""
    return lq.init(config, seed=seed)


def save_model(folder, seed=1, labels=None, config=None, **fields):
    tokenizer = ByteTokenizer()
    config = config or lq.Llama3Config(**{"vocab_size": tokenizer.vocab_size, **SIZES})
    variables = initial(config, seed)
    config = lq.models.override(config, **fields)
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text, *range(0, 128, 16)))
    lm = LanguageModel(config, lq.build(config), variables, tokenizer, ends)
    if labels is not None:  # as train.reward writes it: rewards are read from the token before the end of text
        lm = with_classifier(lm, labels, seed=seed)
        lm = lm.replace(generation=ends.replace(pad_token_id=tokenizer.end_of_text))
    lq.save(lm, folder)
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name in a command: path}"""
    folder = tmp_path_factory.mktemp("files")
    (folder / "rewards.py").write_text(REWARDS)
    pairs = [{"prompt": f"{i}:", "chosen": f" {i} yes", "rejected": f" no {i}"} for i in range(6)]
    return {
        "MODEL": save_model(folder / "model"),
        "JUDGED": save_model(folder / "judged", labels=["reward"]),
        "WIDE": save_model(folder / "wide", labels=["reward"], config=lq.models.override(NARROW, vocab_size=300)),
        "SHORT": save_model(folder / "short", labels=["reward"], max_position_embeddings=8),
        "NARROW": save_model(folder / "narrow", seed=4, labels=["reward"], config=NARROW),
        "SPAM": save_model(folder / "spam", labels=["ham", "spam"]),
        "PAIRS": write(folder / "pairs.jsonl", pairs),
        "DATA": write(folder / "prompts.jsonl", [{"prompt": f"say {i}:", "answer": str(i)} for i in range(10)]),
        "EMPTY": write(folder / "empty.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": " ", "answer": "1"}]),
        "BARE": write(folder / "bare.jsonl", [{"prompt": f"say {i}:", "solution": str(i)} for i in range(4)]),
        "ONE": write(folder / "one.jsonl", [{"prompt": "a", "answer": "1"}]),
        "LONG": write(folder / "long.jsonl", [{"prompt": "abc" * 10, "answer": "1"}] * 2),
        "RW": folder / "rewards.py",
    }


TINY = {
    "--data": "DATA",
    "--init-from": "MODEL",
    "--out": "run",
    "--reward": "RW:small",
    "--train": "all",
    "--learning-rate": "1e-2",
    "--prompts-per-step": "2",
    "--group-size": "4",
    "--max-new-tokens": "5",
    "--steps": "4",
    "--sample-every": "0",
    "--checkpoint-every": "20",
    "--device": "cpu",
}


@pytest.fixture
def grpo(program, monkeypatch, tmp_path, files):
    """`grpo(option=value)` -> (exit code, stdout, stderr) of a tiny run, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def named(value):
        for name, path in files.items():
            value = value.replace(name, str(path))
        return value

    def call(**options):
        given = TINY | {"--" + name.replace("_", "-"): value for name, value in options.items()}
        arguments = [
            name if value is True else f"{name}={named(str(value))}"
            for name, value in given.items()
            if value is not None
        ]
        return program("train.grpo", *arguments)

    return call


def records():
    return read_metrics(Path("run/metrics.jsonl"))


def without_times():
    return [{name: value for name, value in record.items() if name not in TIME_FIELDS} for record in records()]


def test_what_is_rewarded_becomes_likelier(grpo, drawn):
    options = {"group_size": 8, "prompts_per_step": 4, "learning_rate": 2e-2}
    options |= {"steps": 20, "sample_every": 10, "evaluate_every": 10}
    code, out, err = grpo(**options)
    assert (code, err) == (0, "")
    assert "9 prompts to learn from, 1 held out; 4 prompts x 8 answers = 32 rows a step" in out
    assert "step 0: validation reward" in out
    steps = [record for record in records() if "reward" in record]
    assert len(steps) == 20
    rewards = [record["reward"] for record in steps]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert {
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/small/mean",
        "rewards/small/std",
        "entropy",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "rollout_seconds",
        "scoring_seconds",
        "update_seconds",
    } <= steps[0].keys()
    assert "kl" not in steps[0]
    assert steps[0]["rewards/small/mean"] == steps[0]["reward"]
    # The ratio is 1 in the only update on its answers: nothing is clipped, and the advantages cancel.
    assert abs(steps[0]["loss"]) < 1e-5 < steps[0]["grad_norm"]
    assert all(record["clip_ratio/region_mean"] == 0 for record in steps)
    held_out = [record for record in records() if "validation_reward" in record]
    assert [record["step"] for record in held_out] == [0, 10, 20]
    assert held_out[0].keys() >= {"validation_rewards/small/mean", "validation_completions/mean_length"}
    samples = Path("run/samples.txt").read_text()
    assert samples.count("-> reward ") == 2 * 4
    assert "(small " in samples and "advantage +" in samples and "advantage -" in samples and "say " in samples
    assert Path("run/curves.png").stat().st_size > 10_000 and not Path("run/losses.png").exists()
    page = Path("run/report.html").read_text()
    assert "<h2>What it learned</h2>\n<img" in page
    assert "<th>validation reward</th>" in page
    assert f"<td>20</td><td>{held_out[2]['validation_reward']:.4f}</td>" in page
    assert lq.load("run").tokenizer is not None
    # The same command again finds it finished.
    again = grpo(**options)[1]
    assert "is finished already" in again
    for said in (out, again):  # a loss of about 0 would tell nothing
        assert f"\nreward {rewards[-1]:.4f}\n" in said and "training loss" not in said


def stopped_at(step):
    """As a kill leaves a run: no end, and no checkpoint after this step."""
    Path("run/finished.json").unlink()
    for folder in Path("run/checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)


@pytest.fixture
def measured(monkeypatch):
    """`measured(*rewards)`: what is found of the prompts held out, time after time."""

    def measured(*rewards):
        found = iter(rewards)
        monkeypatch.setattr("train.grpo.validated", lambda *_: {"reward": next(found)})

    return measured


def test_the_checkpoint_of_highest_validation_reward_is_kept(grpo, measured):
    options = {"evaluate_every": 1, "checkpoint_every": 4, "keep_last": 1}
    measured(0.1, 0.2, 0.9, 0.9, 0.3)
    code, out, err = grpo(**options)
    assert (code, err) == (0, "")
    assert "\nvalidation reward 0.3000 (best 0.9000 at step 2)\n" in out
    checkpoints = Checkpoints("run/checkpoints")
    assert checkpoints.steps() == [2, 4]
    finished = json.loads(Path("run/finished.json").read_text())
    assert (finished["best_step"], finished["validation_loss"]) == (2, None)
    # What was the best before a kill is still what others must beat.
    stopped_at(2)
    measured(0.8, 0.85)
    code, out, err = grpo(**options)
    assert (code, err) == (0, "")
    assert "resuming run from step 2" in out and "\nvalidation reward 0.8500 (best 0.9000 at step 2)\n" in out
    assert checkpoints.steps() == [2, 4]
    # A kill may also come after the last checkpoint, when no step is left to do.
    told = next(line for line in out.splitlines() if line.startswith("reward "))
    stopped_at(4)
    code, out, err = grpo(**options)
    assert (code, err) == (0, "") and "resuming run from step 4" in out
    assert f"\n{told}\n" in out and "training loss" not in out


def test_validation_is_the_mean_over_greedy_answers_to_what_is_held_out(monkeypatch):
    """Of each prompt once, though batches are filled up, and over those that a function rewards."""
    asked = []

    def greedy(policy, prompts, *, group_size, sampler, seeds, **_):
        asked.append((len(prompts), group_size, sampler.temperature))
        count = len(prompts)
        lengths, ones = np.full(count, 3, np.int32), np.ones((count, 2), np.float32)
        return Rollout(list(prompts), 1, ones, lengths, lengths - 2, ones, ones, ones[:, 0] > 0, [""] * count)

    def score(answers):
        rewards = np.array([float(prompt.text) for prompt in answers.prompts], np.float32)
        return Scores(rewards, {"even": np.where(rewards % 2, np.nan, rewards), "none": np.full_like(rewards, np.nan)})

    monkeypatch.setattr("llmq_jax.training.rollouts.roll_out", greedy)
    loop = SimpleNamespace(policy=lambda variables: variables, max_new_tokens=2, score=score)
    prompts = [Prompt("row", str(number), [1], {}) for number in range(5)]
    found = validated(loop, None, prompts, 3)
    assert asked == [(3, 1, 0.0)] * 2
    assert found == {"reward": 2.0, "rewards/even/mean": 2.0, "completions/mean_length": 2.0}


def test_a_run_whose_reward_rises_no_more_stops_early(grpo, measured):
    options = {"evaluate_every": 1, "patience": 1}
    measured(0.1, 0.2, 0.9, 0.9, 1.0)
    code, out, err = grpo(**options)
    assert (code, err) == (0, "")
    stopped = next(line for line in out.splitlines() if line.startswith("stopped early"))
    assert stopped.startswith("stopped early after step 3: 1 evaluation without a new best")
    assert stopped.endswith("best: validation reward 0.9000 at step 2")
    assert json.loads(Path("run/finished.json").read_text())["step"] == 3
    assert Checkpoints("run/checkpoints").steps() == [1, 2, 3]


RESUMED = {
    "a reference that moves": {
        "beta": 0.1,
        "steps_per_iteration": 2,
        "iterations": 2,
        "reward": "RW:small,RW:expected",
    },
    "adapters": {"beta": 0.1, "train": "lora", "lora_rank": 2, "reference": "start", "dynamic_sampling": True},
    "adapters and an embedding": {
        "beta": 0.1,
        "train": "lora",
        "lora_rank": 2,
        "lora_whole": "token_embedding",
        "reference": "start",
    },
    "the last block": {"beta": 0.1, "train": "blocks", "blocks": 1, "reference": "start"},
    "a reward model that learns": {
        "reward": "NARROW",
        "judge": "RW:small",
        "replay_data": "PAIRS",
        "steps_per_iteration": 2,
        "reward_learning_rate": 0.01,
        "beta": 0.1,
    },
}


def frozen(step):
    """{folder, named by its fingerprint: inodes of its files}, of what need not change from step to step."""
    folders = Path(f"run/checkpoints/{step:08d}").glob("frozen-*")
    return {folder.name: {path.stat().st_ino for path in folder.rglob("*")} for folder in folders}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_was_killed_goes_on_bit_for_bit(grpo, case):
    """The reference, the reward model and the pairs that it will learn from come from the checkpoint, which needs no
    earlier one."""
    options = {
        **RESUMED[case],
        "steps": 4,
        "checkpoint_every": 1,
        "keep_last": 9,
        "sample_every": 2,
        "evaluate_every": 2,
    }
    if "blocks" in options:  # of two
        config = lq.Llama3Config(vocab_size=257, **SIZES | {"num_hidden_layers": 2})
        options["init_from"] = save_model(Path("deep"), config=config)
    code, out, err = grpo(**options)
    assert (code, err) == (0, ""), err
    whole, samples, variables = without_times(), Path("run/samples.txt").read_text(), lq.load("run").variables
    assert all(record["kl"] >= 0 for record in whole if "reward" in record)
    assert abs(next(record["kl"] for record in whole if "kl" in record)) < (1e-6 if "iterations" not in options else 1)
    three, four = frozen(3), frozen(4)
    stayed = three.keys() & four.keys()
    assert stayed and all(three[name] & four[name] for name in stayed)
    stopped_at(2)
    shutil.rmtree("run/checkpoints/00000001")
    code, out, _ = grpo(**options)
    assert code == 0
    assert "resuming run from step 2" in out and "step 0: validation" not in out
    assert frozen(4).keys() == four.keys()
    assert without_times() == whole
    assert Path("run/samples.txt").read_text() == samples
    jax.tree.map(np.testing.assert_array_equal, lq.load("run").variables, variables)


@pytest.mark.exhaustive
def test_a_branch_with_other_iterations_has_the_rate_of_its_step(grpo, monkeypatch):
    """Though the optimizer has counted other updates; here each adds its rate to the weights."""

    def rates(schedule, **_):
        ones = optax.stateless(lambda grads, params: jax.tree.map(jnp.ones_like, grads))
        return optax.chain(ones, optax.scale_by_schedule(schedule))

    monkeypatch.setattr("llmq_jax.training.optimizer.adamw", rates)
    options = {"steps": 2, "warmup_steps": 1, "initial_learning_rate": 0, "learning_rate": 0.01, "evaluate_every": 0}
    assert grpo(**options, checkpoint_every=1)[0] == 0
    source = "run/checkpoints/00000001"
    code, _, err = grpo(**options, branch_from=source, iterations=4, out="branch")
    assert (code, err) == (0, "")
    before, after = (lq.load(path).params["final_norm"]["scale"] for path in (source, "branch"))
    np.testing.assert_allclose(after - before, 4 * 0.01, rtol=1e-3)


def test_a_reward_model_that_learns_changes_what_is_rewarded(grpo):
    """From the second iteration on; validation goes on measuring by what it was at first."""
    learning = {"judge": "RW:small", "replay_data": "PAIRS", "steps_per_iteration": 2, "reward_learning_rate": 0.01}
    rewards = []
    for options in ({}, learning):
        assert grpo(reward="JUDGED", steps=3, evaluate_every=3, **options)[0] == 0
        rewards.append([record["reward"] for record in records() if "reward" in record])
        assert Path("run/reward_model").exists() == (options is learning)
        told = [record["step"] for record in records() if "reward_model/accuracy" in record]
        assert told == ([2] if options is learning else [])
        if options is learning:  # what it became is a model like any other
            assert lq.load("run/reward_model").config.labels == ("reward",)
        shutil.rmtree("run")
    assert rewards[0][:2] == rewards[1][:2]
    code, _, err = grpo(reward="JUDGED", steps=3, **{**learning, "reward_learning_rate": 1e30})
    assert code == 2 and err.count("\n") == 1 and err.endswith("lower --reward-learning-rate\n")
    assert rewards[0][2] != rewards[1][2]


def test_steps_of_answers_are_rewarded(grpo):
    code, _, err = grpo(reward="NARROW", supervision="process", step_separator="�", steps=2, sample_every=2)
    assert (code, err) == (0, "")
    assert all(np.isfinite(record["loss"]) for record in records() if "loss" in record)
    assert "(model " in Path("run/samples.txt").read_text()


def test_functions_and_a_model_are_weighed(grpo):
    code, _, err = grpo(reward="RW:small, NARROW", reward_weights="2,0.5", reward_pooling="mean", steps=1)
    assert (code, err) == (0, "")
    first = next(record for record in records() if "reward" in record)
    expected = 2 * first["rewards/small/mean"] + 0.5 * first["rewards/model/mean"]
    assert first["reward"] == pytest.approx(expected, rel=1e-5)


def test_the_reward_model_computes_as_the_options_say(grpo, monkeypatch):
    scorers = []

    def made(*arguments):
        scorers.append(scorer_of(*arguments))
        raise BadInput("made")

    scorer_of = train.grpo.scorer_of
    monkeypatch.setattr(train.grpo, "scorer_of", made)
    grpo(reward="JUDGED", remat="full", no_scan_layers=True, attention="blocked")
    model = scorers[0].lm.model
    assert (model.remat, model.scan_layers, model.attention) == ("full", False, "blocked")


def test_layers_that_are_cut_are_in_memory_once(grpo, request):
    config = lq.Llama3Config(vocab_size=257, **SIZES | {"num_hidden_layers": 2})
    model = save_model(Path("deep"), config=config)
    beside_state = request.getfixturevalue("beside_state")  # beside what was there before
    grpo(init_from=model, train="blocks")
    assert len(beside_state) == 1 and beside_state[0] < 0.2


def test_rewards_without_spread_are_told(grpo):
    code, out, _ = grpo(reward="RW:equal", steps=2)
    assert code == 0
    assert out.count("the answers of every group have the same reward (1 in the first)") == 1
    assert [record["grad_norm"] for record in records() if "loss" in record] == [0, 0]


def test_whole_groups_share_their_prompts(monkeypatch):
    def shared(model=NARROW, dtype=None, **options):
        given = {"prompts_per_step": 4, "group_size": 6, "max_new_tokens": 20, **options}
        return shared_by(Options("data", "model", "run", **given), lq.build(model, dtype=dtype), longest_prompt=10)

    assert shared() == shared(accumulate=2) == shared(mesh="data=1") == shared(mesh="data=4,tensor=2") == 6
    assert shared(accumulate=3) == shared(mesh="fsdp=8") == 1  # parts of 8 and of 3 rows
    assert shared(max_new_tokens=21) == 1
    assert shared(lq.Gemma3Config(num_hidden_layers=1, sliding_window=20)) == 6
    assert shared(lq.Gemma3Config(num_hidden_layers=1, sliding_window=19)) == 1
    assert shared(lq.MixtralConfig(num_hidden_layers=1, num_local_experts=2)) == 1
    by_length = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert shared(lq.Llama3Config(num_hidden_layers=1, rope_parameters=by_length)) == 1
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    short, longer = ({"dtype": "bfloat16", "max_new_tokens": tokens} for tokens in (5, 6))
    assert (shared(), shared(**short), shared(**longer)) == (6, 6, 1)  # the fused kernel has no float32


@pytest.mark.parametrize("loss", ["dr_grpo", pytest.param("sapo", marks=pytest.mark.exhaustive)])
def test_every_loss_runs(grpo, loss):
    code, _, err = grpo(loss=loss, steps=1, evaluate_every=0, iterations=2, mask_truncated=True)
    assert (code, err) == (0, "")
    assert np.isfinite(records()[0]["loss"])


def test_breaks_that_a_shell_leaves_alone_are_breaks():
    options = Options("data", "model", "run", prompt_format=r"Q: {q}\nA:", step_separator=r"\n\n")
    assert resolved(options).prompt_format == "Q: {q}\nA:"
    assert resolved(options).step_separator == "\n\n"


def test_changed_answers_are_other_data(grpo, files):
    """What rewards know of a prompt belongs to the run."""
    lines = [json.loads(line) for line in files["DATA"].read_text().splitlines()]
    here = write(Path("mine.jsonl"), lines)
    assert grpo(data=here, reward="RW:expected", steps=1)[0] == 0
    write(here, [{**line, "answer": "x"} for line in lines])
    code, _, err = grpo(data=here, reward="RW:expected", steps=1)
    assert code == 2 and "training_sha256" in err


def test_a_loss_of_micro_batches_keeps_them(grpo):
    assert grpo(entropy_coefficient=0.01, steps=1)[0] == 0
    code, _, err = grpo(entropy_coefficient=0.01, steps=1, accumulate=2)
    assert code == 2 and "accumulate" in err


def test_old_pairs_stand_beside_new_ones_in_batches_that_devices_share():
    def rows(**options):
        given = Options("data", "model", "run", **options)
        return given.prompts_per_step + replayed(given)

    assert [rows(), rows(mesh="data=2"), rows(mesh="data=4"), rows(replay=0.5)] == [9, 10, 12, 16]


JUDGE = {"reward": "JUDGED", "judge": "RW:small", "replay_data": "PAIRS", "steps_per_iteration": 2}


def test_the_tokenizers_end_ends_answers_too(grpo, tmp_path, files):
    """As in TRL, where the generation config names others."""
    lm = lq.load(files["MODEL"])
    lq.save(lm.replace(generation=lq.GenerationConfig(eos_token_id=(0,))), tmp_path / "other")
    assert grpo(init_from="other", steps=1, evaluate_every=0)[0] == 0
    assert lq.load("run").generation.eos_token_id == (0, lm.tokenizer.end_of_text)


def test_a_chat_template_for_a_model_that_has_none(grpo, tmp_path):
    """It writes strings too; a run does not go on with another."""
    template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    code, out, err = grpo(chat_template="own.jinja", steps=1, evaluate_every=0, sample_every=1)
    assert (code, err) == (0, "") and ":!" in Path("run/samples.txt").read_text()
    assert "\n  llmq chat run\n" in out  # and not to generate from a bare prompt
    assert lq.load("run").tokenizer.chat_template.source == template
    (tmp_path / "own.jinja").write_text(template + "{# the same #}")
    code, _, err = grpo(chat_template="own.jinja", steps=1, evaluate_every=0, sample_every=1)
    assert code == 2 and "other options: chat_template_sha256 " in err
    (tmp_path / "own.jinja").write_text(template + "{{ mood }}")
    given = {"chat_template": "own.jinja", "chat_template_kwargs": '{"mood": "?"}', "out": "moody"}
    code, _, err = grpo(**given, steps=1, evaluate_every=0, sample_every=1)
    assert (code, err) == (0, "") and ":!?" in Path("moody/samples.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # The algorithm.
        ({"group_size": 1}, "--group-size is 1, and an answer alone has no others to be better than; choose 2 or more"),
        ({"prompts_per_step": 0}, "--prompts-per-step is 0 and must be at least 1"),
        ({"accumulate": 3}, "--accumulate is 3 and must divide the 8 rows of a step"),
        ({"accumulate": 0}, "--accumulate is 0 and must be at least 1"),
        ({"temperature": 0}, "--temperature is 0.0 and must be positive"),
        ({"top_p": 2}, "--top-p is 2.0 and must be between 0 and 1"),
        ({"min_p": 2}, "--min-p is 2.0 and must be between 0 and 1"),
        ({"repetition_penalty": 0}, "--repetition-penalty is 0.0 and must be positive; 1 changes nothing"),
        ({"beta": -1}, "--beta is -1.0 and must be at least 0, and finite"),
        ({"clip_low": 2}, "--clip-low is 2.0 and must be at most 1"),
        ({"clip_low": 0.1, "loss": "sapo"}, "--clip-low 0.1 has no effect with --loss sapo, only with grpo, bnpo"),
        ({"clip_high": 0.1, "loss": "sapo"}, "--clip-high 0.1 has no effect with --loss sapo, only with grpo, bnpo"),
        ({"clip_high": 0.3}, "--clip-high has no effect with --iterations 1, whose only update begins at the ratio 1"),
        ({"beta": 0.1, "reference": "old"}, "--beta has no effect where the reference is the policy that learns"),
        ({"beta": 0.1, "steps_per_iteration": 1}, "--beta has no effect where the reference is the policy that learns"),
        ({"beta": 0.1, "steps_per_iteration": 99}, "--steps-per-iteration 99 has no effect: the run has only "),
        ({"reward_weights": "0"}, "--reward-weights 0 leaves no reward; give one that is not 0"),
        ({"step_separator": ""}, "--step-separator is empty and must be what ends a step"),
        ({"lora_dropout": 0.1, "train": "lora"}, "--lora-dropout has no effect in GRPO"),
        (
            {"validation_fraction": 0.2, "evaluate_every": 0},
            "--validation-fraction has no effect with --evaluate-every 0",
        ),
        ({"split_seed": 5, "evaluate_every": 0}, "--split-seed has no effect with --evaluate-every 0; leave it out"),
        ({"patience": 2, "evaluate_every": 0}, "--patience has no effect with --evaluate-every 0; leave it out"),
        # What the loop takes is refused before an answer has its reward.
        ({"patience": 0, "reward": "RW:broken"}, "--patience is 0 and must be at least 1"),
        ({"keep_last": 0, "reward": "RW:broken"}, "--keep-last is 0 and must be at least 1"),
        ({"log_every": -1, "reward": "RW:broken"}, "--log-every is -1 and must be at least 0"),
        ({"sample_every": -1, "reward": "RW:broken"}, "--sample-every is -1 and must be at least 0"),
        ({"clip_low": 0.1, "loss": "cispo"}, "--clip-low 0.1 has no effect with --loss cispo, only with grpo"),
        ({"kl": "k2"}, "--kl k2 has no effect with --beta 0; leave it out, or give a --beta"),
        ({"kl_by_ratio": True}, "--kl-by-ratio has no effect with --beta 0; leave it out, or give a --beta"),
        ({"reference": "start"}, "--reference has no effect with --beta 0; leave it out"),
        ({"steps_per_iteration": 2}, "--steps-per-iteration has no effect without a reference that moves"),
        ({"initial_learning_rate": 0}, "--initial-learning-rate has no effect without warm-up; leave it out"),
        ({"wandb": "p", "reward": "RW:broken"}, "wandb is not installed"),
        # Prompts.
        ({"data": "EMPTY"}, "empty.jsonl: line 2: the prompt is empty, so there is nothing to answer"),
        ({"data": "ONE"}, "holds no two different prompts, and some are held out: give more, or --validation-data"),
        ({"data": "LONG"}, "long.jsonl: every prompt is longer than 27 tokens, the shortest has 30"),
        ({"max_prompt": 30}, "--max-prompt 30 and --max-new-tokens 5 exceed the model's context, 32; choose fewer"),
        ({"max_new_tokens": 32}, "--max-new-tokens 32 leaves no room in the model's context, 32"),
        (
            {"template": "chat"},
            "the model has no chat template: use strings and the template 'plain', or give one (--ch",
        ),
        ({"template": "plain", "chat_template": "a"}, "--chat-template has no effect with --template plain; leave it"),
        ({"validation_data": "DATA"}, "every prompt is in"),
        ({"validation_data": "DATA", "evaluate_every": 0}, "--validation-data has no effect with --evaluate-every 0"),
        ({"init_from": "JUDGED"}, "is a classifier"),
        # Rewards.
        ({"reward": "anser"}, "there is no reward 'anser'; did you mean answer?"),
        ({"reward": "runs/none"}, "--reward runs/none: there is no such folder, for a reward model"),
        ({"reward": "RW:smal"}, "has no function 'smal' for a reward; did you mean"),
        ({"reward": "RW:small,RW:small"}, "names a reward twice"),
        ({"reward": ","}, "--reward names no reward"),
        (
            {"reward": "answer", "data": "BARE"},
            "the reward 'answer' needs 'answer', which it is not given: there are prompts, completions and, beside the "
            "prompt, the records' fields (solution)",
        ),
        (
            {"reward": "answer", "validation_data": "BARE"},
            "the reward 'answer' needs 'answer', which it is not given",
        ),
        ({"reward": "RW:broken"}, "the reward 'broken' failed with RuntimeError: no such lab"),
        ({"reward": "RW:short", "validation_fraction": 0.3}, "the reward 'short' returned 1 value for 3 completions"),
        ({"reward": "RW:infinite"}, "the reward 'infinite' returned inf for completion 0"),
        ({"reward_weights": "1,2"}, "--reward-weights has 2 numbers for 1 reward; give one for each"),
        ({"reward_weights": "much"}, "--reward-weights is 'much' and must be numbers: 1,0.5"),
        ({"reward": "JUDGED", "reward_weights": "2"}, "--reward-weights has no effect with a reward model alone"),
        ({"reward": "JUDGED,SPAM"}, "--reward names 2 reward models"),
        ({"reward": "WIDE"}, "has a vocabulary of 300 ids and the model one of 257; take one of the same"),
        (
            {"reward": "SHORT"},
            "reads 8 tokens, and the longest prompt with --max-new-tokens 5 has 11; choose a smaller",
        ),
        ({"reward": "SPAM"}, "is no reward model: it needs one label, as python -m train.reward gives it"),
        ({"reward_pooling": "mean"}, "--reward-pooling has no effect without a reward model in --reward"),
        ({"step_separator": "x"}, "--step-separator has no effect without --supervision process"),
        ({"supervision": "process"}, "--supervision process takes one reward model and nothing else"),
        # A reward model that learns.
        ({"judge": "RW:small"}, "--judge has no effect without a reward model in --reward"),
        ({"reward": "JUDGED", "replay": 0.2}, "--replay has no effect without --judge"),
        ({**JUDGE, "replay_data": None}, "--judge needs --replay-data"),
        (
            {**JUDGE, "steps_per_iteration": None},
            "--judge has no effect unless the reward model learns before the last",
        ),
        ({**JUDGE, "judge": "anser"}, "there is no reward 'anser'"),
        ({**JUDGE, "replay": 1}, "--replay is 1.0 and must lie between 0 and 1"),
    ],
)
def test_bad_input_is_one_line(grpo, monkeypatch, options, message):
    if "wandb" in options:
        # As on a machine without it.
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = grpo(**options)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not Path("run/metrics.jsonl").exists()


def test_a_folder_with_splits(grpo, files):
    """Of --replay-data the pairs to learn from are the old ones."""
    prompts = Path(files["DATA"]).read_text().splitlines(keepends=True)
    pairs = Path(files["PAIRS"]).read_text().splitlines(keepends=True)
    for folder, lines in (("data", prompts), ("pairs", pairs)):
        Path(folder).mkdir()
        for name, part in {"train": lines[:4], "validation": lines[4:5], "test": lines[5:]}.items():
            Path(folder, f"{name}.jsonl").write_text("".join(part))
    options = {"steps": 2, "reward": "JUDGED", "judge": "RW:small", "steps_per_iteration": 1}
    code, out, err = grpo(data="data", replay_data="pairs", **options)
    assert (code, err) == (0, "") and "4 prompts to learn from, 1 held out" in out
    assert "data: train.jsonl to learn, validation.jsonl held out, test.jsonl left out\n" in out
    assert "pairs: train.jsonl to learn, validation.jsonl left out, test.jsonl left out\n" in out
    assert list(json.loads(Path("run/config.json").read_text())["replay_sha256"]) == ["train.jsonl"]
    moved = {"data": "data/train.jsonl", "validation_data": "data/validation.jsonl"}
    assert "run is finished already" in grpo(**moved, replay_data="pairs", **options)[1]
