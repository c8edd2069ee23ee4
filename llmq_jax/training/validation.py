"""What a run is judged by: the mean that its evaluations return, the best step so far, and when to stop waiting for a
better one (early stopping)."""

from collections.abc import Collection, Mapping, Sequence

from llmq_jax.errors import BadInput
from llmq_jax.training.checkpoints import JudgedBy
from llmq_jax.training.metrics import VALIDATION
from llmq_jax.training.plots import Point

LOSS = f"{VALIDATION}loss"


class Validation:
    """The evaluations of a run. `judged_by` is (mean, "lowest" or "highest"): which mean tells how good a step is, and
    which of its values is best. `patience`: the number of evaluations without a new best after which to stop.

    The state that a run begins from, at step `start`, is no step of its own: it has no checkpoint, and is never the
    best one.
    """

    def __init__(self, judged_by: JudgedBy, patience: int | None = None, start: int = 0):
        if judged_by[1] not in ("lowest", "highest"):
            raise BadInput(
                f"judged_by is {judged_by!r}; it must be a mean that evaluate returns, and lowest or highest"
            )
        self.judged_by = judged_by
        self.name = VALIDATION + judged_by[0]
        self.patience = patience
        self.start = start
        self.values: dict[int, float] = {}
        """What the run is judged by, by step."""
        self.losses: dict[int, float] = {}
        """The validation loss by step, which need not be what the run is judged by."""

    def add(self, step: int, means: Mapping[str, float]) -> None:
        """Note an evaluation. BadInput as by `require_judged`."""
        self.require_judged([name.removeprefix(VALIDATION) for name in means])
        if LOSS in means:
            self.losses[step] = means[LOSS]
        if self.name in means and step > self.start:
            self.values[step] = means[self.name]

    def require_judged(self, names: Collection[str]) -> None:
        """BadInput where an evaluation of these means lacks what the run is to be judged by. A run without a loss may
        be judged by nothing, unless it has a patience."""
        wanted = self.judged_by[0]
        if wanted in names:
            return
        if self.patience is not None:
            raise BadInput(
                f"patience is {self.patience}, but evaluate returns no {wanted} to judge the run by; "
                "return it, or leave patience out"
            )
        if self.name != LOSS:
            found = ", ".join(sorted(names)) or "nothing"
            raise BadInput(f"judged_by is {wanted}, and evaluate returns {found}: name one of these, or return it")

    def take_up(self, judged: Sequence[Point], losses: Sequence[Point]) -> None:
        """Take over the evaluations of a run that goes on: what it was judged by, and the validation losses."""
        self.values = {step: value for step, value in judged if step > self.start}
        self.losses = dict(losses)

    def best_step(self, among: Collection[int] | None = None) -> int | None:
        """The best step, of all or of those `among`, the earliest on a tie; None where none of them was judged."""
        return min((step for step in self.values if among is None or step in among), key=self.cost, default=None)

    def best_loss(self) -> float | None:
        """The validation loss of the best step, where that is what the run is judged by."""
        best = self.best_step()
        return None if best is None or self.name != LOSS else self.values[best]

    def cost(self, step: int) -> float:
        """The value that a step is judged by, negated if highest is best, so that lower is better."""
        return self.values[step] if self.judged_by[1] == "lowest" else -self.values[step]

    def patience_is_out(self) -> bool:
        """Whether the last `patience` evaluations brought no new best."""
        best = self.best_step()
        if best is None or self.patience is None:
            return False
        return sum(step > best for step in self.values) >= self.patience

    def patience_text(self) -> str:
        count = "1 evaluation" if self.patience == 1 else f"{self.patience} evaluations in a row"
        return f"{count} without a new best; {self.best_text()}"

    def text(self, step: int) -> str:
        """ "validation reward 0.8000 (best 0.9000 at step 8)", of this step and the best one; where this one was not
        judged, the best one's."""
        best = self.best_step()
        if best is None or step not in self.values:
            return self.best_text()
        values = self.values
        return f"{self.name.replace('_', ' ')} {values[step]:z.4f} (best {values[best]:z.4f} at step {best:,})"

    def best_text(self) -> str:
        """ "best: validation reward 0.9000 at step 8"; "" where no step was judged."""
        best = self.best_step()
        if best is None:
            return ""
        return f"best: {self.name.replace('_', ' ')} {self.values[best]:z.4f} at step {best:,}"
