"""A run as one self-contained HTML page: figures, curves, samples, times and options.

    python -m train.report runs/mine

A run writes it at its end as report.html; this command writes it for a run that is under way, was stopped, or is older.
"""

from dataclasses import dataclass

from llmq_jax.command_line import run
from llmq_jax.options import Positional


@dataclass(frozen=True)
class Options:
    run: Positional[str]
    """Run folder."""


def main(options: Options) -> None:
    from llmq_jax.training.report_page import write_report_page

    print(write_report_page(options.run))


if __name__ == "__main__":
    run(main)
