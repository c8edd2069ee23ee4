"""Train a reward model: a language model learns which of two answers people prefer.

    python -m train.reward --data prefs.json --init-from runs/mine --out runs/reward
    python -m train.reward --data chats.jsonl --init-from model.gguf --out runs/reward --train all
    python -m train.reward --data prefs.json --init-from gpt2 --out runs/mean --pooling mean --center 0.01

Records have instruction, input, chosen and rejected; or prompt, chosen and rejected, as strings or messages; or chosen
and rejected as messages that begin with the prompt. Prompts are held out with all their pairs. The same command again
resumes a run that was stopped.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.host_copies import to_host
from llmq_jax.options import default_is, no_option
from train.chat_templates import chat_template_digest, with_text_options
from train.devices import on_devices
from train.exports import export_commands
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

LORA_RATE, FULL_RATE = 1e-4, 1e-5
SAMPLES = 3
WIDTH = 80


@dataclass(frozen=True)
class RewardOptions:
    pooling: Literal["last", "mean"] = "last"
    """The reward of a text: that of its last token (last), or the mean over the tokens of its response (mean)."""
    center: float = 0.0
    """Weight, in the loss, of the squared sum of a pair's two rewards, which keeps rewards near zero; 0.01 suits most
    runs."""


@dataclass(frozen=True)
class Options(FineTuningOptions, TuningOptions, RewardOptions, PairOptions):
    # Dataclasses collect the fields of their bases from right to left.
    batch_size: int = 8
    """Pairs in a batch."""
    learning_rate: Annotated[float | None, default_is(f"{LORA_RATE:g} for adapters, else {FULL_RATE:g}")] = None
    """The peak learning rate, reached after the warm-up."""
    sample_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two samples, which are the rewards of a few held-out pairs; 0: never."""
    sample_prompt: None = no_option("on a reward model, which goes on from nothing")


@on_devices
def main(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult."""
    check(options)
    options = filled(options, learning_rate=LORA_RATE if options.train == "lora" else FULL_RATE)

    # JAX has its device now: modules that import JAX may follow.
    from llmq_jax.data import PreferenceBatches, PreferenceEvaluation
    from llmq_jax.model_files import TextFiles
    from llmq_jax.objectives.reward import RewardModel
    from llmq_jax.training import engine, step
    from llmq_jax.training.sharding import own_rows, row_share

    # The pairs, some of them held out, and the model with a head that gives one number.
    sources = sources_of(options)
    left_out = options.left_out()
    training, validation = read_pairs(options, sources, left_out)
    source = load_to_train(options)
    options, source = with_text_options(options, [pair.chosen for pair in training], source)
    if not sources.validation:
        options = filled(options, split_seed=0)
    source, head = with_scalar_head(source, options.seed)
    config = source.config
    learned, held_out = (examples(options, part, source, left_out) for part in (training, validation))
    tell_left_out(left_out)

    # Batches of pairs of similar length.
    size, longest = options.batch_size, options.context
    batches = PreferenceBatches(learned.pairs, size, longest, options.seed, **row_share())
    some = PreferenceEvaluation(held_out.pairs, size, longest, options.evaluate_batches)
    options = with_steps(options, batches.per_epoch, EPOCHS)

    # The model, computing as the options say, and the part of it that trains.
    source, learner = learner_of(source, options, options.batch_size)

    schedule, optimizer = optimizer_of(options)
    objective = RewardModel(learner.model, options.pooling, options.center)
    train_step = train_step_of(options, objective, optimizer)
    eval_step = step.make_eval_step(objective)

    def evaluate(variables):
        return step.evaluate(eval_step, variables, map(own_rows, some))

    print(
        f"{head}\n{learner.described}\n{described(options, learned, held_out, batches.per_epoch)}\n"
        f"{source.model.attention_choice(training=True)}",
        flush=True,
    )
    digests = digests_of({"training": learned, "validation": held_out}, numbered)
    digests |= chat_template_digest(options, source.tokenizer)

    def conclude(result):
        everything = PreferenceEvaluation(held_out.pairs, size, longest)
        figures = step.evaluate(eval_step, result.state.variables, map(own_rows, everything))
        return (
            f"{counted(len(held_out), 'pair')} held out: accuracy {figures['accuracy']:.4f}, "
            f"margin {figures['margin']:.4f}, loss {figures['loss']:.4f}; rewards from {figures['min_reward']:.3f} to "
            f"{figures['max_reward']:.3f}, {figures['mean_reward']:.3f} in the mean"
        )

    return engine.run(
        learner.state(optimizer, options.seed),
        train_step,
        batches,
        run_options(options),
        folder=options.out,
        config={"recipe": "train.reward", **own_options(options, "sample_prompt"), **digests},
        may_change=MAY_CHANGE,
        model_config=config,
        tokenizer=TextFiles(source.tokenizer, source.generation),
        schedule=schedule,
        evaluate=evaluate,
        sample=rewards_of_a_few(options, source.model, held_out.pairs, validation),
        flops_per_token=flops_of(options, learner, [len(answer.tokens) for answer in learned.answers]),
        show=("accuracy", "margin"),
        conclude=conclude,
        # transformers and `llmq classify` read the last token's reward.
        next_commands=export_commands(options.out, config) if options.pooling == "last" else (),
    )


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    rule = "not be negative (0 does not centre)"
    check_preference_options(options, ("center", lambda weight: 0 <= weight < math.inf, rule))


def with_scalar_head(source: Any, seed: int) -> tuple[Any, str]:
    """(the model with a head that gives one number, a description of the head): its own if it has one, else a fresh
    one.

    Its generation config then names the token that transformers will pad with: see `without_padding`.
    """
    from llmq_jax.interop.huggingface import padding
    from llmq_jax.language_model import with_classifier
    from llmq_jax.models.heads import shown

    known = source.config.labels
    if known is not None and len(known) == 1:
        said = f"a scalar head ({shown(known)}), which goes on"
    else:
        source = with_classifier(source, ["reward"], seed)
        said = "a fresh scalar head" + ("" if known is None else f"; the one for {shown(known)} is discarded")
    pad, _ = padding(source)
    return source.replace(generation=source.generation.replace(pad_token_id=pad)), said


def examples(options: Options, part: list, source: Any, left_out: list | None) -> Any:
    """Tokenised pairs, up to the token at which their reward is read."""
    from llmq_jax.data import without_padding

    found, pad = pair_tokens(options, part, source, left_out), source.generation.pad_token_id
    return dataclasses.replace(found, pairs=[without_padding(pair, pad) for pair in found.pairs])


def rewards_of_a_few(options: Options, model: Any, pairs: list, validation: list) -> Any:
    """`sample(variables, step)` -> a few pairs that are held out, each answer with its reward by the variables of a
    training state."""
    import jax

    from llmq_jax.data import PreferenceEvaluation
    from llmq_jax.data.messages import text_of
    from llmq_jax.layers.axes import replicated
    from llmq_jax.objectives.preference import rows_of_pairs
    from llmq_jax.objectives.reward import model_rewards
    from llmq_jax.training.metrics import one_line
    from llmq_jax.training.parts import whole

    by_place = {pair.where: pair for pair in validation}
    pairs = pairs[:SAMPLES]
    (batch,) = PreferenceEvaluation(pairs, len(pairs), options.context)
    order = [index for _, index in sorted((len(pair), index) for index, pair in enumerate(pairs))]  # the batch's
    rows = rows_of_pairs(batch)

    @jax.jit
    def rewards(variables, tokens, lengths, response_mask):
        found, _ = model_rewards(model, variables, tokens, lengths, response_mask, options.pooling)
        return replicated(found.reshape(-1, 2))

    def sample(variables, at_step):
        lines = []
        for index, found in zip(order, to_host(rewards(whole(variables), **rows)), strict=True):
            pair = by_place[pairs[index].where]
            lines.append(one_line(text_of(pair.chosen.chat()[pair.chosen.given - 1]), WIDTH))
            for reward, side, name in zip(found, (pair.chosen, pair.rejected), ("chosen", "rejected"), strict=True):
                lines.append(f"  {reward:+8.3f} {name:8} {one_line(text_of(side.messages[-1]), WIDTH)}")
        return "\n".join(lines)

    return sample


if __name__ == "__main__":
    run(main)
