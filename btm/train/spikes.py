"""Which updates are skipped: NaN, Inf and loss spikes."""

import math

from btm.errors import TrainingError
from btm.schema import Model

_WINDOW = 100
_LEAST_HISTORY = 10


class SpikeState(Model):
    """What the judgement of the next update depends on; stored in every checkpoint."""

    mean_loss: float = 0.0
    """Running mean over the good updates, nats per token."""
    num_good: int = 0
    """Good updates so far."""
    num_skipped: int = 0
    """Skipped updates so far."""
    num_consecutive: int = 0
    """Skipped updates since the last good one."""


def problem_of(loss: float, grad_norm: float, state: SpikeState, spike_factor: float) -> str | None:
    """Say why an update must be skipped; None when it is good.

    All arguments are the same on every rank (loss and gradients are summed over ranks before), hence the answer is.

    Args:
        loss: Mean over all target tokens of the update, nats.
        grad_norm: Global norm of the gradients before clipping.
        state: History.
        spike_factor: A loss above this many times the running mean is a spike.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if state.num_good >= _LEAST_HISTORY and loss > spike_factor * state.mean_loss:
        return f"the loss {loss:.4g} is more than {spike_factor:g} times its running mean {state.mean_loss:.4g}"
    return None


def after_good(state: SpikeState, loss: float) -> SpikeState:
    """State after a good update: the mean of the first 100 losses, then an exponential mean over about 100."""
    num_good = state.num_good + 1
    mean = state.mean_loss + (loss - state.mean_loss) / min(num_good, _WINDOW)
    return state.model_copy(update={"mean_loss": mean, "num_good": num_good, "num_consecutive": 0})


def after_skip(state: SpikeState, update: int, problem: str, max_bad_steps: int) -> SpikeState:
    """State after a skipped update.

    Raises:
        TrainingError: If more than ``max_bad_steps`` updates in a row were bad.
    """
    consecutive = state.num_consecutive + 1
    if consecutive > max_bad_steps:
        raise TrainingError(
            f"update {update}: {problem}, and train.max_bad_steps={max_bad_steps} updates in a row were skipped "
            f"before it; lower train.lr, look at the data of these updates, or raise train.max_bad_steps or "
            f"train.spike_factor, and run again: training continues from the newest checkpoint"
        )
    return state.model_copy(update={"num_skipped": state.num_skipped + 1, "num_consecutive": consecutive})
