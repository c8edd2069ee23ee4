"""`--mesh` of the commands, on 8 virtual devices: what they print is what they print on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llmq_jax as lq
from llmq_jax.language_model import with_classifier
from tests.devices import with_devices
from tests.harness_tasks import write_tasks

ROOT = Path(__file__).parents[2]
MESH = "data=2,fsdp=2,tensor=2"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
TEXTS = [f"text {'ab' * number}" for number in range(11)]


@pytest.fixture(scope="module")
def folder(chat_folder, tmp_path_factory):
    """Models, texts, prompts and tasks."""
    folder = tmp_path_factory.mktemp("mesh")
    tokenizer = lq.load(chat_folder).tokenizer
    vocab_size = tokenizer.vocab_size
    llama = lq.Llama3Config(
        vocab_size=vocab_size, max_position_embeddings=96, num_key_value_heads=2, intermediate_size=24, **SIZES
    )
    experts = lq.MixtralConfig(
        vocab_size=vocab_size,
        max_position_embeddings=96,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        **{**SIZES, "num_hidden_layers": 1},
    )
    ends = lq.GenerationConfig(eos_token_id=(260,))
    for name, config in (("llama", llama), ("experts", experts)):
        lm = lq.LanguageModel(config, lq.build(config), lq.init(config, seed=1), tokenizer, ends)
        lq.save_hf(lm, folder / name)
    lm = with_classifier(lq.load(folder / "llama"), ["ham", "spam", "eggs"], seed=1)
    lq.save(lm, folder / "classifier")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def called(folder):
    """`called(calls)` -> [(exit code, stdout, stderr), ...] of calls, each words and perhaps standard input."""

    def run(calls):
        given = "".join(json.dumps({"words": words.split(), "stdin": stdin}) + "\n" for words, stdin in calls)
        command = [sys.executable, "-m", "tests.commands.mesh_program"]
        environment = {**with_devices(8), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


ONE = "fsdp=2,tensor=4"
GREEDY = "--temperature 0 --max-new-tokens 12"
SAME = {
    "a prompt": ("generate llama --prompt ab --max-new-tokens 12 --seed 3", "", ONE),
    # 11 in batches of 8, the last of which is filled up.
    "prompts": ("generate llama --prompt-file prompts.jsonl --max-new-tokens 8 --stop e", "", MESH),
    "a conversation": ("chat llama --max-new-tokens 8", "hi\nand you?\n", ONE),
    "a text": ("evaluate llama text.txt --context 32", "", MESH),
    "texts of classes": ("classify classifier --data texts.jsonl", "", MESH),
}
MORE = {
    "a prompt and a draft": (f"generate llama --prompt ab {GREEDY} --draft experts --draft-tokens 2", "", ONE),
    "one of experts": (f"generate experts --prompt ab {GREEDY}", "", "fsdp=2,expert=2,tensor=2"),
    "prompts, fewer than a batch": (f"generate llama --prompt-file prompts.jsonl --batch-size 16 {GREEDY}", "", MESH),
    "one text of a class": ("classify classifier --text ab", "", MESH),
}


def check_same(cases, called):
    calls = [(f"{words}{mesh}", stdin) for words, stdin, axes in cases.values() for mesh in ("", f" --mesh {axes}")]
    found = called(calls)
    for case, alone, on_mesh in zip(cases, found[::2], found[1::2], strict=True):
        assert alone[0] == 0 and alone[1] and alone[2] == "", (case, alone)
        assert on_mesh == alone, case


def test_what_is_printed_is_that_of_one_device(called):
    check_same(SAME, called)


@pytest.mark.exhaustive
def test_what_else_is_printed(called):
    check_same(MORE, called)


@pytest.mark.exhaustive
def test_tasks_of_the_harness(called):
    words = "evaluate llama --tasks local_choice,local_answers,local_texts --include-path tasks --json"
    alone, on_mesh = called([(words, ""), (f"{words} --mesh {MESH}", "")])
    assert (alone[0], on_mesh[0]) == (0, 0), (alone, on_mesh)
    expected, found = json.loads(alone[1]), json.loads(on_mesh[1])
    assert found.keys() == expected.keys() and len(found) == 3
    for task, figures in expected.items():
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        assert numbers and {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5), task


BAD = {
    "no axis": ("generate llama --prompt a --mesh model=8", "mesh 'model=8': unknown axis 'model'"),
    "no size": ("chat llama --mesh fsdp=two", "mesh 'fsdp=two': 'fsdp=two' is no size; write fsdp=2"),
    "other devices": (
        "classify classifier --text a --mesh data=2,fsdp=2",
        "mesh 'data=2,fsdp=2' is for 2 x 2 = 4 devices, and JAX has 8; sizes multiply to the number of devices",
    ),
    "one prompt": (
        "generate llama --prompt a --mesh data=2,tensor=4",
        "mesh axis data=2 has no effect on one prompt at a time: its devices would all do the same; divide the model",
    ),
    "one message": ("chat llama --mesh data=8", "mesh axis data=8 has no effect on one message at a time"),
    "batch of prompts": (
        "generate llama --prompt-file prompts.jsonl --batch-size 6 --mesh data=2,fsdp=2,tensor=2",
        "a batch of 6 rows cannot be divided among 4 devices (data=2 x fsdp=2); choose a multiple of 4",
    ),
    "batch of windows": ("evaluate llama text.txt --batch-size 12 --mesh data=8", "a batch of 12 rows cannot be"),
    "batch of questions": (
        "evaluate llama --tasks local_choice --include-path tasks --batch-size 2 --mesh fsdp=8",
        "a batch of 2 rows cannot be divided among 8 devices (fsdp=8); choose a multiple of 8",
    ),
    "batch of texts": ("classify classifier --text a --batch-size 3 --mesh data=8", "a batch of 3 rows cannot be"),
    "no experts": (
        "generate llama --prompt a --mesh expert=8",
        "mesh axis expert=8 has no effect: this model has nothing along 'expert'; leave it out",
    ),
    "no experts in tasks": (
        "evaluate llama --tasks local_choice --include-path tasks --mesh expert=8",
        "mesh axis expert=8 has no effect",
    ),
}


@pytest.fixture(scope="module")
def refusals(called):
    return dict(zip(BAD, called([(words, "a\n") for words, _ in BAD.values()]), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(refusals, case):
    code, out, err = refusals[case]
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith(f"error: {BAD[case][1]}"), err


def test_refused_before_the_model_is_read(llmq, tmp_path, monkeypatch):
    """With one device, which is what this process has."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("text.txt", "some text"), ("prompts.jsonl", '{"prompt": "a"}')):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(lq, "load", lambda *_, **__: pytest.fail("it loads"))
    for words in (
        "generate nowhere --prompt a",
        "generate nowhere --prompt-file prompts.jsonl",
        "chat nowhere",
        "evaluate nowhere text.txt",
        "evaluate nowhere --tasks any",
        "classify nowhere --text a",
    ):
        code, out, err = llmq(*words.split(), "--mesh", "fsdp=2")
        assert (code, out) == (2, ""), words
        assert err == (
            "error: mesh 'fsdp=2' is for 2 devices, and JAX has 1; sizes multiply to the number of devices; "
            "to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=2\n"
        )


def test_a_model_and_its_draft_are_divided(folder):
    program = (
        "from llmq_jax.commands.drawing import DrawingOptions\n"
        "options = DrawingOptions(model='llama', draft='llama', mesh='fsdp=2,tensor=4')\n"
        "with options.on_devices():\n"
        "    lm, drawing = options.load()\n"
        "for model in (lm, drawing['draft']):\n"
        "    kernel = model.params['group_0']['block_0']['mlp']['up']['kernel']\n"
        "    print(kernel.addressable_shards[0].data.size / kernel.size)\n"
    )
    command, environment = [sys.executable, "-c", program], {**with_devices(8), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0.125"] * 2
