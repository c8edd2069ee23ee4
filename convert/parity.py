"""Compare a model with its counterpart in transformers, layer by layer and inside the layers.

The same tokens go through transformers (eager attention, float32, on the CPU) and through this project. Shown are the
largest differences of hidden states, logits, loss and the gradient of every parameter, and the first place above the
tolerance, in the order of computation, that rounding does not explain. Exit code 1 if there is one, else 0.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.backend import Device, use_device
from llmq_jax.command_line import run
from llmq_jax.errors import BadInput, at_place, did_you_mean
from llmq_jax.options import Positional, default_is, option_name

ROW = 48
"""Tokens in a row, unless a window of attention asks for more."""
LONGEST_WINDOW = 1024
"""Rows exceed longer windows on request only: the cost of eager attention grows with the square of the row."""
TOLERANCE = {"float32": 1e-4, "bf16": 1e-3}


@dataclass(frozen=True)
class Options:
    model: Annotated[Positional[str | None], default_is("none")] = None
    """A Hugging Face folder, or a hub id."""
    random: Annotated[str | None, default_is("none")] = None
    """Instead of a folder, a small random model of this model_type: gpt2, llama, qwen3, mixtral, gemma3_text, ..."""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16 compares what both sides predict in bfloat16 with what transformers predicts in float32."""
    batch_size: int = 2
    """Rows of random tokens."""
    length: Annotated[int | None, default_is(f"{ROW}, or longer than the model's windows of attention")] = None
    """Tokens in a row."""
    seed: int = 0
    """Seed of the tokens, of --random (which model, and its weights) and of --inject."""
    tolerance: Annotated[float | None, default_is("1e-4, for bf16 1e-3")] = None
    """Largest relative difference: for hidden states and logits to the root mean square of a token's values, for
    gradients to their largest element. For bf16: mean KL divergence in nats."""
    inject: Annotated[str | None, default_is("nothing")] = None
    """Perturb a parameter of ours, given by either side's name, to see that the check finds it."""
    device: Device = "cpu"
    """Where our side computes."""

    @property
    def limit(self) -> float:
        return TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance


def main(options: Options) -> int:
    _check(options)
    use_device(options.device)
    from rich.console import Console

    console = Console(highlight=False)
    with _folder(options) as folder:
        config = _read_config(folder)
        if options.inject is not None:
            _check_name(options.inject, config)
        tokens = _draw_tokens(options, config)
        check = _check_distributions if options.dtype == "bf16" else _check_places
        good, summary = check(console, options, folder, config, tokens)
    console.print()
    # Whole, however narrow the terminal, so that it can be searched for.
    console.print(summary, style="bold green" if good else "bold red", markup=False, soft_wrap=True)
    return 0 if good else 1


def _check_places(console: Any, options: Options, folder: Path, config: Any, tokens: Any) -> tuple[bool, str]:
    """(whether there is parity, the last line)."""
    from convert import parity_reference, parity_report
    from convert.parity_check import compare_models
    from convert.parity_trace import first_difference
    from convert.parity_weights import first_gradient

    with _status("transformers and ours, forward and backward"):
        model = parity_reference.load(folder)
        found = compare_models(model, config, tokens, inject=options.inject, seed=options.seed)
    first = first_difference(found.places, options.limit)
    _show_heading(console, options, config, tokens)
    parity_report.show_hidden_states(console, found.places, options.limit, first)
    parity_report.show_gradients(console, found.gradients, options.limit)
    parity_report.show_unmatched(console, found.unmatched)
    parity_report.show_noisy(console, found.places, found.gradients, options.limit)
    tolerance = f"tolerance {_short(options.limit)}"
    if first:
        parity_report.show_first(console, first, options.limit, found.weights)
        return False, f"first difference: {first}: {first.difference.relative:.1e}, {tolerance}"
    if gradient := first_gradient(found.gradients, options.limit):
        where = f"gradient of {gradient.key} ({gradient.ours})"
        return False, f"first difference: {where}: {gradient.difference.relative:.1e}, {tolerance}"
    if count := sum(map(len, found.unmatched)):
        return False, f"no parity: what is computed agrees, but parameters of one side only: {count}"
    logits = found.output("logits").output.relative
    return True, f"parity: {logits:.1e} largest difference in logits, {tolerance}"


def _check_distributions(console: Any, options: Options, folder: Path, config: Any, tokens: Any) -> tuple[bool, str]:
    """(whether there is parity, the last line)."""
    from convert import parity_report
    from convert.parity_check import compare_distributions

    with _status("transformers and ours in bfloat16"):
        theirs, ours = compare_distributions(folder, config, tokens, inject=options.inject, seed=options.seed)
    _show_heading(console, options, config, tokens)
    parity_report.show_distributions(console, (theirs, ours))
    # The logits of large models are coarse in bfloat16: we may be up to twice as far off as transformers is.
    good = ours.mean <= max(options.limit, 2 * theirs.mean)
    return good, (
        f"{'parity' if good else 'no parity'}: {ours.mean:.1e} nats of mean KL from float32, "
        f"transformers {theirs.mean:.1e}, tolerance {_short(options.limit)}"
    )


def _show_heading(console: Any, options: Options, config: Any, tokens: Any) -> None:
    from importlib.metadata import version

    rows, length = tokens.shape
    what = f"random {config.model_type}" if options.random else f"{options.model} ({config.model_type})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "jax"))
    console.print(what, style="bold", markup=False)
    console.print(f"{rows} x {length} random tokens, seed {options.seed}, in {options.dtype}", style="dim")
    console.print(versions, style="dim")
    if options.inject is not None:
        console.print(f"injected: noise on {options.inject}", style="yellow", markup=False)
    if (window := _window(config)) >= length:
        console.print(f"rows do not exceed the window of {window}; --length {window + 16} does", style="yellow")


def _check(options: Options) -> None:
    """Refuse what can be refused before anything is loaded."""
    from llmq_jax.interop.architectures import TABLES

    if (options.model is None) == (options.random is None):
        raise BadInput("give either a Hugging Face folder, or --random and an architecture: --random gpt2")
    if options.random is not None and options.random not in TABLES:
        raise BadInput(
            f"--random {options.random}: there is no such architecture; {did_you_mean(options.random, TABLES)}"
        )
    for name, least in (("batch_size", 1), ("length", 2), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise BadInput(f"{option_name(name)} {value} is too small; choose at least {least}")
    if not options.limit > 0:
        raise BadInput(f"--tolerance {options.tolerance} is not positive; choose 1e-4, for example")


def _check_name(name: str, config: Any) -> None:
    """Refuse a parameter that is not there before transformers is loaded, which takes its time."""
    from convert.parity_weights import find
    from llmq_jax.interop.architectures import weight_table

    find(name, weight_table(config.model_type).placements(config))


@contextlib.contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """The folder to compare: given, downloaded, or made for the occasion."""
    from llmq_jax.interop.huggingface import find

    if options.model is not None:
        yield find(options.model)
        return
    from convert.parity_reference import random_model

    with tempfile.TemporaryDirectory() as folder:
        with _status("a random model"):
            random_model(options.random, options.seed).save_pretrained(folder)
        yield Path(folder)


def _read_config(folder: Path) -> Any:
    from llmq_jax.interop import config_from_hf
    from llmq_jax.interop.tensor_files import read_json

    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    if "model_type" not in values:  # as in a run folder
        raise BadInput(
            f"{folder}: has no config.json with a model_type; give a Hugging Face folder (python -m convert.to_hf "
            "writes one)"
        )
    with at_place(path):
        config = config_from_hf(values)
    rope = getattr(config, "rope_parameters", None)
    if rope is not None and rope.rope_type == "dynamic":
        # To transformers max_position_embeddings is the trained length, and longer rows are allowed: only these scale.
        config = dataclasses.replace(config, max_position_embeddings=int(rope.factor * config.max_position_embeddings))
    return config


def _draw_tokens(options: Options, config: Any) -> Any:
    """Random tokens [B, T]."""
    import numpy as np

    longest, window = config.max_position_embeddings, _window(config)
    length = options.length
    if length is None:
        length = min(longest, ROW if window > LONGEST_WINDOW else max(ROW, window + 16))
    if length > longest:
        raise BadInput(f"--length {length} exceeds the model's context; choose at most {longest}")
    return np.random.default_rng(options.seed).integers(0, config.vocab_size, (options.batch_size, length))


def _window(config: Any) -> int:
    """The longest window of attention among the config's fields; 0 where there is none."""
    values = [getattr(config, field.name) for field in dataclasses.fields(config) if "window" in field.name]
    return max((value for value in values if type(value) is int), default=0)


def _short(tolerance: float) -> str:
    """1e-4 rather than 0.0001 or 1e-04."""
    import numpy as np

    return np.format_float_scientific(tolerance, trim="-", exp_digits=1)


def _status(text: str) -> contextlib.AbstractContextManager:
    """A spinner on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


if __name__ == "__main__":
    run(main)
