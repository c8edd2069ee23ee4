"""What a user's type checker makes of the public interface, which ships its types (`py.typed`)."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

ROOT = Path(__file__).parent.parent
WRONG = {
    "lq.Sampler(temperature='hot')": "arg-type",
    "lq.generate('gpt2', 'a prompt')": "arg-type",
    "lq.generate(lq.load('gpt2'), 'a prompt').tekst": "attr-defined",
    "lq.load(3)": "arg-type",
    "lq.lode('gpt2')": "attr-defined",
    "lq.load('gpt2').logits('text') + 'text'": "operator",
    "lq.GPT2Config(n_layer=12)": "call-arg",
    "lq.training.RunOptions(steps=1, on_full_disk='wait')": "arg-type",
    "lq.training.make_train_step(lq.build, lq.training.adamw(1e-3))": "arg-type",
}


def check(*arguments):
    """(mypy's remarks, whether it found no error), by the settings in pyproject.toml."""
    remarks, _, status = api.run(["--config-file", str(ROOT / "pyproject.toml"), *map(str, arguments)])
    return remarks, status == 0


@pytest.mark.exhaustive
def test_documented_use_is_well_typed():
    assert (ROOT / "llmq_jax" / "py.typed").is_file()
    remarks, good = check(ROOT / "tests" / "typed_use.py")
    assert good, remarks


@pytest.mark.exhaustive
def test_wrong_use_is_told(tmp_path):
    program = tmp_path / "wrong_use.py"
    program.write_text("import llmq_jax as lq\n" + "\n".join(WRONG))
    remarks, _ = check(program)
    for line, (use, code) in enumerate(WRONG.items(), start=2):
        assert any(f":{line}: " in remark and f"[{code}]" in remark for remark in remarks.splitlines()), (use, remarks)
