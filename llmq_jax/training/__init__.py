"""How models are trained: optimizer, step, and the loop that runs them."""

from llmq_jax.training.checkpoints import Checkpoints, find_checkpoint, load_checkpoint_variables
from llmq_jax.training.engine import run
from llmq_jax.training.failures import NonFiniteLoss
from llmq_jax.training.flops import token_flops
from llmq_jax.training.optimizer import adamw, muon, warmup_cosine, warmup_schedule
from llmq_jax.training.plots import plot_losses
from llmq_jax.training.report import RunResult
from llmq_jax.training.run_folder import RunFolder
from llmq_jax.training.run_options import RunOptions
from llmq_jax.training.sharding import make_mesh
from llmq_jax.training.signals import StoppedBySignal
from llmq_jax.training.state import TrainState, create_state
from llmq_jax.training.step import evaluate, make_eval_step, make_train_step

__all__ = [
    "Checkpoints",
    "NonFiniteLoss",
    "RunFolder",
    "RunOptions",
    "RunResult",
    "StoppedBySignal",
    "TrainState",
    "adamw",
    "create_state",
    "evaluate",
    "find_checkpoint",
    "load_checkpoint_variables",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "muon",
    "plot_losses",
    "run",
    "token_flops",
    "warmup_cosine",
    "warmup_schedule",
]


def __dir__() -> list[str]:
    return __all__
