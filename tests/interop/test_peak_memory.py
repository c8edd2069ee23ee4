"""Reading takes the memory of the model, and little more: TensorFlow's and PyTorch's files of 200 MB."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmq_jax.interop import to_state_dict
from llmq_jax.models import init
from llmq_jax.models.gpt2 import GPT2Config
from tests.interop.test_tensorflow_bundle import entry, write_index

SMALL = GPT2Config(
    vocab_size=20, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, max_position_embeddings=64
)
LARGE = GPT2Config(vocab_size=20_000, hidden_size=768, num_hidden_layers=5, max_position_embeddings=64)

# Mapped files are the system's to take back, and not counted; what else there is, is sampled.
PEAK = """
import re, sys, threading, time
from pathlib import Path
import jax
from llmq_jax.model_files import load
folder = Path(sys.argv[1])
jax.numpy.zeros(3).block_until_ready()
load(folder / "small", config={"num_attention_heads": 3})  # whatever a first load allocates
anonymous = lambda: 1024 * int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before, samples, done = anonymous(), [], threading.Event()
def sample():
    while not done.wait(0.001):
        samples.append(anonymous())
thread = threading.Thread(target=sample)
thread.start()
lm = load(folder / "large", config={"num_attention_heads": 12})
jax.block_until_ready(lm.variables)
samples.append(anonymous())  # of what stays, also where the thread came to nothing on a busy machine
done.set()
thread.join()
print(max(samples) - before)
"""


def write_tensorflow(folder, state):
    entries, offset = {}, 0
    with (folder / "model.ckpt.data-00000-of-00001").open("wb") as file:
        for name, array in state.items():
            entries[name.encode()] = entry(array, offset=offset)
            offset += file.write(array.tobytes())
    write_index(folder, entries)


def write_torch(folder, state):
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "pytorch_model.bin")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("layout", "write"), [("openai", write_tensorflow), ("hf", write_torch)])
def test_peak_memory_is_that_of_the_model(tmp_path, layout, write):
    for name, config in (("small", SMALL), ("large", LARGE)):
        (tmp_path / name).mkdir()
        state = to_state_dict(init(config), config, layout)
        write(tmp_path / name, state)
    size = sum(np.asarray(array).nbytes for array in state.values())
    assert size > 200e6
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    peak = json.loads(run.stdout)
    print(f"weights {size / 1e6:.0f} MB, peak of loading {peak / 1e6:.0f} MB")
    assert size / 2 < peak < 1.25 * size
