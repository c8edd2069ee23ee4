"""Recipes on 8 virtual devices, from their options to their samples."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmq_jax as lq
from llmq_jax.language_model import LanguageModel
from tests.devices import with_devices
from tests.forks import Forks
from tests.ports import free_port
from tests.train.on_devices import OnDevices

ROOT = Path(__file__).parents[2]
SIZES = "--num-hidden-layers 2 --hidden-size 16 --num-attention-heads 2 --context 16 --batch-size 8 --steps 12"
TELLS = "--log-every 1 --evaluate-every 6 --sample-every 12 --checkpoint-every 6"


@pytest.fixture(scope="module")
def devices():
    with OnDevices() as devices:
        yield devices


@pytest.fixture(scope="module")
def train(devices, tmp_path_factory):
    """`train(out, *options)` -> (its folder, exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("mesh")
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)

    def run(out, *options):
        words = [*SIZES.split(), *TELLS.split(), "--data", str(text), "--out", str(folder / out), *options]
        return folder / out, *devices.call("pretrain", words)

    return run


def records(folder, names=("loss", "validation_loss")):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in found for name in names if name in row}


@pytest.fixture(scope="module")
def alone(train):
    folder, code, _, fault = train("alone")
    assert code == 0, fault[-2000:]
    return folder


def test_a_run_on_a_mesh_equals_one_on_a_device_and_goes_on_on_another(train, alone):
    folder, code, _, fault = train("mesh", "--mesh", "data=8")
    assert code == 0, fault[-2000:]
    assert records(folder) == pytest.approx(records(alone), rel=2e-5)  # Adam makes more of rounding
    assert (folder / "samples.txt").read_text() == (alone / "samples.txt").read_text()
    # As if it had been killed after step 6.
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "00000012")
    otherwise = ("--accumulate", "2", "--remat", "full", "--no-scan-layers")  # computed, with the same result
    _, code, said, fault = train("mesh", "--mesh", "fsdp=4,tensor=2", *otherwise)
    assert code == 0, fault[-2000:]
    assert "resuming" in said and "from step 6" in said
    assert "full rematerialization" not in fault  # XLA's word for a division that it cannot change but by copies
    assert records(folder) == pytest.approx(records(alone), rel=2e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1}
    tokenizer = lq.ByteTokenizer()
    config = lq.Llama3Config(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, intermediate_size=24, **sizes)
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    folder = tmp_path_factory.mktemp("model") / "model"
    lq.save(LanguageModel(config, lq.build(config), lq.init(config, seed=1), tokenizer, ends), folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(model):
    folder = model.parent / "reward"
    lq.save(lq.with_classifier(lq.load(model), ["reward"], seed=2), folder)
    return folder


# Answers that are drawn are the same ones only where rounding decides none of them, hence few and short ones.
DRAWN = "--beta 0.1 --prompts-per-step 4 --group-size 4 --max-new-tokens 6 --learning-rate 0.01"
STEPS = "--steps 4 --log-every 1"
READ = "--context 64 --batch-size 8 --learning-rate 0.01"
MESH, PROCESSES = "a mesh", "two processes"
FINE_TUNING = {
    "instruct": (PROCESSES, f"{READ} --context 16 --lora-whole token_embedding,lm_head"),  # with rows for both of them
    "classifier": (PROCESSES, "--batch-size 8 --learning-rate 0.01 --train lora"),
    "reward": (MESH, f"{READ} --train lora --lora-whole token_embedding"),
    "dpo": (PROCESSES, READ),
    "grpo": (MESH, f"--reward length:4 {DRAWN}"),  # in two processes it goes on, below
    "grpo by a model": (PROCESSES, f"--reward REWARD --supervision process {DRAWN}"),
}
"""{recipe: (on what it trains beside one device, options)}. Each reading of a batch and each kind of loop goes in two
processes once."""
FIELDS = {
    "instruct": ("prompt", "completion"),
    "classifier": ("text", "label"),
    "grpo": ("prompt",),
    **dict.fromkeys(("dpo", "reward"), ("prompt", "chosen", "rejected")),
}
WRITTEN = {
    "prompt": "Say {}:",
    "completion": "{}",
    "chosen": "{}",
    "rejected": "no {}",
    "text": "It is {}.",
    "label": "{:.1}",
}
RUN_RECIPE = Path(__file__).parent / "run_recipe.py"


def two_processes(recipe, words, folder):
    """Ends two processes with two devices each: the model is divided in each of them, a batch between them."""
    where = f"--mesh data=2,fsdp=2 --coordinator 127.0.0.1:{free_port()} --processes 2"
    with Forks(f"train.{recipe}", "llmq_jax.model_files") as forks:
        begun = []
        for number in range(2):
            more, fault = (*where.split(), "--process", number), folder / f"fault_{number}"
            files = {"output": folder / f"said_{number}", "errors": fault}
            process = forks.begin(RUN_RECIPE, recipe, *words, *more, **files, **with_devices(2))
            begun.append((process, fault))
        for process, fault in begun:
            assert forks.wait(process) == 0, fault.read_text()[-2000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", FINE_TUNING)
def test_adapters_learn_on_many_devices_as_on_one(case, devices, model, reward_model, tmp_path):
    """On a mesh, or in two processes, each with its share of a batch."""
    recipe, (where, options) = case.split()[0], FINE_TUNING[case]
    words = ("ab", "ba", "aab", "bba", "abab", "baba", "a", "b", "aa", "bb")
    rows = [{name: WRITTEN[name].format(word) for name in FIELDS[recipe]} for word in words]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = f"--init-from {model} --validation-fraction 0.2 {options}".replace("REWARD", str(reward_model))
    options += f" {STEPS} --lora-rank 2 --evaluate-every 2 --sample-every 4"
    words = ["--data", str(tmp_path / "data.jsonl"), *options.split()]
    one, many = tmp_path / "one", tmp_path / "many"
    for out, mesh in ((one, []), (many, ["--mesh", "data=2,fsdp=2,tensor=2"])):
        if out == many and where == PROCESSES:
            two_processes(recipe, [*words, "--out", str(out)], tmp_path)
        else:
            code, _, fault = devices.call(recipe, [*words, "--out", str(out), *mesh])
            assert code == 0, fault[-2000:]
        assert lq.load(out).config.model_type == "llama"
    names = ("loss", "grad_norm", "reward", "kl", "accuracy", "margin", "validation_loss", "validation_reward")
    told = records(one, names)
    assert len(told) >= 10
    assert records(many, names) == pytest.approx(told, rel=1e-4, abs=1e-6)


@pytest.mark.exhaustive
def test_adapters_go_on_in_two_processes_and_what_stays_is_not_written_again(devices, model, tmp_path):
    """Neither another mesh nor other processes change a fingerprint: of the base, of its adapters' fixed parts, and of
    the reference."""
    rows = [{"prompt": f"Say {word}:"} for word in ("ab", "ba", "aab", "bba", "abab", "a")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", str(tmp_path / "data.jsonl"), "--init-from", str(model), "--out", str(tmp_path / "run")]
    words += f"--reward length:4 --reference start {DRAWN} --lora-rank 2".split()
    words += f"{STEPS} --evaluate-every 0 --sample-every 0 --checkpoint-every 2".split()
    code, _, fault = devices.call("grpo", [*words, "--mesh", "data=2,fsdp=2,tensor=2"])
    assert code == 0, fault[-2000:]
    names = ("loss", "grad_norm", "reward", "kl")
    folder, whole = tmp_path / "run", records(tmp_path / "run", names)
    # As if it had been killed after step 2.
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "00000004")
    two_processes("grpo", words, tmp_path)
    assert records(folder, names) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    before, after = (
        {str(path.relative_to(step)): path.stat().st_ino for path in step.glob("frozen-*/**/*") if path.is_file()}
        for step in (folder / "checkpoints" / "00000002", folder / "checkpoints" / "00000004")
    )
    assert before == after
    assert len({name.partition("/")[0] for name in before}) == 3
    assert lq.load(folder).config.model_type == "llama"


@pytest.mark.exhaustive
def test_checkpoints_are_cast_and_joined_on_a_mesh(devices, model, tmp_path):
    """One is cast, of one the layers that learned are joined with the others: of arrays that one device had alone."""
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "Say a:", "completion": "a"}\n{"prompt": "b", "completion": "c"}\n'
    )
    words = ["--data", str(tmp_path / "data.jsonl"), "--init-from", str(model), "--out", str(tmp_path / "cut")]
    options = "--train blocks --steps 1 --batch-size 1 --context 64 --evaluate-every 0 --sample-every 0"
    code, _, fault = devices.call("instruct", words + options.split())
    assert code == 0, fault[-2000:]
    environment = {**with_devices(8), "PYTHONPATH": str(ROOT)}
    program = (
        "import llmq_jax as lq\n"
        f"for folder, dtype in (({str(model)!r}, 'bfloat16'), ('cut', None)):\n"
        "    lm = lq.load(folder, dtype=dtype, mesh='data=2,fsdp=2,tensor=2')\n"
        "    print(*{leaf.dtype.name for leaf in lm.variables['params']['final_norm'].values()})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["bfloat16", "float32"]


def test_weights_are_read_straight_to_the_devices_that_have_them(model, tmp_path):
    """Whichever format they come from: no device has all of them, not even on the way; nor of an adapter's base."""
    program = (
        "from pathlib import Path\n"
        "import jax, llmq_jax as lq\n"
        "from llmq_jax.interop.huggingface import read_hf\n"
        "from llmq_jax.training import load_checkpoint_variables\n"
        "from llmq_jax.training.sharding import make_mesh\n"
        f"lm = lq.load({str(model)!r})\n"
        "lq.save_hf(lm, 'base')\n"
        "lq.save_adapter(lq.lora(lm, rank=2, variant='dora'), 'adapter', base='base')\n"
        "with jax.set_mesh(make_mesh('fsdp=4,tensor=2')):\n"
        f"    read = read_hf(Path('base')), load_checkpoint_variables({str(model)!r}), lq.load('adapter')\n"
        "for found in read:\n"
        "    kernel = found.variables['params']['group_0']['block_0']['mlp']['up']['kernel']\n"
        "    print(kernel.addressable_shards[0].data.size / kernel.size)\n"
    )
    environment = {**with_devices(8), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0.125"] * 3


def test_what_cannot_be_is_told_in_a_line(train):
    for options, why in (
        (("--mesh", "data=3"), "is for 3 devices, and JAX has 8"),
        (("--mesh", ""), "mesh '': '' is no axis with its size"),  # as of a variable that is not set
        (("--mesh", "data=8", "--accumulate", "2"), "a batch of 8 rows in 2 parts cannot be divided among 8 devices"),
        (("--mesh", "expert=8"), "expert=8 has no effect: this model has nothing along"),
    ):
        folder, code, _, fault = train("refused", *options)
        assert code == 2 and why in fault and len(fault.splitlines()) == 1, fault
        assert not folder.exists()


def test_the_layout_needs_no_devices(train):
    folder, code, said, fault = train("layout", "--mesh", "fsdp=4,tensor=2", "--batch-size", "12", "--layout")
    assert code == 0, fault
    row = next(line for line in said.splitlines() if "mlp/up/kernel" in line)
    assert row.split() == ["params/group_0/block_0/mlp/up/kernel", "[2,", "16,", "64]", ".", "fsdp", "tensor", "1,024"]
    assert not folder.exists()
