"""python -m convert.from_hf, convert.to_hf and convert.openai_gpt2, as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from convert import from_hf
from llmq_jax import command_line
from llmq_jax.data.tokenizers import ByteTokenizer
from llmq_jax.interop import to_state_dict
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.model_files import load, save
from llmq_jax.models import build, init
from llmq_jax.models.gpt2 import GPT2Config
from llmq_jax.models.mixtral import MixtralConfig
from tests.interop.refusals import refused
from tests.weights import draw_variables

ROOT = Path(__file__).parents[2]
OPENAI = ROOT / "tests" / "interop" / "data" / "openai_gpt2"


def convert(name, *arguments):
    command = [sys.executable, "-m", f"convert.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path):
    config = GPT2Config(
        vocab_size=257, max_position_embeddings=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
    )
    generation = GenerationConfig(eos_token_id=(256, 10))
    return save_hf(LanguageModel(config, build(config), init(config), ByteTokenizer(), generation), tmp_path / "source")


def test_there_and_back(source, program, tmp_path):
    done = convert("from_hf", source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert f"llmq generate {tmp_path / 'ours'}" in done.stdout
    assert load(tmp_path / "ours").tokenizer is not None

    assert convert("from_hf", source, tmp_path / "ours", "--overwrite").returncode == 0

    done = convert("to_hf", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert f'transformers.AutoModelForCausalLM.from_pretrained("{tmp_path / "back"}")' in done.stdout
    for path in source.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name

    classifier = save(with_classifier(load(source), ("a", "b")), tmp_path / "classifier")
    code, out, _ = program("convert.to_hf", classifier, tmp_path / "its")
    assert code == 0 and f"llmq classify {tmp_path / 'its'} --text" in out
    assert f'transformers.AutoModelForSequenceClassification.from_pretrained("{tmp_path / "its"}")' in out
    code, out, _ = program("convert.from_hf", tmp_path / "its", tmp_path / "its-back")
    assert code == 0 and f"llmq classify {tmp_path / 'its-back'} --text" in out


def test_bad_input_is_one_line(source, tmp_path):
    done = convert("from_hf", tmp_path / "nowhere", tmp_path / "ours")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: there is no such file or folder\n"
    assert not (tmp_path / "ours").exists()

    done = convert("to_hf", source, source)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {source}: is not empty; name another folder, or replace an earlier export with --overwrite "
        "(in Python: overwrite=True)\n"
    )


@pytest.mark.parametrize("words", ["from_hf", "from_hf --overwrite", "to_hf", "to_hf --adapter", "to_hf --overwrite"])
def test_a_target_in_the_way_is_told_before_the_model_is_read(words, program, tmp_path):
    (taken := tmp_path / "taken").mkdir()
    (taken / "notes.txt").touch()
    name, *options = words.split()
    code, out, err = program(f"convert.{name}", tmp_path / "nowhere", taken, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {taken}: ")


def test_openai_s_gpt2(program, tmp_path):
    done = convert("openai_gpt2", OPENAI, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert f"llmq generate {tmp_path / 'hf'}" in done.stdout
    lm = load(tmp_path / "hf")
    assert lm.config == load(OPENAI).config
    np.testing.assert_array_equal(lm.logits([[1, 2, 3]]), load(OPENAI).logits([[1, 2, 3]]))

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([[1, 2, 3]])).logits.numpy()
    np.testing.assert_allclose(lm.logits([[1, 2, 3]]), expected, rtol=0, atol=1e-5)
    assert theirs.generation_config.eos_token_id == 261
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("! the")["input_ids"] == [0, 258]

    assert program("convert.openai_gpt2", OPENAI, tmp_path / "hf")[0] == 2  # it is not empty
    assert convert("to_hf", OPENAI, tmp_path / "hf", "--overwrite", "--dtype", "bfloat16").returncode == 0
    assert load(tmp_path / "hf").params["final_norm"]["bias"].dtype == "bfloat16"


def test_openai_s_gpt2_that_is_damaged(tmp_path):
    folder = Path(shutil.copytree(OPENAI, tmp_path / "124M"))
    (folder / "vocab.bpe").unlink()
    done = convert("to_hf", folder, tmp_path / "bare")
    assert done.returncode == 0 and "without a tokenizer" in done.stdout
    file = folder / "model.ckpt.data-00000-of-00001"
    os.truncate(file, 1000)
    done = convert("openai_gpt2", folder, tmp_path / "hf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {file}: is truncated: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "hf").exists()


def test_openai_gpt2_takes_openai_s_folders_alone(source, program, tmp_path):
    for other in (source, tmp_path / "nowhere"):
        code, out, err = program("convert.openai_gpt2", other, tmp_path / "hf")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {other}: is no folder of OpenAI's")


@pytest.fixture
def training_checkpoint(source, tmp_path):
    """A .pth file as the original repository's training scripts write it."""
    lm = load(source)
    state = {name: torch.tensor(array) for name, array in to_state_dict(lm.variables, lm.config, "original").items()}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "model_and_optim_save.pth")
    return tmp_path / "model_and_optim_save.pth"


def test_a_checkpoint_of_a_training_script(source, training_checkpoint, tmp_path):
    options = ("--layout", "original", "--num-attention-heads", 3, "--tokenizer", "bytes")
    done = convert("from_hf", training_checkpoint, tmp_path / "ours", *options)
    assert done.returncode == 0, done.stderr
    ours = load(tmp_path / "ours")
    assert ours.tokenizer.encode("é") == [0xC3, 0xA9]
    assert ours.generation.eos_token_id == (256,)
    assert ours.config.activation_function == "gelu"
    jax.tree.map(np.testing.assert_array_equal, ours.variables, load(source).variables)


def test_weights_of_experts_without_a_config(tmp_path):
    """Their shapes do not tell how many experts a token uses: an error names the option that does."""
    sizes = {"vocab_size": 257, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=3, rms_norm_eps=1e-6)
    folder = save_hf(LanguageModel(config, build(config), draw_variables(config)), tmp_path / "theirs")
    (folder / "config.json").unlink()

    for fields, message in (
        ((), "do not tell num_experts_per_tok; put the model's config.json beside them, or pass "
             "config={'num_experts_per_tok': ...} in Python or, to convert.from_hf, --config num_experts_per_tok=..."),
        (("num_experts_per_tok=two",), "num_experts_per_tok=two is not of the type int"),
        (("experts_per_tok=2",), "MixtralConfig has no field 'experts_per_tok'"),
    ):  # fmt: skip
        given = from_hf.Options(str(folder), str(tmp_path / "ours"), num_attention_heads=2, config=fields)
        found = refused(from_hf.main, given)
        assert found.startswith(f"{folder}: ") and message in found
    options = ("--num-attention-heads=2", "--config", "num_experts_per_tok=3", "rms_norm_eps=1e-6")
    with pytest.warns(UserWarning, match="tell rope_parameters, in which"), pytest.raises(SystemExit) as ended:
        command_line.run(from_hf.main, [str(folder), str(tmp_path / "ours"), *options])
    assert ended.value.code == 0
    assert load(tmp_path / "ours").config == config


def test_a_checkpoint_without_what_is_needed(source, training_checkpoint, tmp_path):
    original = {"layout": "original", "num_attention_heads": 3}
    ours = save(load(source), tmp_path / "ours")
    for path, options, message in (
        (training_checkpoint, {}, "those of layout='original'; pass that (--layout original)"),
        (training_checkpoint, {"layout": "original"}, "do not tell num_attention_heads; put"),
        (
            training_checkpoint,
            {**original, "tokenizer": "gpt2"},
            "gpt2 has 50257 ids, more than the model's vocabulary",
        ),
        (source, {"num_attention_heads": 2}, f"{source}: has a config of its own; drop --num-attention-heads"),
        (
            source,
            {"num_attention_heads": 2, "config": ("norm=dyt",)},
            f"{source}: has a config of its own; drop --num-attention-heads and --config",
        ),
        (
            training_checkpoint,
            {**original, "config": ("num_attention_heads=3",)},
            f"{training_checkpoint}: num_attention_heads is given twice",
        ),
        (source / "model.safetensors", {"num_attention_heads": 2}, "has a config of its own"),
        (ours, {"num_attention_heads": 2}, f"{ours}: has a config of its own"),
        (OPENAI, {"num_attention_heads": 2}, f"{OPENAI}: has a config of its own"),
        (tmp_path, {"num_attention_heads": 2}, f"{tmp_path}: is a folder with "),
        (source, {"tokenizer": "bytes"}, "has a tokenizer of its own; drop --tokenizer"),
    ):
        assert message in refused(from_hf.main, from_hf.Options(str(path), str(tmp_path / "more"), **options))
    assert not (tmp_path / "more").exists()
    # What is possible without a tokenizer is said, and what comes next.
    from_hf.main(from_hf.Options(str(training_checkpoint), str(tmp_path / "more"), **original))
    assert load(tmp_path / "more").tokenizer is None
    # A tokenizer may have no end of text.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    given = {**original, "tokenizer": str(tmp_path / "words")}
    from_hf.main(from_hf.Options(str(training_checkpoint), str(tmp_path / "endless"), **given))
    endless = load(tmp_path / "endless")
    assert endless.generation.eos_token_id == () and endless.tokenizer.encode("a") == [0]
    # OpenAI's weights may lack their config, too.
    openai = Path(shutil.copytree(OPENAI, tmp_path / "124M"))
    (openai / "hparams.json").unlink()
    heads = load(OPENAI).config.num_attention_heads
    from_hf.main(from_hf.Options(str(openai), str(tmp_path / "theirs"), num_attention_heads=heads))
    assert load(tmp_path / "theirs").config == load(OPENAI).config
