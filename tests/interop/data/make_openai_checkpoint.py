"""Writes the TensorFlow checkpoints beside this file, with TensorFlow itself (2.x; no dependency of the project):

    pip install tensorflow-cpu && python tests/interop/data/make_openai_checkpoint.py

`openai_gpt2/` is a folder like those of OpenAI's release, but tiny; `sharded/` holds the same variables in two shards;
`types/` holds variables of all the types that a reader meets. Every value is drawn from a seed that is its name, so
that the tests draw the same ones again instead of storing them.
"""

import json
import shutil
from pathlib import Path
from zlib import crc32

import numpy as np

HERE = Path(__file__).parent
HPARAMS = {"n_vocab": 262, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 3}
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a"]


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values that are those of this name alone; the scales of norms are about 1."""
    values = 0.3 * np.random.default_rng(crc32(name.encode())).standard_normal(shape)
    return (values + name.endswith("/g")).astype(np.float32)


def openai_variables() -> dict[str, np.ndarray]:
    """GPT-2's variables under OpenAI's names; the weights of linear layers are convolutions of width 1."""
    vocabulary, context, width = HPARAMS["n_vocab"], HPARAMS["n_ctx"], HPARAMS["n_embd"]
    shapes = {"model/wpe": (context, width), "model/wte": (vocabulary, width)}
    for layer in range(HPARAMS["n_layer"]):
        for name, inputs, outputs in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            shapes[f"model/h{layer}/{name}/w"] = (1, inputs, outputs)
            shapes[f"model/h{layer}/{name}/b"] = (outputs,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"model/h{layer}/{name}/{part}": (width,) for part in "gb"}
    shapes |= {f"model/ln_f/{part}": (width,) for part in "gb"}
    return {name: draw(name, shape) for name, shape in shapes.items()}


def typed_variables() -> dict[str, np.ndarray]:
    """One variable of each type, by the name of the type; among them a scalar and an empty array."""
    names = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool")
    variables = {name: (10 * draw(name, (3, 2))).astype(name) for name in names}
    return {**variables, "scalar": np.float32(2.5), "empty": np.zeros((0, 4), np.float32)}


def write_vocabulary(folder: Path) -> None:
    """`encoder.json` and `vocab.bpe` of a byte-level BPE with five merges, in OpenAI's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*characters, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in MERGES), encoding="utf-8")


def save(folder: Path, variables: dict[str, np.ndarray], devices: int = 1, bfloat16: tuple[str, ...] = ()) -> None:
    """Write variables as TensorFlow 1 did, a shard for each device; some of them as bfloat16."""
    import tensorflow as tf

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        for index, (name, values) in enumerate(variables.items()):
            with tf.device(f"/cpu:{index % devices}"):
                initial = tf.constant(values, tf.bfloat16) if name in bfloat16 else tf.constant(values)
                v1.get_variable(name, initializer=initial, use_resource=False)
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": devices})) as session:
            session.run(v1.global_variables_initializer())
            saver = v1.train.Saver(sharded=devices > 1, save_relative_paths=True)
            saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


if __name__ == "__main__":
    save(HERE / "openai_gpt2", openai_variables())
    (HERE / "openai_gpt2" / "hparams.json").write_text(json.dumps(HPARAMS))
    write_vocabulary(HERE / "openai_gpt2")
    save(HERE / "sharded", openai_variables(), devices=2)
    save(HERE / "types", {**typed_variables(), "bfloat16": draw("bfloat16", (3, 2))}, bfloat16=("bfloat16",))
