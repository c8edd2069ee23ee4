"""Which part of a model learns in fine-tuning: all of it, its last blocks, its head, or adapters beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, NamedTuple

from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, default_is, named_as_options, no_option, refuse_idle
from train.devices import check_mesh
from train.options import RecipeOptions, model_of


@dataclass(frozen=True)
class TuningOptions:
    train: Literal["lora", "all", "blocks", "head"] = "lora"
    """lora: low-rank adapters, and a classifier's head; all: every parameter; blocks: the last --blocks layers, the
    final norm and the head (unless it is tied to the embedding); head: the head alone."""
    blocks: Annotated[int | None, default_is("1")] = None
    """How many of the last layers train, with --train blocks."""
    lora_rank: Annotated[int | None, default_is("8")] = None
    """Rank of the adapters."""
    lora_alpha: Annotated[float | None, default_is("twice the rank")] = None
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    lora_targets: Annotated[str | None, default_is("all-linear")] = None
    """Matrices with adapters: all-linear, attention, mlp, or names separated by commas (q_proj,v_proj)."""
    lora_layers: Annotated[str | None, default_is("all")] = None
    """Layers with adapters, counted from 0: 0,1,2 or 20-29."""
    lora_dropout: Annotated[float | None, default_is("0")] = None
    """Dropout rate, in training, on the adapters' input."""
    lora_variant: Annotated[Literal["lora", "dora", "lora-xs", "tinylora"] | None, default_is("lora")] = None
    """dora: also learn the magnitude of each column; lora-xs: learn only a rank x rank matrix between fixed factors;
    tinylora: learn only --lora-numbers coefficients that mix fixed random matrices in its place."""
    lora_rslora: Flag = False
    """Divide alpha by the square root of the rank instead of the rank."""
    lora_numbers: Annotated[int | None, default_is("64")] = None
    """How many numbers TinyLoRA trains for each matrix."""
    lora_tied: Flag = False
    """Let all matrices share TinyLoRA's numbers."""
    lora_whole: Annotated[str | None, default_is("none")] = None
    """Matrices that train whole beside the adapters, which new tokens need: token_embedding, lm_head, or both,
    separated by a comma; or transformers' names, such as embed_tokens."""
    base_dtype: Annotated[Literal["float32", "bfloat16"] | None, default_is("float32")] = None
    """Type of the frozen weights beside the adapters: bfloat16 takes half the memory."""

    @property
    def weight_dtype(self) -> str:
        """Type of the weights that stay frozen; those that train are float32."""
        return self.base_dtype or "float32"


LORA_FIELDS = {
    name: "use_rslora" if name == "lora_rslora" else name.removeprefix("lora_")
    for name in (field.name for field in fields(TuningOptions))
    if name.startswith("lora_")
}
"""{option of the adapters: its field of `LoRA`}"""


@dataclass(frozen=True)
class FineTuningOptions(RecipeOptions):
    """The options that every recipe has, with the defaults of fine-tuning."""

    steps: Annotated[int | None, default_is("as many as --epochs takes")] = None
    """Training steps (optimizer updates) in the whole run."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's first and second moment."""
    weight_decay: float = 0.0
    """Weight decay of kernels and embeddings (not of norms and biases), multiplied by the learning rate."""
    preset: None = no_option("in fine-tuning, which starts from the model of --init-from")


def load_to_train(options: TuningOptions) -> Any:
    """The model of --init-from, its weights in --base-dtype, float32 unless given, but for those that train beside
    adapters: a classifier's head, and what is whole, are not rounded."""
    import jax

    from llmq_jax.interop.peft import module_names
    from llmq_jax.layers.fresh_adapters import own_names
    from llmq_jax.layers.lora import trained_whole
    from llmq_jax.model_files import load
    from llmq_jax.models.heads import SCORE

    dtype = options.weight_dtype
    lm = load(options.init_from, dtype=dtype)
    asked = own_names(_names(options.lora_whole or ""), module_names(lm.config))
    trains = lm.params.keys() & {SCORE, *trained_whole(lm.variables), *asked}
    if dtype == "float32" or not trains:
        return lm
    del lm  # there need not be room for both
    lm = load(options.init_from)  # in its own types
    params = {
        name: tree if name in trains else jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
        for name, tree in lm.params.items()
    }
    return lm.replace(variables={**lm.variables, "params": params})


class Prepared(NamedTuple):
    """What a run trains, as `prepared` returns it."""

    model: Any
    """Trains and is evaluated on the variables of a training state; to sample, take `training.parts.whole` of them."""
    variables: dict
    trainable: tuple[str, ...]
    """The collections that train."""
    described: str
    """One line for the start of the run."""

    def state(self, optimizer: Any, seed: int) -> Any:
        """The training state of step 0, whose steps consume the variables."""
        from llmq_jax.training.state import create_state

        return create_state(self.variables, optimizer, seed=seed, trainable=self.trainable)


def check_what_trains(options: TuningOptions) -> None:
    """BadInput for an option that would have no effect."""
    cases = [("blocks", options.train != "blocks", "without --train blocks")]
    cases += [("base_dtype", options.train != "lora", "without --train lora")]
    cases += [(name, options.train != "lora", "without --train lora") for name in LORA_FIELDS]
    of_tiny = ("lora_numbers", "lora_tied")
    cases += [(name, options.lora_variant != "tinylora", "without --lora-variant tinylora") for name in of_tiny]
    refuse_idle(options, cases)
    if options.optimizer == "muon" and options.train in ("lora", "head"):
        raise BadInput(
            f"--optimizer muon has no effect with --train {options.train}, which trains no matrix of a layer; leave it "
            "out, or take --train all or blocks"
        )
    if options.blocks is not None and options.blocks < 1:
        raise BadInput(f"--blocks is {options.blocks} and must be at least 1; --train head trains the head alone")


def learner_of(lm: Any, options: FineTuningOptions, rows: int, *, drops: bool = True) -> tuple[Any, Prepared]:
    """(the model, computing as the options say, without its variables; the part of it that trains, with them). `drops`:
    whether the objective applies dropout in training.

    BadInput where the model cannot compute so, or --mesh does not fit it, or batches of this many rows; with --layout,
    print the table of shardings and exit."""
    lm = lm.replace(model=model_of(options, lm.config, drops))
    learner = prepared(lm, options)
    check_mesh(options, learner.variables, rows)
    return lm.replace(variables={}), learner  # they would keep layers that were cut in two in memory, whole


def prepared(lm: Any, options: TuningOptions) -> Prepared:
    """The model and its variables, split into what trains and what is frozen."""
    from llmq_jax.interop.peft import module_names
    from llmq_jax.layers import lora
    from llmq_jax.layers.fresh_adapters import add_adapters
    from llmq_jax.models import parameter_count
    from llmq_jax.models.decoder import PARAMS
    from llmq_jax.models.deepseek3 import MTP
    from llmq_jax.models.heads import LM_HEAD, SCORE
    from llmq_jax.training.parts import FROZEN, freeze, freeze_all_but, train_adapters

    model, variables = lm.model, lm.variables
    if options.train != "lora":
        lm.require_no_adapters(options.init_from)
    if options.train == "all":
        total = parameter_count(variables[PARAMS])
        described = f"training all {total:,} parameters"
        if MTP in variables[PARAMS]:  # they get no gradient, and weight decay would shrink them
            variables = freeze(variables, (MTP,))
            numbers, whose = parameter_count(variables[PARAMS]), "multi-token prediction, which train.pretrain trains"
            described = f"training {numbers:,} of {total:,} parameters (all but those of {whose})"
        return Prepared(model, variables, (PARAMS,), described)
    classifier = lm.config.labels is not None
    if options.train == "lora":
        if lora.LORA not in variables:
            with named_as_options(**{f"LoRA: {field}": name for name, field in LORA_FIELDS.items()}):
                spec = _spec(options)
                variables = add_adapters(variables, model.layer_paths(), spec, module_names(lm.config), options.seed)
        else:
            why = "on --init-from, which has adapters already, and they go on as they are"
            refuse_idle(options, ((name, True, why) for name in LORA_FIELDS))
        numbers = lora.trained_numbers(variables)
        model, variables, trainable = train_adapters(model, variables, (SCORE,) if classifier else ())
        numbers += parameter_count(variables[PARAMS]) if PARAMS in trainable else 0
    else:
        blocks = 0 if options.train == "head" else 1 if options.blocks is None else options.blocks
        head = SCORE if classifier else LM_HEAD
        if options.train == "head" and head not in variables[PARAMS]:
            raise BadInput("--train head: this model's head is its embedding; choose blocks, lora or all")
        model, variables = freeze_all_but(model, variables, blocks, (head,))
        trainable = (PARAMS,)
        numbers = parameter_count(variables[PARAMS])
    whole = lora.trained_whole(variables)
    stays = sorted(variables.get(lora.LORA_FIXED, {}).get(lora.WHOLE, {}).keys() - whole)
    total = sum(parameter_count(tree) for name, tree in variables.items() if name in (PARAMS, FROZEN, lora.LORA))
    described = f"training {numbers:,} of {total:,} parameters ({', '.join((options.train, *sorted(whole)))})"
    if stays:
        described += f"; what came with the adapters, but not as modules_to_save, stays as it is: {', '.join(stays)}"
    return Prepared(model, variables, trainable, described)


def flops_of(
    options: TuningOptions, learner: Prepared, lengths: Sequence[int], unembedded: float = 1.0
) -> float | None:
    """FLOP of a token in training: see `token_flops`. None where its formula does not apply: the layers below those
    that train have no backward pass, or an embedding or a head trains beside adapters."""
    from llmq_jax.layers.lora import trained_whole
    from llmq_jax.training.flops import token_flops

    if options.train not in ("all", "lora") or learner.model.frozen_layers or trained_whole(learner.variables):
        return None
    return token_flops(learner.model.config, lengths, adapters=options.train == "lora", unembedded=unembedded)


def _spec(options: TuningOptions) -> Any:
    """The adapters' options, as far as they are given, as fields of `LoRA`."""
    from llmq_jax.layers.lora import LoRA

    given = {field: value for name, field in LORA_FIELDS.items() if (value := getattr(options, name)) is not None}
    for name, read in (("targets", _names), ("layers", _layers), ("whole", _names)):
        if name in given:
            given[name] = read(given[name])
    return LoRA(**given)


def _names(text: str) -> tuple[str, ...]:
    """("query", "value") of "query,value"."""
    return tuple(name.strip() for name in text.split(","))


def _layers(text: str) -> tuple[int, ...]:
    """(0, 1, 5) of "0-1,5"."""
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found = range(int(first), int(last or first) + 1)
        except ValueError:
            found = ()
        if not found:
            raise BadInput(f"--lora-layers {text!r} is no list of layers; write 0,1,2 or 20-29")
        layers += found
    return tuple(layers)
