"""Pretrain a language model: read text, cut it into windows, learn to predict every next token.

    python -m train.pretrain                                    a small GPT-2 on Python's own source: 2 minutes
    python -m train.pretrain --data my.txt --out runs/mine      the same on a text of yours
    python -m train.pretrain --data docs/ --preset gpt2-124m    a published size, from scratch
    python -m train.pretrain --data my.txt --config norm=dyt    another idea: any field of the model's config
    python -m train.pretrain --data my.txt --init-from gpt2 --out runs/mine    go on from weights: hub id, folder or run

The same command again resumes a run that was stopped, and says so when it is finished. Add --preset NAME to --help to
see the defaults that the preset sets.
"""

import contextlib
import dataclasses
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, at_place, did_you_mean
from llmq_jax.options import Flag, default_is, named_as_options, refuse_idle
from train.devices import check_mesh, on_devices
from train.exports import export_commands, registering
from train.options import (
    LONGEST_CONTEXT,
    MAY_CHANGE,
    VALIDATION_FRACTION,
    RecipeOptions,
    check_ranges,
    context_of,
    filled,
    model_of,
    optimizer_of,
    own_options,
    run_options,
    train_step_of,
    with_steps,
)
from train.texts import LIBRARY_FRACTION, text_sources, token_streams

SAMPLE_TOKENS = 120
STEPS = 2000
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")
OF_TEXT = ("text_field", "validation_fraction")  # options without meaning for prepared tokens
OF_VALIDATION = ("validation_data", "validation_fraction")
MTP_COEFFICIENT, MTP_OPTIONS = 0.3, ("mtp_coefficient", "mtp_coefficient_end")


@dataclass(frozen=True)
class DataOptions:
    data: Annotated[str | None, default_is("the source of Python's standard library")] = None
    """Text to learn: a text file; .json, .jsonl, .csv, .tsv or .parquet with a text field; a folder of these, whose
    file names may tell the splits (train.jsonl, validation.jsonl); or a folder of tokens from train.prepare."""
    text_field: Annotated[str | None, default_is("text")] = None
    """Field or column of --data that holds the text."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Text to measure the validation loss on, in consecutive windows: all of it, or --evaluate-batches of them."""
    validation_fraction: Annotated[
        float | None, default_is(f"{VALIDATION_FRACTION}; {LIBRARY_FRACTION} of the standard library's modules")
    ] = None
    """Part of the data held out for validation: whole documents, or the end of a single text. With --evaluate-every 0
    nothing is held out."""
    evaluate_batches: Annotated[int | None, default_is("all that are held out")] = None
    """Batches that the validation loss is measured on, spread evenly over what is held out."""
    separate_documents: Flag = False
    """Keep documents apart: no token attends to another document, and no document's first token is predicted from the
    end of the one before."""
    epochs: Annotated[float | None, default_is("as many as --steps take")] = None
    """Number of passes over the text, instead of --steps."""
    out: Annotated[str | None, default_is("runs/PRESET")] = None
    """Run folder: options, metrics, samples, loss curves and checkpoints."""


@dataclass(frozen=True)
class ModelOptions:
    preset: Annotated[str | None, default_is("demo")] = None
    """A complete run (demo, nanogpt-shakespeare-cpu), which sets model and training, or a model size (see llmq
    models)."""
    init_from: Annotated[str | None, default_is("fresh weights")] = None
    """The model to start from, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, a GGUF file or a
    hub id."""
    tokenizer: Annotated[str | None, default_is("bytes; gpt2 for GPT-2's published sizes")] = None
    """bytes, gpt2, a tokenizer.json, a folder, run or GGUF file with one, or org/name of a model on the hub.
    Prepared tokens come with theirs."""
    context: Annotated[int | None, default_is(f"the model's, at most {LONGEST_CONTEXT}")] = None
    """Tokens in a window. Given for fresh weights, it is also the model's context: the longest text that it can
    read."""
    num_hidden_layers: Annotated[int | None, default_is("the preset's")] = None
    """Layers of the model."""
    hidden_size: Annotated[int | None, default_is("the preset's")] = None
    """Width of the model."""
    num_attention_heads: Annotated[int | None, default_is("the preset's")] = None
    """Attention heads of a layer; their number must divide the width."""
    config: Annotated[tuple[str, ...] | None, default_is("the preset's", metavar="FIELD=VALUE ...")] = None
    """Other fields of the model's config: norm=dyt intermediate_size=512. With --init-from, only fields on which no
    weight depends: activation_function=relu2."""
    dropout: Annotated[float | None, default_is("the model's: 0.1 in the sizes of GPT-2")] = None
    """Dropout rate in training, wherever the model has dropout (GPT-2: embeddings, attention weights, residual
    branches)."""

    mtp_coefficient: Annotated[float | None, default_is("0.3")] = None
    """Weight of the loss of multi-token prediction: the mean over the model's modules for it
    (num_nextn_predict_layers)."""
    mtp_coefficient_end: Annotated[float | None, default_is("--mtp-coefficient")] = None
    """Value of --mtp-coefficient at the last step; it changes linearly until then."""


@dataclass(frozen=True)
class Options(RecipeOptions, ModelOptions, DataOptions):  # dataclasses collect the fields from right to left
    steps: Annotated[int | None, default_is(f"{STEPS}, without --epochs")] = None
    """Training steps (optimizer updates) in the whole run."""

    @property
    def folder(self) -> str:
        return self.out or f"runs/{self.preset or 'demo'}"


# Presets that set a complete run; options given beside the preset override it.
RUNS = {
    # Sized for two CPU cores: a model this small learns most from many small batches, and its layers are written out,
    # which is 1.4 times as fast there as a loop. It reaches 1.51 nats a byte on held-out modules; twice the learning
    # rate is too much.
    "demo": Options(
        preset="demo",
        num_hidden_layers=4,
        hidden_size=96,
        num_attention_heads=3,
        context=128,
        dropout=0.0,
        steps=3000,
        batch_size=6,
        learning_rate=3e-3,
        scan_layers=False,
        log_every=100,
        evaluate_every=1500,
        sample_every=750,
        checkpoint_every=750,
    ),
    # nanoGPT's example for a CPU (its README: validation loss 1.88), with bytes for characters.
    "nanogpt-shakespeare-cpu": Options(
        preset="nanogpt-shakespeare-cpu",
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        context=64,
        dropout=0.0,
        steps=2000,
        batch_size=12,
        learning_rate=1e-3,
        betas=(0.9, 0.99),
        scan_layers=False,
    ),
}


def starting_options(given: dict[str, str]) -> Options:
    """The defaults under the command line's options: those of the preset that it names, else of "demo"."""
    if "init_from" in given:
        return Options(learning_rate=1e-4)  # lower for weights that are trained already
    preset = given.get("preset", "demo")
    options = RUNS.get(preset, Options())
    if "help" in given and preset not in RUNS:
        from llmq_jax.models import PRESETS

        # For the help alone: a run keeps None for what follows from its preset.
        return replace(options, **{name: getattr(PRESETS.get(preset), name, None) for name in SIZES})
    if "epochs" in given:
        return replace(options, steps=None)
    steps = given.get("steps", "")
    if options.steps is None or not steps.isdecimal() or int(steps) >= options.steps:
        return options
    # A shorter run is logged, evaluated, sampled from and saved as often as the whole one: its curves have as many
    # points.
    shorter = {
        name: max(1, -(-every * int(steps) // options.steps))
        for name in ("log_every", "evaluate_every", "sample_every", "checkpoint_every")
        if (every := getattr(options, name))
    }
    return replace(options, **shorter)


def main(options: Options) -> None:
    def next_commands(config: Any) -> list[str]:
        trained = shlex.quote(options.folder)
        prompt = "def" if options.data is None else "The"
        commands = [f"llmq generate {trained} --prompt {prompt}", f"llmq evaluate {trained} FILE"]
        commands = [command + registering(config) for command in commands]
        return commands + export_commands(options.folder, config)

    pretrain(options, next_commands)


@on_devices
def pretrain(options: Options, next_commands: Callable[[Any], list[str]] = lambda config: []) -> Any:
    """The whole recipe; returns the engine's RunResult. At its end the commands `next_commands(config)` are shown."""
    check(options)

    # JAX has its device now: modules that import JAX may follow.
    from llmq_jax.data import (
        SomeBatches,
        evaluation_batches,
        is_token_folder,
        load_tokenizer,
        read_tokens,
        training_batches,
    )
    from llmq_jax.generation import Sampler, generate
    from llmq_jax.language_model import LanguageModel
    from llmq_jax.model_files import TextFiles, load
    from llmq_jax.models import abstract_variables, init, parameter_count
    from llmq_jax.models.deepseek3 import modules_ahead
    from llmq_jax.training import engine, step
    from llmq_jax.training.flops import token_flops
    from llmq_jax.training.sharding import row_share
    from llmq_jax.training.state import create_state

    # The text and the model with its tokenizer: fresh, or whatever can be loaded.
    prepared = read_tokens(options.data) if is_token_folder(options.data) else None
    sources = text_sources(options, hold_out=options.evaluate_every != 0, prepared=prepared is not None)
    if options.init_from:
        source = load(options.init_from, dtype="float32")  # the master weights
        source.require_language_model(options.init_from)
        source.require_no_adapters(options.init_from)
        tokenizer = source.require_tokenizer(options.init_from)
        source = with_fields(source, options)
        config = source.config
    else:
        if options.tokenizer or prepared is None:
            tokenizer = load_tokenizer(options.tokenizer or default_tokenizer(options.preset))
        else:
            tokenizer = prepared.tokenizer
        config = new_config(options, tokenizer.vocab_size)
    prompt_option = "the default --sample-prompt" if options.sample_prompt is None else "--sample-prompt"
    options = filled(
        options,
        out=options.folder,
        context=context_of(options, config),
        # A tokenizer that comes with --init-from is named by its path, which changes with each new checkpoint there.
        tokenizer=None if options.init_from else tokenizer.name,
        text_field="text",
        sample_prompt="def " if options.data is None else "\n",
    )
    modules = modules_ahead(config)
    refuse_idle(options, ((name, not modules, "on a model without num_nextn_predict_layers") for name in MTP_OPTIONS))
    if options.context <= modules:
        raise BadInput(
            f"--context {options.context} leaves nothing to predict for {modules} modules of multi-token prediction; "
            "choose a longer one"
        )
    if options.separate_documents and tokenizer.beginning == (tokenizer.end_of_text,):
        raise BadInput(
            f"--separate-documents: {tokenizer.name} begins texts with the token that ends them, so that a document's "
            "beginning would be taken for an end; leave it out"
        )
    prompt_tokens = prompt_length(options, tokenizer, config, prompt_option)
    model = model_of(options, config)

    check_mesh(options, abstract_variables(config), options.batch_size)

    # Two streams of tokens, cut into windows. Training takes them shuffled, validation in order.
    text = token_streams(options, sources, tokenizer, config, prepared)
    if options.separate_documents and not text.separated:
        raise BadInput("--separate-documents has no effect on a single document; leave it out")
    windows = {"context": options.context, "batch_size": options.batch_size, **row_share()}
    windows |= {"end_of_text": tokenizer.end_of_text, "separate_documents": options.separate_documents}
    with contextlib.nullcontext() if options.data is None else at_place(options.data):
        batches = training_batches(text.training, **windows, seed=options.seed)
    if text.validation is not None:
        held_out = SomeBatches(evaluation_batches(text.validation, **windows), options.evaluate_batches)
    if options.epochs is None and options.steps is None:
        options = replace(options, steps=STEPS)
    options = with_steps(options, batches.windows / options.batch_size, options.epochs)

    schedule, optimizer = optimizer_of(options)
    objective = objective_of(options, model)
    train_step = train_step_of(options, objective, optimizer)
    eval_step = step.make_eval_step(objective)
    variables = source.variables if options.init_from else init(config, options.seed)

    def evaluate(variables):
        return step.evaluate(eval_step, variables, held_out)

    def sample(variables, at_step):
        learner = LanguageModel(config, model, variables, tokenizer)
        written = generate(
            learner,
            options.sample_prompt,
            max_new_tokens=min(SAMPLE_TOKENS, config.max_position_embeddings - prompt_tokens),
            sampler=Sampler(temperature=0.8),
        )
        return options.sample_prompt + written.text[0]

    print(
        f"{parameter_count(variables['params']):,} parameters; {len(text.training):,} tokens to learn, "
        f"{0 if text.validation is None else len(text.validation):,} held out (tokenizer: {tokenizer.name})"
    )
    if text.validation is not None:
        print(f"each evaluation takes {counted(len(held_out), 'batch')}")
    print(model.attention_choice(training=True), flush=True)
    return engine.run(
        create_state(variables, optimizer, seed=options.seed),
        train_step,
        batches,
        run_options(options),
        folder=options.out,
        config={"recipe": "train.pretrain", **own_options(options), **text.record()},
        may_change=(*MAY_CHANGE, *OF_TEXT) if prepared else MAY_CHANGE,
        model_config=config,
        # A loaded model keeps its own end tokens.
        tokenizer=TextFiles(tokenizer, source.generation) if options.init_from else tokenizer,
        schedule=schedule,
        evaluate=None if text.validation is None else evaluate,
        sample=sample,
        tokens_per_step=options.batch_size * options.context,
        # Not known for separate documents, whose lengths are not.
        flops_per_token=None if options.separate_documents else token_flops(config, options.context, modules=modules),
        next_commands=next_commands(config),
    )


def objective_of(options: Options, model: Any) -> Any:
    """Prediction of the next token, and of as many further ones as the model has modules for."""
    import optax

    from llmq_jax.models.deepseek3 import modules_ahead
    from llmq_jax.objectives import MultiToken, NextToken

    if not modules_ahead(model.config):
        return NextToken(model)
    start = MTP_COEFFICIENT if options.mtp_coefficient is None else options.mtp_coefficient
    end = start if options.mtp_coefficient_end is None else options.mtp_coefficient_end
    return MultiToken(model, optax.linear_schedule(start, end, max(1, options.steps - 1)) if end != start else start)


def require_preset(name: str) -> None:
    """BadInput for what is neither a complete run nor a model size."""
    from llmq_jax.models import PRESETS

    if name not in RUNS and name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}: {did_you_mean(name, [*RUNS, *PRESETS])}")


OF_NANOGPT = {
    "resume": "the same command again, without it, resumes a run",
    "scratch": "without it weights are fresh",
}
"""{what nanoGPT's init_from says beside the name of a model: how it is said here}."""


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    from llmq_jax.data import has_fields, is_token_folder

    prepared = is_token_folder(options.data)
    text_files = [path for path in (None if prepared else options.data, options.validation_data) if path]
    if options.preset is not None:
        require_preset(options.preset)
    if options.init_from in OF_NANOGPT and not os.path.exists(options.init_from):
        raise BadInput(f"--init-from {options.init_from}: names no model; {OF_NANOGPT[options.init_from]}")
    if options.init_from and not options.out:
        raise BadInput("missing --out: name a folder for the run that goes on from --init-from")
    check_ranges(
        options, *((name, lambda value: 0 <= value < math.inf, "be at least 0, and finite") for name in MTP_OPTIONS)
    )
    from_model = options.init_from, "beside --init-from, which brings model and tokenizer"
    refuse_idle(
        options,
        (
            *((name, *from_model) for name in ("preset", "tokenizer", *SIZES)),
            ("text_field", not any(map(has_fields, text_files)), "on data without fields"),
            ("validation_fraction", prepared, "on prepared tokens, whose held-out part was chosen with them"),
            *((name, options.evaluate_every == 0, "with --evaluate-every 0") for name in OF_VALIDATION),
        ),
    )


def prompt_length(options: Options, tokenizer: Any, config: Any, named: str) -> int:
    """The number of tokens in the samples' prompt. BadInput, in which the prompt is `named` so, before the run begins,
    where it leaves the model no room."""
    from llmq_jax.data import check_vocabulary

    ids = tokenizer.encode_prompt(options.sample_prompt)
    longest = config.max_position_embeddings
    if options.sample_every != 0:
        if not 0 < len(ids) < longest:
            raise BadInput(
                f"{named} {options.sample_prompt!r} is {counted(len(ids), 'token')} long; it needs at least 1, "
                f"and fewer than the model's {longest} to leave room: give another one, or --sample-every 0"
            )
        check_vocabulary(ids, config.vocab_size, named)
    return len(ids)


def default_tokenizer(preset: str | None) -> str:
    """The tokenizer where none is named: GPT-2's for its published sizes, whose vocabulary it is, else bytes."""
    from llmq_jax.models import PRESETS

    return "gpt2" if preset in PRESETS and PRESETS[preset].model_type == "gpt2" else "bytes"


def new_config(options: Options, vocab_size: int) -> Any:
    """The preset's config with this vocabulary, and with the context and the fields that are given."""
    from llmq_jax.models import PRESETS, fields_from_text, override
    from llmq_jax.models.gpt2 import GPT2Config

    base = PRESETS.get(options.preset, GPT2Config())
    sizes = {name: getattr(options, name) for name in SIZES}
    sizes["max_position_embeddings"] = options.context
    sizes = {name: size for name, size in sizes.items() if size is not None}
    fields = fields_from_text(type(base), options.config or ())
    sizes["vocab_size"] = vocab_size
    for name in sizes.keys() & fields.keys():
        raise BadInput(f"--config {name}={fields[name]!r}: is {sizes[name]} by the other options; give it in one place")
    with named_as_options(*SIZES, max_position_embeddings="context"):
        config = override(base, **sizes, **fields)
    return with_dropout(config, options.dropout)


def with_fields(source: Any, options: Options) -> Any:
    """A loaded model with the given fields of --config and --dropout changed, and with its weights as they are."""
    from llmq_jax.models import fields_from_text, override
    from llmq_jax.weight_transfer import with_config

    fields = fields_from_text(type(source.config), options.config or ())
    config = with_dropout(override(source.config, **fields), options.dropout)
    try:
        return with_config(source, config)
    except BadInput as error:
        raise BadInput(f"--config beside --init-from: {error}, of lq.with_config in Python") from None


def with_dropout(config: Any, rate: float | None) -> Any:
    if rate is None:
        return config
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith(("_pdrop", "_dropout"))]
    if not names:
        raise BadInput(f"--dropout has no effect on {config.model_type}, which has no dropout; leave it out")
    with named_as_options(**dict.fromkeys(names, "dropout")):
        return dataclasses.replace(config, **dict.fromkeys(names, rate))


if __name__ == "__main__":
    run(main, defaults=starting_options)
