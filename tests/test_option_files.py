"""Options from a file: `--options FILE`, laid under the command line."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from llmq_jax import command_line
from llmq_jax.options import Flag, default_is
from train import dpo, grpo, pretrain
from train.options import PLACES, RecipeOptions, own_options


@dataclass(frozen=True)
class Options:
    """Bake a cake."""

    options: Annotated[str | None, default_is("none", metavar="FILE")] = None
    """A file of these."""
    topping: str = "none"
    """What goes on top."""
    batch_size: int = 3
    """Cakes at a time."""
    heat: float | None = None
    """Degrees."""
    profile: Annotated[str | None, default_is("none")] = None
    """Which to look at."""
    where: Literal["oven", "pan"] = "oven"
    """How."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Eggs."""
    spices: Annotated[tuple[str, ...] | None, default_is("none")] = None
    """What goes in."""
    cream: bool = True
    """With cream."""
    quiet: Flag = False
    """Say nothing."""


def baked(tmp_path, capsys, text, *arguments):
    """(what the command was given, what was said on stderr)."""
    file, given = tmp_path / "cake.yaml", []
    file.write_text(text)
    with pytest.raises(SystemExit) as exit:
        command_line.run(bake_into(given), ["--options", str(file), *arguments], program="bake")
    assert exit.value.code == (0 if given else 2)
    return given[0] if given else None, capsys.readouterr().err


def bake_into(given):
    def bake(options: Options) -> None:
        given.append(options)

    return bake


ALL = """# for Sunday
topping: jam
batch-size: 4
heat: 1e2
profile: 10:15
where: pan
betas: [0.5, 9e-1]
spices: [salt=1, 'pepper={"black": true}']
cream: no
quiet: true
"""


def test_a_value_is_what_would_stand_behind_the_option(tmp_path, capsys):
    options, _ = baked(tmp_path, capsys, ALL)
    assert options == Options(
        options=str(tmp_path / "cake.yaml"),
        topping="jam",
        batch_size=4,
        heat=100.0,
        profile="10:15",
        where="pan",
        betas=(0.5, 0.9),
        spices=("salt=1", 'pepper={"black": true}'),
        cream=False,
        quiet=True,
    )


def test_the_command_line_wins(tmp_path, capsys):
    given = ("--topping", "none of it", "--cream", "--spices", "salt=2", "--betas=0.1", "0.2")
    options, _ = baked(tmp_path, capsys, ALL, *given)
    assert (options.topping, options.cream, options.spices) == ("none of it", True, ("salt=2",))
    assert (options.betas, options.batch_size, options.quiet) == ((0.1, 0.2), 4, True)
    options, _ = baked(tmp_path, capsys, "cream: true\nquiet: false\nheat: null", "--no-cream")
    assert (options.cream, options.quiet, options.heat) == (False, False, None)


def test_what_editors_leave(tmp_path, capsys):
    options, _ = baked(tmp_path, capsys, "\ufeffheat: 2\r\ntopping: !!null jam\r\nbetas: [-1, -.5e1]\r\n")
    assert (options.heat, options.topping, options.betas) == (2, "jam", (-1, -5))


def test_a_name_that_is_empty_names_no_file(capsys):
    for arguments in (["--options", ""], ["--options="]):
        with pytest.raises(SystemExit) as exit:
            command_line.run(bake_into([]), arguments, program="bake")
        assert exit.value.code == 2
        assert capsys.readouterr().err.startswith("error: --options needs a file")


def test_help_needs_no_file(capsys):
    for arguments in (["--options", "none.yaml", "--help"], ["--help", "--options", "none.yaml"]):
        with pytest.raises(SystemExit) as exit:
            command_line.run(bake_into([]), arguments, program="bake")
        assert exit.value.code == 0
        assert capsys.readouterr().out.startswith("usage: bake")
    for last in ("-h", "--help"):
        with pytest.raises(SystemExit) as exit:
            command_line.run(bake_into([]), ["--options", last], program="bake")
        assert exit.value.code == 2
        assert capsys.readouterr().err == 'error: --options needs a value: A file of these; see "bake --help"\n'


def test_json_is_read(tmp_path, capsys):
    options, _ = baked(tmp_path, capsys, '{"batch_size": 5, "heat": null, "cream": false, "betas": [0.1, 1e-3]}')
    assert (options.batch_size, options.cream, options.betas) == (5, False, (0.1, 1e-3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topping: jam\nbatch_sise: 3", "line 2: there is no option 'batch_sise'; did you mean batch_size?"),
        ("bs: 3\ntrain_batch_size: 3", "line 1: there is no option 'bs'; --help tells which there are"),
        ("train_batch_size: 3", "line 1: there is no option 'train_batch_size'; here it is batch_size"),
        ("flour: 3", "line 1: there is no option 'flour'; --help tells which there are"),
        ("options: other.yaml", "line 1: there is no option 'options'"),
        ("batch_size: many", "cake.yaml: batch_size takes an integer, not 'many'"),
        ("where: pot", "cake.yaml: where cannot be 'pot': choose from oven, pan"),
        ("batch_size: true", "cake.yaml: batch_size takes an integer, not 'true'"),
        ("batch_size: [1, 2]", "line 1: batch_size takes one value, not a list"),
        ("betas: 3", "cake.yaml: betas needs 2 values"),
        ("betas: []", "cake.yaml: betas needs 2 values"),
        ("betas: [1, [2]]", "line 1: a mapping or a list stands where a value is meant"),
        ("spices: {salt: 1}", "line 1: a mapping or a list stands where a value is meant"),
        ("spices: ['--quiet']", "line 1: '--quiet' in spices would be an option of its own"),
        ("cream: !!bool maybe", "line 1: cream must be true or false"),
        ("topping: !!python/name:os.system x", "line 1: the tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("topping: !mine x", "line 1: the tag '!mine' has no meaning here"),
        ("quiet: 3", "line 1: quiet must be true or false"),
        ("heat: 1\ntopping: jam\nheat: 2", "line 3: heat stands there a second time"),
        ("- heat", "holds no options; write them as batch_size: 8"),
        ("", "holds no options"),
        ("heat: [1,\ntopping: 2", "line 2: not YAML"),
        ("a: 1\n---\nb: 2", "line 2: not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_a_fault_is_told_with_its_file(tmp_path, capsys, text, said):
    options, error = baked(tmp_path, capsys, text)
    assert options is None
    assert error.startswith(f"error: {tmp_path}/cake.yaml: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_fault_of_the_command_line_is_its_own(tmp_path, capsys):
    _, error = baked(tmp_path, capsys, "topping: jam", "--batch-size", "many")
    assert error.startswith("error: --batch-size takes an integer, not 'many'")


def test_what_the_file_gives_is_spelled_as_there(tmp_path, capsys):
    file, data = tmp_path / "dpo.yaml", ("--data", "pairs.jsonl", "--init-from", "model", "--out", "run")
    for text, arguments, message in (
        ("label_smoothing: 0.1\nloss: ipo", (), "label_smoothing has no effect with loss ipo"),
        ("label_smoothing: 0.1", ("--loss", "ipo"), "label_smoothing has no effect with --loss ipo"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            command_line.run(dpo.main, ["--options", str(file), *data, *arguments], program="dpo")
        assert capsys.readouterr().err.startswith(f"error: {file}: {message}")


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command_line.run(bake_into([]), ["--options", str(tmp_path / "none.yaml")], program="bake")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: No such file or directory: {tmp_path}/none.yaml\n"


def test_a_run_does_not_depend_on_the_name_of_its_file():
    assert "options" in PLACES
    given, not_given = RecipeOptions(options="a.yaml", keep_last=3), RecipeOptions(keep_last=3)
    assert own_options(given) == own_options(not_given)


def test_an_option_without_use_says_why_in_a_file_too(tmp_path, capsys):
    file = tmp_path / "dpo.yaml"
    for value, message in (
        ("0.1", "dpo.yaml: lora_dropout has no effect in DPO"),
        ("null", "missing --data STR, --init-from STR and --out STR: see"),
    ):
        file.write_text(f"lora_dropout: {value}\n")
        with pytest.raises(SystemExit):
            command_line.run(dpo.main, ["--options", str(file)], program="dpo")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "text", "hint"),
    [
        (pretrain, "lr: 1e-3", "here it is learning_rate"),
        (pretrain, "bf16: true", "here it is dtype: bfloat16"),
        (pretrain, "sliding_window: 8", "as a field of the model's config it is given by config: sliding_window=VALUE"),
        (dpo, "sliding_window: 8", "the model of init_from brings its config, which is not changed here; leave it out"),
        (
            grpo,
            "importance_sampling_level: token",
            "ratios of whole sequences are those of loss: gspo, others of tokens",
        ),
    ],
)
def test_a_hint_is_spelled_as_the_file_is(tmp_path, capsys, command, text, hint):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        command_line.run(command.main, ["--options", str(tmp_path / "run.yaml")], program="x")
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/run.yaml: line 1: there is no option {text.split(':')[0]!r}; {hint}\n"
    )


@pytest.mark.parametrize("there", [True, False])
def test_help_shows_the_defaults_that_a_file_sets(tmp_path, capsys, there):
    file = tmp_path / "run.yaml"
    if there:
        file.write_text("preset: nanogpt-shakespeare-cpu\n")
    with pytest.raises(SystemExit) as exit:
        command_line.run(
            pretrain.main, ["--options", str(file), "--help"], program="x", defaults=pretrain.starting_options
        )
    assert exit.value.code == 0
    assert f"Windows in a batch. (default: {12 if there else 6})" in " ".join(capsys.readouterr().out.split())
