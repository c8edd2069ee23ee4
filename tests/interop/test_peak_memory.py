"""Reading takes the memory of the model, and little more: files of TensorFlow, PyTorch and safetensors of 200 MB."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmq_jax.interop import to_state_dict
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel
from llmq_jax.models import build, init
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
def test_peak_memory_of_tensorflow_and_pytorch(tmp_path, layout, write):
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


# What safetensors take is not mapped, so that the most there ever was can be asked for.
PEAK_OF_ALL = """
import re, sys
from pathlib import Path
import jax
from llmq_jax.model_files import load
from llmq_jax.interop.huggingface import save_hf
folder = Path(sys.argv[1])
jax.numpy.zeros(3).block_until_ready()
load(folder / "small")  # whatever a first load allocates
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
lm = load(folder / "large")
jax.block_until_ready(lm.variables)
loaded = peak()
save_hf(lm, folder / "again", max_shard_size="50MB")
print(loaded - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_safetensors_read_and_written(tmp_path):
    """200 MB are read in little more than 200 MB, in shards or in one file, and written again in one shard more."""
    for name, config in (("small", SMALL), ("large", LARGE)):
        save_hf(LanguageModel(config, build(config), init(config)), tmp_path / name)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 200e6
    run = subprocess.run([sys.executable, "-c", PEAK_OF_ALL, tmp_path], capture_output=True, text=True, check=True)
    loaded, saved = map(int, run.stdout.split())
    print(f"file {size / 1e6:.0f} MB, peak of loading {loaded / 1e6:.0f} MB, and of saving {saved / 1e6:.0f} MB")
    assert loaded < 1.25 * size
    assert saved < 1.5 * size
