"""python -m convert.to_hf of what fine-tuning made: what goes beside adapters, the base that they name, types."""

import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.language_model import LanguageModel
from tests.models.test_deepseek3 import TINY as DEEPSEEK
from tests.programs import ended

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [{"role": "user", "content": "Say é."}]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))
END_OF_TEXT, END = 256, 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a base, `models/base`, and a run that taught it a chat template, `run`."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    config = lq.Llama3Config(
        vocab_size=258,
        max_position_embeddings=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        initializer_range=0.1,
    )
    ends = GenerationConfig(eos_token_id=(END_OF_TEXT,), pad_token_id=0, other={"top_k": 7})
    lm = LanguageModel(config, lq.build(config), lq.init(config, seed=1), ByteTokenizer().with_tokens("<|end|>"), ends)
    lq.save_hf(lm, folder / "models" / "base", dtype="bfloat16")
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("a", "b", "ab", "ba", "abc")]
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ("--steps=2", "--learning-rate=0.05", "--batch-size=2", "--lora-rank=2", "--device=cpu")
        quiet = ("--sample-every=0", "--evaluate-every=0", "--chat-template=template.jinja")
        given = ("--data=data.json", "--init-from=models/base", "--out=run")
        assert ended("train.instruct", *given, *options, *quiet) == 0
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_adapters_keep_the_chat_template_and_the_end_tokens(here, folder, tmp_path, capsys):
    ran, base = lq.load("run"), lq.load("models/base", dtype="float32")
    assert ran.generation.eos_token_id == (END_OF_TEXT, END) and base.tokenizer.chat_template is None
    out = tmp_path / "adapter"
    assert ended("convert.to_hf", "run", out, "--adapter") == 0
    named = folder / "models" / "base"
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: the adapters of {ran}",
        f"base: {named}, on this computer; --base names it for others, as by its hub id",
        f"next: llmq chat {out}",
        f'next: peft.PeftModel.from_pretrained(base, "{out}"), or '
        f'peft.AutoPeftModelForCausalLM.from_pretrained("{out}")',
    ]
    for loaded in (lq.load(out, dtype="float32"), lq.load_adapter(base, out)):
        assert loaded.chat_tokens(ASKED) == ran.chat_tokens(ASKED)
        assert loaded.generation == ran.generation
        np.testing.assert_allclose(loaded.logits(TOKENS), ran.logits(TOKENS), atol=1e-5)

    # The same by what others read.
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ids == ran.chat_tokens(ASKED)
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [END_OF_TEXT, END]
    for kind in (peft.AutoPeftModelForCausalLM, transformers.AutoModelForCausalLM):
        theirs = kind.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            np.testing.assert_allclose(theirs(torch.tensor(TOKENS)).logits, ran.logits(TOKENS), atol=1e-4)

    # It is replaced as a whole, and nothing that is not of an export.
    assert ended("convert.to_hf", "run", out, "--adapter") == 2
    assert ended("convert.to_hf", "run", out, "--adapter", "--overwrite") == 0
    lq.save_adapter(ran.replace(tokenizer=None), out, overwrite=True)
    assert not (out / "tokenizer.json").exists()
    (out / "training_args.bin").write_bytes(b"")
    assert ended("convert.to_hf", "run", out, "--adapter", "--overwrite") == 2
    assert "holds training_args.bin, so it is no earlier export" in capsys.readouterr().err


def test_what_peft_cannot_load_is_not_told_to_be_loaded_with_it(tmp_path, capsys):
    config = dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0)
    lm = LanguageModel(config, lq.build(config), lq.init(config, seed=1), ByteTokenizer())
    base = lq.save_hf(lm, tmp_path / "base")
    for targets, loads in (("attention", True), ("all-linear", False)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lq.save_adapter(lq.lora(lm, rank=1, targets=targets), tmp_path / targets, base=base)
            assert ended("convert.to_hf", tmp_path / targets, tmp_path / f"out {targets}", "--adapter") == 0
        assert ("next: peft." in capsys.readouterr().out) == loads
        written = json.loads((tmp_path / targets / "adapter_config.json").read_text())
        # Parameters of experts end as names of modules do, and are none.
        assert not any("." in module for module in written["target_modules"])


def named_base(capsys, source, out, *arguments):
    """(what adapter_config.json says of the base, what the command says)."""
    assert ended("convert.to_hf", source, out, "--adapter", "--overwrite", *arguments) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("base: "))
    return (config["base_model_name_or_path"], config.get("revision")), said


def beginning_with(name, target):
    """A copy of the run that says that it began with something else."""
    shutil.copytree("run", target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"init_from": str(name)}))
    return target


def test_the_base_is_what_the_run_began_with(here, folder, tmp_path, capsys):
    out, base = tmp_path / "out", str(folder / "models" / "base")
    (checkpoint,) = (folder / "run" / "checkpoints").glob("0*2")
    for source in ("run", "run/checkpoints", checkpoint):
        assert named_base(capsys, source, out)[0] == (base, None)
    # Names of the hub stay; what can only be a path, and is not there, is no name.
    hub = beginning_with("org/base@v1", tmp_path / "hub")
    assert named_base(capsys, hub, out) == (
        ("org/base", "v1"),
        "base: org/base@v1, with which it began, as a name on the hub; --base names another",
    )
    for lost in (
        "models/gone",
        "/models/gone",
        "gone.gguf",
        "models/gone.gguf",
        "models/base/gone.gguf",
        "../gone",
        "../a/b.gguf",
    ):
        run = beginning_with(lost, tmp_path / lost.replace("/", "."))
        assert named_base(capsys, run, out) == (
            (None, None),
            f"base: none is named in adapter_config.json, as it began with {lost}, which is not there; name it with "
            "--base",
        )
    gguf = beginning_with("org/base-GGUF/all/m.gguf@v1", tmp_path / "gguf")
    assert named_base(capsys, gguf, out) == (
        ("org/base-GGUF/all/m.gguf@v1", None),
        "base: org/base-GGUF/all/m.gguf@v1, which loads here alone; PEFT and others want a Hugging Face folder: write "
        "one (python -m convert.to_hf org/base-GGUF/all/m.gguf@v1 FOLDER) and name that with --base",
    )
    # A run that went on with adapters has their base, also if that run was exported.
    on = beginning_with("run", tmp_path / "on")
    further = beginning_with(on, tmp_path / "further")
    assert named_base(capsys, further, out)[0] == (base, None)
    exported = beginning_with(lq.save_adapter(lq.load("run"), tmp_path / "exported", base=base), tmp_path / "of export")
    assert named_base(capsys, exported, out)[0] == (base, None)
    assert named_base(capsys, tmp_path / "exported", out)[0] == (base, None)
    circle = beginning_with(tmp_path / "circle", tmp_path / "circle")
    assert "whose adapters have none that is known; name it with --base" in named_base(capsys, circle, out)[1]
    # What only this library loads is named, with a way to what others load.
    ours = lq.save(lq.load("models/base"), tmp_path / "ours")
    name, said = named_base(capsys, beginning_with(ours, tmp_path / "of ours"), out)
    assert name == (str(ours), None) and f"(python -m convert.to_hf {ours} FOLDER) and name that with --base" in said
    assert lq.load(out).chat_tokens(ASKED) == lq.load("run").chat_tokens(ASKED)
    # A copy of a checkpoint alone does not tell.
    alone = shutil.copytree(checkpoint, tmp_path / "alone" / "x" / "y")
    assert f"as {alone} does not say what it began with" in named_base(capsys, alone, out)[1]


def test_the_base_that_is_given_stays_as_it_is(here, tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("models/base", "org/base"):
        assert named_base(capsys, "run", out, "--base", name) == ((name, None), f"base: {name}")
    assert named_base(capsys, "run", out, "--base", "org/base@v1")[0] == ("org/base", "v1")
    name, said = named_base(capsys, "run", out, "--base", "org/base-GGUF/m.gguf")
    assert name == ("org/base-GGUF/m.gguf", None) and "which loads here alone; PEFT and others want a" in said
    name, said = named_base(capsys, "run", out, "--base", "run")
    assert name == ("run", None) and "which loads here alone, without its own adapters" in said
    np.testing.assert_allclose(lq.load(out).logits(TOKENS), lq.load("run").logits(TOKENS), atol=1e-5)
    ours = f"{lq.save(lq.load('models/base'), tmp_path / 'ours')}/"
    name, said = named_base(capsys, "run", out, "--base", ours)
    assert name == (ours, None) and "which loads here alone; PEFT and others want a Hugging Face folder" in said


def dtype_in(folder):
    return json.loads((folder / "config.json").read_text())["dtype"]


def test_the_type_of_a_merged_model_is_said(here, tmp_path, capsys):
    assert ended("convert.to_hf", "run", tmp_path / "plain") == 0
    written, said = capsys.readouterr().out.splitlines()[:2]
    assert said == "written in float32, that of the model; --dtype bfloat16 halves it"
    assert written.endswith(f": {lq.merge(lq.load('run'))}") and "adapters" not in written
    assert ended("convert.to_hf", "run", tmp_path / "half", "--dtype", "bfloat16") == 0
    assert "\nwritten in bfloat16\n" in capsys.readouterr().out
    assert (dtype_in(tmp_path / "plain"), dtype_in(tmp_path / "half")) == ("float32", "bfloat16")
    assert ended("convert.to_hf", "models/base", tmp_path / "base") == 0
    assert "\nwritten in bfloat16\n" in capsys.readouterr().out


def test_a_size_of_shards_that_is_empty_is_none(here, tmp_path, capsys):
    assert ended("convert.to_hf", "models/base", tmp_path / "out", "--max-shard-size=") == 2
    assert capsys.readouterr().err == 'error: max_shard_size=\'\' is no size; write "5GB" or "500MB"\n'


def test_adapters_beside_a_narrow_base_are_merged_as_wide_as_what_is_written(here, tmp_path, capsys):
    narrow = lq.load("run", dtype="bfloat16")
    lq.save(narrow, tmp_path / "narrow")
    whole = lq.merge(lq.load("run", dtype="bfloat16").replace(variables=widened(narrow.variables)))
    for dtype, same in (("float32", True), ("float16", False), (None, False)):
        out = tmp_path / f"{dtype}"
        assert ended("convert.to_hf", tmp_path / "narrow", out, *([] if dtype is None else ["--dtype", dtype])) == 0
        found = lq.load(out, dtype="float32")
        expected = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d or "bfloat16").astype("float32"), whole.params)
        jax.tree.map(np.testing.assert_array_equal, found.params, expected)
        assert same == all(jax.tree.leaves(jax.tree.map(np.array_equal, found.params, whole.params)))
    said = "written in bfloat16, to which adapters were rounded as they were merged; --dtype float32 keeps them whole"
    assert said in capsys.readouterr().out


def widened(variables):
    return {**variables, "params": jax.tree.map(lambda leaf: leaf.astype("float32"), variables["params"])}
