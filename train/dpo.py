"""Direct preference optimisation: teach a model to answer as people prefer, from pairs of answers alone.

    python -m train.dpo --data prefs.json --init-from runs/mine --out runs/dpo
    python -m train.dpo --data chats.jsonl --init-from model.gguf --out runs/cdpo --label-smoothing 0.1
    python -m train.dpo --data prefs.json --init-from gpt2 --out runs/ipo --loss ipo --beta 0.2 --train all

Records have instruction, input, chosen and rejected; or prompt, chosen and rejected, as strings or messages; or chosen
and rejected as messages that begin with the prompt. Prompts are held out with all their pairs. The reference, which is
the model before training or another one, computes its log-probabilities once, before training: no second model stays in
memory. The same command again resumes a run that was stopped.
"""

import io
import itertools
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.host_copies import to_host
from llmq_jax.options import Flag, default_is, named_as_options, no_option, refuse_idle
from train.answers import end_of_answer, prompts_to_ask, questioner
from train.chat_templates import chat_template_digest, in_style, tell_of_no_end, with_text_options
from train.devices import on_devices
from train.exports import next_commands
from train.options import (
    MAY_CHANGE,
    filled,
    optimizer_of,
    own_options,
    run_options,
    train_step_of,
    with_steps,
)
from train.preferences import (
    EPOCHS,
    PairOptions,
    check_preference_options,
    described,
    numbered,
    pair_tokens,
    read_pairs,
)
from train.sources import sources_of, tell_left_out
from train.texts import digests_of
from train.what_trains import FineTuningOptions, TuningOptions, flops_of, learner_of, load_to_train

LORA_RATE, FULL_RATE = 5e-5, 1e-6
REFERENCE_FILE = "reference_logprobs.npz"
DIGEST = "reference_sha256"
"""The entry of that file with the digest of the reference's weights."""
ANSWERS, ANSWER_TOKENS = 32, 64


@dataclass(frozen=True)
class LossOptions:
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO or, with --label-smoothing, cDPO; robust: unbiased under wrong labels; hinge: hinge loss; ipo:
    squared distance from a fixed margin. Formulas in docs/dpo.md."""
    beta: float = 0.1
    """β of the loss: the greater, the closer the policy stays to the reference."""
    label_smoothing: Annotated[float | None, default_is("0")] = None
    """Assumed share of wrong labels, below 0.5, with --loss sigmoid or robust."""
    normalise: Flag = False
    """Compare mean log-probabilities per token instead of sums, so that length does not count; ipo always does."""
    reference: Annotated[str | None, default_is("the model of --init-from")] = None
    """The reference model, which the policy is compared with; it must have the same vocabulary."""


@dataclass(frozen=True)
class Options(FineTuningOptions, TuningOptions, LossOptions, PairOptions):
    # Dataclasses collect the fields of their bases from right to left.
    batch_size: int = 8
    """Pairs in a batch."""
    learning_rate: Annotated[float | None, default_is(f"{LORA_RATE:g} for adapters, else {FULL_RATE:g}")] = None
    """The peak learning rate, reached after the warm-up."""
    sample_prompt: Annotated[str | None, default_is("the first that is held out")] = None
    """An instruction for the samples to answer."""
    lora_dropout: None = no_option("in DPO, which compares with a reference without dropout")


@on_devices
def main(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult."""
    check(options)
    options = filled(options, learning_rate=LORA_RATE if options.train == "lora" else FULL_RATE)

    # JAX has its device now: modules that import JAX may follow.
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llmq_jax.data import PreferenceBatches, PreferenceEvaluation
    from llmq_jax.model_files import TextFiles
    from llmq_jax.objectives.preference import DPO
    from llmq_jax.training import engine, resuming, step
    from llmq_jax.training.metrics import sample_text
    from llmq_jax.training.parts import whole
    from llmq_jax.training.processes import first, of_first
    from llmq_jax.training.sharding import own_rows, row_share
    from llmq_jax.weight_digest import weight_digest

    # The pairs, some of them held out, and the model.
    sources = sources_of(options)
    left_out = options.left_out()
    training, validation = read_pairs(options, sources, left_out)
    source = load_to_train(options)
    source.require_language_model(options.init_from)
    asked_plain = options.template == "plain"  # as it is given: further down a template is chosen where none is
    options, source = with_text_options(options, [pair.chosen for pair in training], source)
    if not sources.validation:
        options = filled(options, split_seed=0)
    learned, held_out = (pair_tokens(options, part, source, left_out) for part in (training, validation))
    tell_left_out(left_out)
    config, tokenizer = source.config, source.tokenizer
    steps_in_an_epoch = -(-len(learned) // options.batch_size)
    options = with_steps(options, steps_in_an_epoch, EPOCHS)

    # The model, computing as the options say and stopping at the end of an answer, and the part of it that trains.
    end = end_of_answer([pair.chosen for pair in learned.pairs], tokenizer)
    tell_of_no_end(options, end)
    reference = source.replace(generation=source.generation.with_end(end))
    source, learner = learner_of(reference, options, options.batch_size, drops=False)
    reference = reference.replace(model=source.model)
    schedule, optimizer = optimizer_of(options)
    objective = DPO(learner.model, options.beta, options.label_smoothing or 0.0, options.loss, options.normalise)
    train_step = train_step_of(options, objective, optimizer)
    eval_step = step.make_eval_step(objective)
    ask = questioner(options, source, [pair.chosen for pair in validation])

    print(
        f"{learner.described}\n{described(options, learned, held_out, steps_in_an_epoch)}\n"
        f"{source.model.attention_choice()}",
        flush=True,
    )
    # Strings as they are may hold any format, so that only Alpaca's is one to ask in from now on.
    in_alpacas = options.template == "alpaca"
    saved_tokenizer = in_style(options, [pair.chosen for pair in training], tokenizer) if in_alpacas else tokenizer
    converses = not asked_plain and saved_tokenizer.chat_template is not None
    parts = {"training": learned, "validation": held_out}
    digests = digests_of(parts, numbered) | chat_template_digest(options, tokenizer)
    recorded = {"recipe": "train.dpo", **own_options(options), **digests}
    # Loaded before the run folder is opened, since it may not fit into memory; not needed once the run has learned from
    # its log-probabilities.
    learning = of_first(lambda: has_learned(Path(options.out)))
    if options.reference is not None:
        reference = None if learning else other_reference(options, source)
    digest = None if reference is None else weight_digest(reference.variables)
    with resuming.open_folder(
        options.out, run_options(options), config=recorded, may_change=MAY_CHANGE, model_config=config
    ) as folder:
        # Of a run that failed before its first step they may be those of other pairs.
        path = folder.path / REFERENCE_FILE
        if first() and not folder.resumed:
            path.unlink(missing_ok=True)
        size, longest = options.batch_size, options.context
        learning_order = PreferenceBatches(learned.pairs, size, longest, options.seed)
        places = {"training": learning_order.rows_within(options.steps), "validation": range(len(held_out))}
        found, asked = reference_logprobs(options, reference, digest, learning, parts, places, path)
        del reference  # a second model, or whole copies of layers that were cut in two
        columns = {name: {"reference_logprobs": logprobs} for name, logprobs in found.items()}
        batches = PreferenceBatches(learned.pairs, size, longest, options.seed, columns["training"], **row_share())

        def held_out_batches(count):
            return PreferenceEvaluation(held_out.pairs, size, longest, count, columns["validation"])

        some = held_out_batches(options.evaluate_batches)

        def evaluate(variables):
            return step.evaluate(eval_step, variables, map(own_rows, some))

        if not folder.resumed and options.sample_every != 0:
            print(sample_text(0, ask(learner.variables)), flush=True)
        lengths = [len(answer.tokens) for answer in learned.answers]
        unembedded = sum(int(answer.learned.sum()) for answer in learned.answers) / sum(lengths)
        state = learner.state(optimizer, options.seed)
        # Where only a part of the model trains, its first values are enough to restore the reference at the end.
        began = None
        if options.train != "all" and options.reference is None and asked in (None, digest):
            kept = np.asarray if jax.process_count() == 1 else jnp.copy  # no process alone has all of an array
            began = {name: jax.tree.map(kept, state.variables[name]) for name in state.changing}

        def conclude(result):
            means = step.evaluate(eval_step, result.state.variables, map(own_rows, held_out_batches(None)))
            policy = source.replace(variables=whole(result.state.variables))
            start = None if began is None else source.replace(variables=whole({**result.state.variables, **began}))
            return (
                f"{counted(len(held_out), 'pair')} held out: {figures(means)}\n"
                f"{distance(options, policy, start, asked, validation)}"
            )

        return engine.run(
            state,
            train_step,
            batches,
            run_options(options),
            folder=folder,
            model_config=config,
            tokenizer=TextFiles(saved_tokenizer, source.generation),
            schedule=schedule,
            evaluate=evaluate,
            sample=ask,
            flops_per_token=flops_of(options, learner, lengths, unembedded),
            show=("rewards/accuracies", "rewards/margins"),
            conclude=conclude,
            next_commands=next_commands(options.out, config, converses),
        )


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    from llmq_jax.objectives.preference import SMOOTHED, check_dpo

    check_preference_options(options)
    refuse_idle(options, [("label_smoothing", options.loss not in SMOOTHED, f"with --loss {options.loss}")])
    with named_as_options("beta", "label_smoothing", "normalise", loss_type="loss"):
        check_dpo(options.beta, options.label_smoothing or 0.0, options.loss, options.normalise)


def has_learned(folder: Path) -> bool:
    """Whether an earlier start of this run got beyond its reference's log-probabilities: they stay, whatever the
    reference's name stands for by now."""
    from llmq_jax.training.checkpoints import find_checkpoint
    from llmq_jax.training.run_folder import FINISHED

    learned = find_checkpoint(folder) is not None or (folder / FINISHED).exists()
    return learned and (folder / REFERENCE_FILE).exists()


def reference_logprobs(
    options: Options,
    reference: Any,
    digest: str | None,
    learning: bool,
    parts: dict[str, Any],
    places: dict[str, Sequence[int]],
    path: Path,
) -> tuple[dict[str, Any], str | None]:
    """({part: float32 [N, 2]}, digest of the reference that they are of, None where an older version saved them):
    log-probabilities under the reference of both answers of a part's pairs at these `places`, those that the run comes
    to; NaN of others. They are read from `path` where an earlier start has saved them, if the run has learned from them
    (`learning`) or the reference is still the same by its `digest`."""
    import numpy as np

    from llmq_jax.atomic_files import write_atomically
    from llmq_jax.training.processes import first, of_first

    if of_first(path.exists):
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = str(file[DIGEST]) if DIGEST in file else None
                found = {name: file[name] for name in parts}
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"{path} is damaged ({error}); remove it, and the reference is asked anew") from None
        if None not in (digest, saved) and digest != saved:
            what = "the run keeps to what it has learned from" if learning else "it is asked anew"
            name = options.reference or options.init_from
            print(f"{name} holds other weights than when this run began; {what}", flush=True)
        if learning or digest == saved:
            return found, saved
    began, count = time.monotonic(), sum(map(len, places.values()))
    print(f"asking the reference for both answers of {counted(count, 'pair')}", flush=True)
    found = {name: np.full((len(part), 2), np.nan, np.float32) for name, part in parts.items()}
    for name, part in parts.items():
        found[name][places[name]] = logprobs_of(reference, [part.pairs[place] for place in places[name]], options)
    print(f"asked in {time.monotonic() - began:.0f} s", flush=True)
    if first():
        np.savez(file := io.BytesIO(), **found, **{DIGEST: np.array(digest)})
        write_atomically(path, file.getvalue())
    return found, digest


def other_reference(options: Options, source: Any) -> Any:
    """The model of --reference. BadInput where its vocabulary or its context does not fit the policy."""
    from llmq_jax.model_files import load
    from llmq_jax.models import build

    reference = load(options.reference)
    reference.require_language_model(options.reference)
    source.require_same_vocabulary(reference, f"--reference {options.reference}")
    longest = reference.config.max_position_embeddings
    if options.context > longest:
        raise BadInput(f"--context {options.context} exceeds that of --reference, {longest}; choose a shorter one")
    return reference.replace(model=build(reference.config, dtype=options.dtype, attention=options.attention))


def logprobs_of(lm: Any, pairs: Sequence[Any], options: Options) -> Any:
    """float32 [N, 2]: log p(answer | prompt) of both answers of each pair."""
    import jax
    import numpy as np

    from llmq_jax.commands.progress import with_progress
    from llmq_jax.data import PreferenceEvaluation
    from llmq_jax.layers.axes import replicated
    from llmq_jax.objectives.preference import pair_logprobs

    @jax.jit
    def of_batch(variables, batch):
        return replicated(pair_logprobs(lm.model, variables, batch)[0])

    numbers = {"place": np.arange(len(pairs))}
    result = np.zeros((len(pairs), 2), np.float32)
    batches = PreferenceEvaluation(pairs, options.batch_size, options.context, None, numbers)
    for batch in with_progress(batches, "reference"):
        real = batch["mask"] > 0
        result[batch.pop("place")[real]] = to_host(of_batch(lm.variables, batch))[real]
    return result


def figures(means: dict[str, float]) -> str:
    """The means of an evaluation as text."""
    return (
        f"accuracy {means['rewards/accuracies']:.4f}, margin {means['rewards/margins']:.3f}, rewards "
        f"{means['rewards/chosen']:+.3f} chosen and {means['rewards/rejected']:+.3f} rejected, loss {means['loss']:.4f}"
    )


def distance(options: Options, policy: Any, reference: Any, digest: str | None, validation: list) -> str:
    """A line on the KL divergence of the policy from the reference: E[log policy(answer) - log reference(answer)], over
    answers that the policy samples to held-out prompts. `reference` None: it is loaded again, if it still has this
    digest."""
    import jax
    import numpy as np

    from llmq_jax.data.batching import pad
    from llmq_jax.data.prompts import step_seeds
    from llmq_jax.generation import Sampler, generate
    from llmq_jax.layers.axes import replicated
    from llmq_jax.model_files import load
    from llmq_jax.objectives.logprobs import sequence_logprobs
    from llmq_jax.weight_digest import weight_digest

    if reference is None:
        name = options.reference or options.init_from
        reference = load(name) if options.reference is not None else load_to_train(options)
        if digest not in (None, weight_digest(reference.variables)):
            return f"KL to the reference: not measured, since {name} holds other weights than when this run began"
    longest = min(lm.config.max_position_embeddings for lm in (policy, reference)) - ANSWER_TOKENS
    found = prompts_to_ask((pair.chosen for pair in validation), options, policy.tokenizer)
    prompts = list(itertools.islice((prompt for prompt, _ in found if 0 < len(prompt) <= longest), ANSWERS))
    if not prompts:
        return "KL to the reference: no prompt leaves room for an answer"
    drawn = generate(
        policy, prompts, max_new_tokens=ANSWER_TOKENS, sampler=Sampler(), seed=step_seeds(options.seed, 0, len(prompts))
    )
    answers = [row[:length].tolist() for row, length in zip(drawn.tokens, drawn.lengths, strict=True)]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, lengths = pad(rows, max(map(len, rows)))
    mask = np.arange(tokens.shape[1]) >= np.array([[len(prompt)] for prompt in prompts])

    def logprobs(lm):
        model = lm.model.clone(dtype=options.dtype, attention=options.attention)

        @jax.jit
        def of_rows(variables, tokens, mask, lengths):
            return replicated(sequence_logprobs(model, variables, tokens, mask, lengths=lengths))

        return to_host(of_rows(lm.variables, tokens, mask, lengths))

    ratios = logprobs(policy) - logprobs(reference)
    return (
        f"KL to the reference on {counted(len(rows), 'sampled answer')}: {ratios.mean():.3f} nats an answer, "
        f"{ratios.sum() / drawn.lengths.sum():.4f} a token"
    )


if __name__ == "__main__":
    run(main)
