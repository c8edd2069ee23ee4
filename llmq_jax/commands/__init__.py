"""The `llmq` command: one verb a file, each a docstring, a dataclass of options and a `main` function.

Verbs import JAX and the library inside `main`: help and complaints about options do not wait for them.
"""

from llmq_jax import command_line

VERBS = {
    "generate": "llmq_jax.commands.generate",
    "chat": "llmq_jax.commands.chat",
    "classify": "llmq_jax.commands.classify",
    "evaluate": "llmq_jax.commands.evaluate",
    "compare": "llmq_jax.commands.compare",
    "models": "llmq_jax.commands.models",
    "env": "llmq_jax.commands.env",
    "completion": "llmq_jax.commands.completion",
}
TRAINED = (
    "models are trained by python -m train.pretrain, train.instruct, train.classifier, train.reward, train.dpo and "
    "train.grpo"
)
CONVERTED = "models are converted by python -m convert.to_hf and convert.from_hf"
ELSEWHERE = {
    **dict.fromkeys(
        ("train", "pretrain", "finetune", "instruct", "sft", "classifier", "reward", "dpo", "grpo"), TRAINED
    ),
    **dict.fromkeys(("convert", "export", "import"), CONVERTED),
}
"""{a verb that there is not: what to do instead}."""


def main() -> None:
    """Entry point of the `llmq` script."""
    command_line.run(VERBS, program="llmq", elsewhere=ELSEWHERE)
