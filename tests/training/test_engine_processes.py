"""Decisions of a run in two processes on this machine: what both must do at once, both must decide alike."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmq_jax as lq
from llmq_jax.language_model import LanguageModel
from llmq_jax.training import Checkpoints
from tests.devices import with_devices
from tests.ports import free_port
from tests.weights import draw_variables

# Both load adapters that bring an embedding of their own onto a base that is divided between them, and then models of
# which each has a copy on a disk of its own. Then each measures another loss, lowest after another step: by itself one
# would stop after step 14, the other after 10.
LOADS_AND_STOPS_EARLY = """
import os, sys
import jax
import llmq_jax as lq
from dataclasses import replace
from llmq_jax.layers.axes import on_host
from llmq_jax.training.joining import joined
from tests.training import tiny_run

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with joined(address, 2, process):
    lm = lq.load(folder, mesh="fsdp=2")
    with jax.set_mesh(lq.training.make_mesh("fsdp=2")):
        matrices = (lm.params["token_embedding"]["embedding"], lm.params["lm_head"]["kernel"])
        print("loaded", *(on_host(matrix).sum() for matrix in matrices), flush=True)
    os.chdir(f"{folder}/../{process}")
    for name in ("export", "run", "goes_on"):
        try:
            lq.load(name, mesh="fsdp=2")
            print("loaded", name, flush=True)
        except lq.BadInput as error:
            print("refused", error, flush=True)
    os.chdir(folder)
    losses = iter([[3.0, 2.0, 2.0, 1.0], [3.0, 1.0, 2.0, 2.0]][process] + [2.5] * 6)
    options = replace(tiny_run.PATIENT, patience=3, checkpoint_every=None)
    result = tiny_run.run(None, options=options, evaluate=lambda variables: {"loss": next(losses)})
    print("ended", result.step, result.best_step, flush=True)
"""


# Other data for each, and then a disk of its own, under the same name as the other's.
OPENS_ITS_OWN = """
import os, sys
from llmq_jax.training import run_folder
from llmq_jax.training.joining import joined

address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.makedirs(f"{folder}/{process}", exist_ok=True)
os.chdir(f"{folder}/{process}")
run_folder.SEEN_SECONDS = 0.5
with joined(address, 2, process):
    try:
        run_folder.RunFolder("run", {"data": {"sha256": process}})
    except run_folder.BadInput as error:
        print(error)
    run_folder.RunFolder("run", {"steps": 3})
"""


def two(program, *arguments):
    """(exit code, standard output, standard error) of two processes with a device each."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**with_devices(1), "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, "-c", program, address, str(process), *map(str, arguments)], **pipes)
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, *said) for process, said in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters with an embedding of their own, of ones, onto a base that has one matrix for embedding and head."""
    folder = tmp_path_factory.mktemp("adapters")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = lq.Llama3Config(vocab_size=10, max_position_embeddings=16, tie_word_embeddings=True, **sizes)
    lm = LanguageModel(config, lq.build(config), draw_variables(config))
    lq.save_adapter(lq.lora(lm, rank=1), folder / "adapter", base=str(lq.save_hf(lm, folder / "base")))
    values = json.loads((folder / "adapter" / "adapter_config.json").read_text()) | {
        "modules_to_save": ["embed_tokens"]
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    file = folder / "adapter" / "adapter_model.safetensors"
    own = {"base_model.model.model.embed_tokens.weight": np.ones((10, 8), np.float32)}
    save_file(load_file(file) | own, file)
    for process in range(2):
        own_disk, other = folder / str(process), lm.replace(variables=draw_variables(config, seed=process))
        lq.save_hf(other, own_disk / "export")
        lq.save(other, own_disk / "run")
    lq.save(lm, folder / "0" / "goes_on")
    shutil.copytree(folder / "0" / "goes_on", folder / "1" / "goes_on")
    newer = Checkpoints(folder / "1" / "goes_on" / "checkpoints")
    newer.save(1, {"variables": other.variables}, model_config=config)
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    """What each of both says, line by line."""
    both = two(LOADS_AND_STOPS_EARLY, folder / "adapter")
    assert [code for code, _, _ in both] == [0, 0], both
    return [out.splitlines() for _, out, _ in both]


def test_two_processes_load_what_adapters_bring_whole(folder, outputs):
    """Each compares all of a matrix of which it holds a part."""
    head = lq.load(folder / "base").params["token_embedding"]["embedding"].sum().item()
    for lines in outputs:
        sums = lines[1].split()[1:]
        assert list(map(float, sums)) == pytest.approx([80, head], rel=1e-4)


def test_two_processes_compare_the_weights_that_they_load(outputs):
    """Of a run of which one sees a newer checkpoint they take the one that process 0 sees."""
    for lines in outputs:
        told = "is not the same here as where process 0 is; give all processes the same files"
        refused = [f"refused process 1: {name} {told}" for name in ("export", "run")]
        assert lines[2:5] == [*refused, "loaded goes_on"]


def test_two_processes_stop_early_after_the_same_step(outputs):
    assert [lines[-1] for lines in outputs] == ["ended 14 8"] * 2


def test_processes_that_do_not_see_the_same_folder_stop_at_the_start(tmp_path):
    """They would wait for ever at the first checkpoint, for arrays that are written elsewhere."""
    for _, said, fault in two(OPENS_ITS_OWN, tmp_path):
        assert "process 1: has other options or data than process 0: data.sha256 0 -> 1; give all the same" in said
        told = f"process 1: {tmp_path / '1' / 'run'} is not the folder that process 0 trains in"
        assert told in fault.splitlines()[-1], fault[-2000:]
    assert [path.name for path in (tmp_path / "0" / "run").iterdir()] == ["run.lock"]  # as where none has begun
    assert not (tmp_path / "1" / "run").exists()
