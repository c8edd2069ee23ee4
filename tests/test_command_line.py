"""Options, help and one-line errors. The parser is asked directly; processes are started only for exit codes."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from llmq_jax import command_line, option_errors
from llmq_jax.commands import VERBS, generate
from llmq_jax.errors import BadInput, close_names
from llmq_jax.option_names import OURS, RESUMING, meant_by
from llmq_jax.options import PATHS, Flag, Positional, Repeated, given_fields, option_name


@dataclass(frozen=True)
class Options:
    """Bake a cake."""

    recipe: Positional[str]
    """Which one."""
    topping: str
    """What goes on top."""
    batch_size: int = 3
    """Cakes at a time."""
    heat: float | None = None
    """Degrees."""
    where: Literal["oven", "pan", "fire"] = "oven"
    """How, which takes
    its time."""
    stop: Repeated = ()
    """When."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Eggs."""
    cream: bool = True
    """With cream."""
    quiet: Flag = False
    """Say nothing."""


def bake(options: Options) -> int | None:
    if options.topping == "sand":
        raise BadInput("sand is no topping\n   in recipe: eat something else")
    print(options)
    return None


GOOD = ["cake", "--topping", "jam"]


def test_the_nearest_name_is_one_that_begins_so():
    """By their letters alone `max_prompt` is nearer, and `generate` not near at all."""
    assert close_names("prompts", ["max_prompt", "prompts_per_step"]) == ["prompts_per_step", "max_prompt"]
    assert close_names("gen", ["chat", "generate"]) == ["generate"]
    assert close_names("step", ["steps_per_iteration", "steps"]) == ["steps", "steps_per_iteration"]
    assert close_names("temprature", ["temperature", "top_p"]) == ["temperature"]
    assert close_names("t", ["temperature", "top_p"]) == []


def test_a_warning_is_one_line():
    script = (
        "import sys, warnings; from dataclasses import dataclass; from llmq_jax.command_line import run\n"
        "@dataclass(frozen=True)\nclass Options:\n    x: int = 1\n"
        "def main(options: Options) -> None:\n    warnings.warn('burnt', stacklevel=2)\n"
        "run(main, [], program='bake')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "warning: burnt\n")


def run(arguments, command=bake, **keywords):
    with pytest.raises(SystemExit) as exit:
        command_line.run(command, list(arguments), program="bake", **keywords)
    return exit.value.code


def test_options_are_read(capsys):
    arguments = [*GOOD, "--batch-size=4", "--heat", "1e2", "--stop", "a b", "--stop", "c", "--no-cream", "--quiet"]
    assert run([*arguments, "--betas", "0.5", "-0.25"]) == 0
    expected = Options("cake", "jam", 4, 100.0, "oven", ("a b", "c"), (0.5, -0.25), cream=False, quiet=True)
    assert capsys.readouterr().out.strip() == repr(expected)


@dataclass(frozen=True)
class Described:
    """Prose that is
    filled.

        a command \\
            with its indentation
        another --with "a text" --and an-option   a note
    - an item of a list
    - another

    More prose, (in
    (brackets)) and longer than the width that there is.
    """

    number: int = 1


def test_help_fills_prose_and_breaks_commands_only_where_they_are_too_wide(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    def main(options: Described) -> None:
        pass

    assert run(["--help"], main) == 0
    assert capsys.readouterr().out.startswith("""usage: bake [-h] [--number INT]

Prose that is filled.

    a command \\
        with its indentation
    # a note
    another --with "a text" \\
        --and an-option
- an item of a list
- another

More prose, (in (brackets)) and longer
than the width that there is.

""")


def test_underscores_and_hyphens_are_the_same_and_values_may_look_like_options(capsys):
    assert run(["cake", "--topping=--jam", "--batch_size", "5"]) == 0
    assert capsys.readouterr().out.strip() == repr(Options("cake", "--jam", 5))


@dataclass(frozen=True)
class OvenOptions:
    heat: float = 180.0
    """Degrees."""


@dataclass(frozen=True)
class CakeAndTinOptions:
    cake: Positional[str]
    """Which one."""
    tin: str = "round"
    """Its shape."""


@dataclass(frozen=True)
class Grouped(OvenOptions, CakeAndTinOptions):
    """Bake."""

    heat: float = 200.0
    """Degrees, many."""
    minutes: int = 40
    """How long."""


def test_help_has_a_box_for_each_class_that_declares_options(capsys):
    baked = []

    def main(options: Grouped) -> None:
        baked.append(options)

    assert run(["--help"], main) == 0
    out = capsys.readouterr().out
    _, *parts = re.split(r"^[ ╭─]*((?:[a-z]+ )*(?:options|arguments))[ ╮─]*$", out, flags=re.MULTILINE)
    assert {title: re.findall(r"--[a-z]+", text) for title, text in zip(parts[::2], parts[1::2], strict=True)} == {
        "positional arguments": [],
        "options": ["--help", "--minutes"],
        "cake and tin options": ["--tin"],
        "oven options": ["--heat"],  # where it was declared first, whoever has another default for it
    }
    assert "Degrees, many. (default: 200.0)" in out
    assert run(["sponge", "--heat", "220"], main) == 0
    assert baked == [Grouped(cake="sponge", heat=220.0)]


def test_help_shows_meanings_and_defaults(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for text in (
        "usage: bake",
        "Bake a cake.",
        "RECIPE",
        "--batch-size INT",
        "Cakes at a time. (default: 3)",
        "How, which takes its time. (default: oven)",  # of two lines one
        "--no-cream",
    ):
        assert text in out
    assert "--no-quiet" not in out


BAD = {
    "nothing": ([], r"missing RECIPE and --topping STR: see \"bake --help\""),
    "required option": (["cake"], r"missing --topping STR: see \"bake --help\""),
    "misspelt option": (["cake", "--toping", "jam"], r"unknown option --toping: did you mean --topping\? See \"bake"),
    "misspelt with =": ([*GOOD, "--batchsize=3"], r"unknown option --batchsize: did you mean --batch-size\?"),
    "called otherwise elsewhere": (
        [*GOOD, "--per_device_train_batch_size", "4"],
        r"unknown option --per-device-train-batch-size: here it is --batch-size; see \"bake --help\"$",
    ),
    "like another in its hyphens": ([*GOOD, "--ham"], r"unknown option --ham: see \"bake --help\"$"),
    "strange option": ([*GOOD, "--xyzzy"], r"unknown option --xyzzy: see \"bake --help\""),
    "short option": ([*GOOD, "-z"], r"no option takes '-z': it follows --topping jam; see"),
    "surplus argument": ([*GOOD, "bread"], r"no option takes 'bread': it follows --topping jam; see"),
    "value for a flag": ([*GOOD, "--quiet", "1"], r"no option takes '1': it follows --quiet; see"),
    "not an integer": ([*GOOD, "--batch-size", "many"], r"--batch-size takes an integer, not 'many': see"),
    "fraction": ([*GOOD, "--batch-size=1.5"], r"--batch-size takes an integer, not '1.5': see"),
    "not a number": ([*GOOD, "--heat", "hot"], r"--heat takes a number, not 'hot': see"),
    "not two numbers": ([*GOOD, "--betas", "0.9", "b"], r"--betas takes two numbers, not '0.9 b': see"),
    "one number": ([*GOOD, "--betas", "0.9"], r"--betas needs 2 values: Eggs; see"),
    "no value": (["cake", "--topping"], r"--topping needs a value: What goes on top; see"),
    "text like an option": (
        ["cake", "--topping", "--jam"],
        r"unknown option --jam: as the text of --topping, write "
        r"--topping=--jam; see",
    ),
    "option for a value": (["cake", "--topping", "--quiet"], r"--topping needs a value: What goes on top; see"),
    "not a choice": ([*GOOD, "--where", "pen"], r"--where cannot be 'pen': choose from oven, pan, fire$"),
    "refused by the command": (["cake", "--topping", "sand"], r"sand is no topping in recipe: eat something else$"),
}


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("classify", "a text is given by --text, a file by --data"),
        ("generate", "a text is given by --prompt, a file by --prompt-file"),
        ("chat", "messages are typed or come from standard input, and a system text is given by --system"),
        ("pretrain", "a file by --data"),
    ],
)
def test_a_value_without_an_options_name_is_told_where_it_belongs(verb, words, capsys):
    where, arguments = ("train", []) if verb == "pretrain" else ("llmq_jax.commands", ["model"])
    assert run([*arguments, "hello"], importlib.import_module(f"{where}.{verb}").main) == 2
    assert capsys.readouterr().err == f"error: no option takes 'hello': {words}; see \"bake --help\"\n"


def test_a_value_too_many_of_an_option_has_no_place(capsys):
    assert run(["--data", "a.txt", "b.txt"], importlib.import_module("train.pretrain").main) == 2
    assert capsys.readouterr().err == "error: no option takes 'b.txt': it follows --data a.txt; see \"bake --help\"\n"


@pytest.mark.parametrize("recipe", ["dpo", "grpo"])
def test_an_option_without_use_is_not_in_the_help_and_says_why(recipe, capsys):
    main = importlib.import_module(f"train.{recipe}").main
    assert run(["--help"], main) == 0
    out = capsys.readouterr().out
    assert "--lora-rank" in out and "--lora-dropout" not in out
    assert run(["--lora-dropout", "0.1"], main) == 2
    assert re.match(
        r"error: --lora-dropout has no effect in .*without dropout; leave it out\n$", capsys.readouterr().err
    )
    assert run(["--lora-dropuot", "0.1"], main) == 2
    assert "--lora-dropout" not in capsys.readouterr().err
    assert run(["--preset", "gpt2-124m"], main) == 2
    told = "error: --preset has no effect in fine-tuning, which starts from the model of --init-from; leave it out\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("text", ["-jam", "- jam", "--- jam", "--jam and cream", "-", "-5"])
def test_a_text_may_begin_with_hyphens(text, capsys):
    assert run(["cake", "--topping", text, "--stop", text, "--stop", "x"]) == 0
    assert capsys.readouterr().out.strip() == repr(Options("cake", text, stop=(text, "x")))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(case, capsys):
    arguments, pattern = BAD[case]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert re.match(pattern, captured.err.removeprefix("error: ").strip()), captured.err


def test_no_box_gets_through_whatever_tyro_says(capsys):
    """A complaint that `_one_line` has no words of its own for still becomes one line without frames."""
    box = "╭─ News ─────╮\n│ Something  │\n│ happened.  │\n│ ────────── │\n│ Footer     │\n╰────────────╯\n"
    assert option_errors.one_line(box, Options, [], "bake") == 'Something happened.: see "bake --help"'


def test_choices_are_told_in_their_order(capsys):
    """Of an option that may be None, too."""

    @dataclass(frozen=True)
    class Stirring:
        tool: Literal["whisk", "spoon", "fork", "knife", "hands"] | None = None

    def stir(options: Stirring) -> None:
        print(options)

    assert run(["--tool", "saw"], stir) == 2
    fault = "error: --tool cannot be 'saw': choose from whisk, spoon, fork, knife, hands\n"
    assert capsys.readouterr().err == fault


RECIPES = ("pretrain", "instruct", "classifier", "reward", "dpo", "grpo")


def test_names_from_elsewhere_stand_for_options_that_there_are():
    known = {field.name for name in RECIPES for field in dataclasses.fields(recipe_options(name))}
    assert OURS.keys() <= known
    others = [other for names in OURS.values() for other in names]
    assert len(set(others)) == len(others)
    assert known.isdisjoint(RESUMING)


def test_names_from_elsewhere_are_those_of_the_documentation():
    """Whatever row of docs/from_trl.md names one option for one argument."""
    ours = {other: option_name(field) for field, names in OURS.items() for other in names}
    found = 0
    for row in (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text().splitlines():
        there, here = [re.findall("`([^`]+)`", cell) for cell in [*row.split("|"), "", "", "", ""][1:4:2]]
        if len(there) == len(here) == 1 and there[0] in ours:
            assert here[0].split()[0] == ours[there[0]], row
            found += 1
    assert found > 10


def test_names_from_elsewhere_have_an_answer_in_the_recipes_of_their_section():
    """Each argument in the first column of the tables of docs/from_trl.md: an option or, where there is none, why."""
    recipes, silent = {}, []
    for line in (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text().splitlines():
        if line.startswith("## "):
            named = [name for name in RECIPES if line.endswith(f"train.{name}")]
            named = ["instruct"] if line.startswith("## LoraConfig") else named
            recipes = {name: recipe_options(name) for name in (RECIPES if "every recipe" in line else named)}
        there = re.findall(r"`([a-z]\w*)`", re.sub(r"(the )?column .*| of .*", "", [*line.split("|"), "", ""][1]))
        for name, options in recipes.items():
            fields = {field.name for field in given_fields(options)}
            answers = {each: meant_by(each, fields, lambda *_: "") for each in there if each not in fields}
            silent += [(name, each) for each, answer in answers.items() if not answer or "did you mean" in answer]
    assert len(recipes) == 0  # the last sections have no tables of arguments
    assert silent == [], silent


def test_names_of_nanogpts_config_have_an_answer():
    """Of its train.py in train.pretrain, and of its sample.py in llmq generate, beside those that are ours too."""
    training = "out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint wandb_log wandb_project"
    training += " wandb_run_name dataset gradient_accumulation_steps block_size n_layer n_head n_embd bias max_iters"
    training += " beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend compile"
    for names, options in ((training, recipe_options("pretrain")), ("start num_samples", generate.Options)):
        fields = {field.name for field in given_fields(options)}
        answers = {name: meant_by(name, fields, lambda field, *_: field) for name in names.split()}
        assert [name for name, answer in answers.items() if not answer or "did you mean" in answer] == []


def test_names_of_trl_that_stand_in_no_table_have_an_answer():
    """In the recipe that a user would give them to; arguments that docs/from_trl.md names under what is missing."""
    names = "vllm_mode vllm_gpu_memory_utilization hub_token hub_strategy gradient_checkpointing_kwargs revision"
    missing = "f_divergence_type f_alpha_divergence_coef loss_weights neftune_noise_alpha label_smoothing_factor"
    missing += " load_in_4bit load_in_8bit"
    fields = {field.name for field in given_fields(recipe_options("grpo"))}
    answers = {name: meant_by(name, fields, lambda field, *_: field) for name in f"{names} {missing}".split()}
    assert [name for name, answer in answers.items() if not answer or "did you mean" in answer] == []
    assert "without vLLM" in answers["vllm_mode"]
    text = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text()
    assert [name for name in missing.split() if f"`{name}`" not in text] == []


NO_PATHS = {  # options that take a text, but none that is a path
    *("chat_template_kwargs", "mesh", "text_field", "label_field", "columns", "tasks", "metric", "preset", "config"),
    *("coordinator", "wandb", "profile", "sample_prompt", "prompt", "system", "text", "stop", "prompt_format"),
    *("train_on", "blocks", "lora_targets", "lora_layers", "reward_weights", "step_separator", "max_shard_size"),
    *("random", "layout", "inject", "lora_whole", "fields", "mean_over", "compile_for"),
    *("reward", "judge"),  # paths and names between commas: `train.rewards.names`
}
COMMANDS = [*VERBS.values(), *(f"convert.{name}" for name in ("to_hf", "from_hf", "openai_gpt2", "parity"))]
COMMANDS += [f"train.{name}" for name in (*RECIPES, "prepare", "plan", "report", "demo", "arithmetic")]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_option_that_takes_a_text_is_a_path_or_is_none(module):
    options = command_line._options_class(importlib.import_module(module).main)
    for name, hint in typing.get_type_hints(options).items():
        if str in (hint, *typing.get_args(hint)):
            assert (name in PATHS) != (name in NO_PATHS), name


def test_a_leading_tilde_of_a_path_is_the_home_directory(capsys, monkeypatch, tmp_path):
    """A shell replaces it in `--out ~/x`, not in `--out=~/x`, nor does it in a file of options."""

    @dataclass(frozen=True)
    class Baking:
        run: Positional[str]
        others: Positional[tuple[str, ...]] = ()
        out: str = "none"
        topping: str = "none"
        options: str | None = None

    def main(options: Baking):
        print(options.run, *options.others, options.out, options.topping)

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("out: ~/cake\n")
    assert run(["~/a", "b~", "~", "--out=~/x", "--topping=~/x"], main) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/a", "b~", str(tmp_path), f"{tmp_path}/x", "~/x"]
    assert run(["a", "--options=~/mine.yaml"], main) == 0
    assert capsys.readouterr().out.split() == ["a", f"{tmp_path}/cake", "none"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["", "x"], "RUN"), (["a", " "], "OTHERS"), (["a", "--out", ""], "--out"), (["a", "--init-from="], "--init-from")],
)
def test_an_empty_path_is_not_the_current_folder(capsys, arguments, named):
    """Which `--data "$DATA"` would read where the variable is not set."""

    @dataclass(frozen=True)
    class Baking:
        run: Positional[str]
        others: Positional[tuple[str, ...]] = ()
        out: str = "none"
        init_from: str | None = None
        topping: str = "none"

    def main(options: Baking):
        print(options)

    assert run(["a", "--topping", ""], main) == 0
    assert run(arguments, main) == 2
    said = f"error: {named} is empty, as from a shell variable that is not set; give a path or a name\n"
    assert capsys.readouterr().err == said


def recipe_options(name: str) -> type:
    return command_line._options_class(importlib.import_module(f"train.{name}").main)


def test_defaults_come_from_a_preset_and_explicit_options_win(capsys):
    @dataclass(frozen=True)
    class Baking:
        recipe: str = "slow"
        batch_size: int = 1
        heat: float = 1.0

    def main(options: Baking):
        print(options.batch_size, options.heat)

    def choose(given):
        return Baking("quick", 9, 80.0) if given.get("recipe") == "quick" else Baking()

    assert run(["--recipe", "quick", "--heat=70"], main, defaults=choose) == 0
    assert run(["--recipe=quick"], main, defaults=choose) == 0
    assert run([], main, defaults=choose) == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["9 70.0", "9 80.0", "1 1.0"]
    assert run(["--recipe", "quick", "--help"], main, defaults=choose) == 0
    assert "(default: 80.0)" in capsys.readouterr().out


def test_exit_codes_of_other_ends(capsys):
    def interrupted(options: Options):
        raise KeyboardInterrupt

    def forbidden(options: Options):
        raise PermissionError(13, "Permission denied", "/secret")

    def failed(options: Options):
        return 1

    def faulty(options: Options):
        raise ZeroDivisionError

    assert run(GOOD, interrupted) == 130
    assert capsys.readouterr() == ("", "")
    assert run(GOOD, forbidden) == 2
    assert capsys.readouterr().err == "error: Permission denied: /secret\n"
    assert run(GOOD, failed) == 1
    with pytest.raises(ZeroDivisionError):
        command_line.run(faulty, GOOD, program="bake")


def test_a_reader_that_leaves_is_no_error():
    writer = (
        "from dataclasses import dataclass\nfrom llmq_jax import command_line\n"
        "@dataclass\nclass Options:\n    'Talk.'\n"
        "def main(options: Options):\n    while True: print('words')\n"
        "command_line.run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "words\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")


def test_letters_that_the_output_has_no_bytes_for_are_spelled_out():
    """A log of a run on a machine that is not set to UTF-8. As JSON spells them: a line of JSON is one there too."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = talking('print(\'{"na\u00efve": "\u2026\U0001f642"}\')', env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b'{"na\xefve": "\\u2026\\ud83d\\ude42"}\n', b"")


def talking(main, closed="", **options):
    """The end of a command in a process of its own, with these statements as its main function."""
    program = (
        "from dataclasses import dataclass\nfrom llmq_jax import command_line\n"
        "@dataclass\nclass Options:\n    'Talk.'\n"
        f"def main(options: Options):\n    {main}\n"
        "command_line.run(main)\n"
    )
    command = ["bash", "-c", f'exec "$0" -c "$1" ${{@:2}} {closed}', sys.executable, program, *options.pop("words", ())]
    return subprocess.run(command, **{"capture_output": True} | options)


on_linux = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")


@on_linux
@pytest.mark.parametrize("words", [(), ("--help",)])
def test_an_output_that_takes_no_more_is_told_in_a_line(words):
    with open("/dev/full", "wb") as full:
        ended = talking("print('words')", words=words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    message = b"error: No space left on device: standard output, or a library's file\n"
    assert (ended.returncode, ended.stderr) == (2, message)


@on_linux
def test_an_error_is_told_though_the_output_takes_no_more():
    raising = "print('words'); from llmq_jax.errors import BadInput; raise BadInput('no good')"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "wb") as full:
        ended = talking(raising, capture_output=False, stdout=full, stderr=subprocess.PIPE, env=buffered)
    assert (ended.returncode, ended.stderr) == (2, b"error: no good\n")


def test_closed_streams_are_empty_ones():
    ended = talking("import sys; print('words'); sys.exit(sys.stdin.read() or 3)", "<&- >&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"", b"")
