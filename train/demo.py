"""The whole journey in one command, as `make demo` runs it: train, generate, export, load the export, compare.

A small GPT-2 learns the source of Python's standard library, byte by byte. Some modules are held out; the loss on them
is the figure that counts. A second call finds the run finished and repeats only the other steps.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from llmq_jax.backend import Device
from llmq_jax.command_line import run
from llmq_jax.counts import counted
from train import pretrain

BOUND = 1.6
"""The validation loss, in nats per byte of held-out modules, below which a sound run stays."""
PROMPT = "def "


@dataclass(frozen=True)
class Options:
    out: str = "runs/demo"
    """Run folder; the export goes to a folder beside it, with -hf after its name."""
    steps: int = pretrain.RUNS["demo"].steps
    """Training steps (optimizer updates) in the whole run. With fewer, the validation loss will miss its bound."""
    device: Device = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""


def main(options: Options) -> int:
    started = time.perf_counter()
    out, export = Path(options.out), Path(f"{options.out}-hf")

    # Train, or find the run finished.
    settings = pretrain.starting_options({"steps": str(options.steps)})
    settings = replace(settings, out=options.out, steps=options.steps, device=options.device)
    result = pretrain.pretrain(settings)

    import numpy as np

    from llmq_jax.generation import Sampler, generate
    from llmq_jax.interop.huggingface import save_hf
    from llmq_jax.model_files import load

    # Generate from the checkpoint, export it, and load the export again.
    lm = load(out)
    room = lm.config.max_position_embeddings - len(lm.tokenizer.encode(PROMPT))
    text = PROMPT + generate(lm, PROMPT, max_new_tokens=room, sampler=Sampler(temperature=0.7)).text[0]
    save_hf(lm, export, overwrite=True)
    tokens = np.random.default_rng(0).integers(lm.config.vocab_size, size=(4, lm.config.max_position_embeddings))
    identical = np.array_equal(lm.logits(tokens), load(export).logits(tokens))

    reached = result.validation_loss is not None and result.validation_loss <= BOUND
    show(result, text, out, export, identical, reached, time.perf_counter() - started)
    return 0 if identical and reached else 1


def show(result, text: str, out: Path, export: Path, identical: bool, reached: bool, seconds: float) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from llmq_jax.training.metrics import printable

    def verdict(good: bool, text: str) -> Text:
        return Text(text, style="green" if good else "bold red")

    wanted = f"within the bound of {BOUND}" if reached else f"MISSED the bound of {BOUND}"
    validation = "not measured" if result.validation_loss is None else f"{result.validation_loss:.3f} nats per byte"
    trained = f"{counted(result.step, 'step')}, {result.tokens:,} bytes"
    if result.tokens_per_second is not None:  # a single step tells no speed
        trained += f", {result.tokens_per_second:,.0f} a second"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_row("validation", f"{validation} on held-out modules")
    table.add_row("", verdict(reached, wanted))
    table.add_row("export", verdict(identical, f"loaded again: logits {'identical' if identical else 'DIFFER'}"))
    table.add_row("trained", trained)
    table.add_row("took", f"{seconds:.0f} s in all")
    table.add_row("")
    table.add_row("files", f"{out}/report.html, losses.png, samples.txt, metrics.jsonl, config.json, checkpoints")
    table.add_row("", f"{export}/model.safetensors, config.json, tokenizer.json: for transformers")
    table.add_row("")
    table.add_row("next", f'llmq generate {out} --prompt "import "')
    table.add_row("", f"llmq evaluate {export} README.md")
    table.add_row("", "python -m train.pretrain --data my.txt --out runs/mine")
    table.add_row("", "python -m train.pretrain --help")

    console = Console(highlight=False)
    console.print()
    console.print(Panel(Text(printable(text)), title="written by the model", title_align="left"))
    console.print(Panel(table, title="demo", title_align="left"))


if __name__ == "__main__":
    run(main)
