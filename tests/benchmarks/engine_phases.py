"""Where an engine spends an update: the wall time of one process, cut into phases without a gap or an overlap.

A phase is what runs inside of some functions and not inside of those of another phase, so that a copy made by a hook
of the backward pass counts as a copy and not as backward. On a GPU every border waits for the device; updates whose
phases are timed are therefore not those whose speed is.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from btm.train.engine import Engine
from btm.train.flat import FlatParameters
from btm.train.flat_adam import FlatAdamW

FORWARD, BACKWARD, GRADIENTS, NORM, ADAMW, WEIGHTS = PHASES = (
    "forward",
    "backward",
    "gradient copies",
    "norm and loss",
    "AdamW",
    "weights",
)
"""The norm has what else :meth:`Engine.gradients` does, ``weights`` what else :meth:`Engine.step` does: to the type of
forward and backward, to other processes, and the engine's own books."""
_DEEPSPEED = {
    "forward": FORWARD,
    "backward": GRADIENTS,
    "_backward_epilogue": GRADIENTS,
    "optimizer.backward_prologue": GRADIENTS,
    "optimizer.process_gradients": GRADIENTS,
    "optimizer.accumulate_hp_grads_and_remove_lp": GRADIENTS,
    "optimizer.update_hook_state_and_maybe_run_epilogue": GRADIENTS,
}
"""Of DeepSpeed's engine; those of its optimizers differ from stage to stage, and not all are there."""


class PhaseClock:
    """Adds up the time of each phase while it runs; until then, timed functions cost next to nothing."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: Counter[str] = Counter()
        self._device, self._is_running = device, False
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count from here on; what belongs to no phase is counted by none."""
        self._is_running, self._since = True, self._now()
        try:
            yield
        finally:
            self._is_running = False

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """``function`` as a part of ``phase``."""

        def run(*arguments: Any, **options: Any) -> Any:
            if not self._is_running:
                return function(*arguments, **options)
            self._turn()
            self._open.append(phase)
            try:
                return function(*arguments, **options)
            finally:
                self._turn()
                self._open.pop()

        return run

    def time(self, target: Any, name: str, phase: str) -> None:
        """Replace the attribute ``name`` of an object by its timed form."""
        setattr(target, name, self.timed(getattr(target, name), phase))

    def _turn(self) -> None:
        """Give what passed since the last border to the phase that was on."""
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def timed_hooks(clock: PhaseClock) -> Iterator[None]:
    """Around the making of an engine: its own hooks, which take gradients over, are timed for good."""
    from btm.train.megatron_flat import FlatSlice

    kinds: tuple[Any, ...] = (FlatParameters, FlatSlice)
    before = [kind._taker for kind in kinds]
    for kind, taker in zip(kinds, before, strict=True):
        kind._taker = lambda self, key, taker=taker: clock.timed(taker(self, key), GRADIENTS)
    try:
        yield
    finally:
        for kind, taker in zip(kinds, before, strict=True):
            kind._taker = taker


def time_engine(engine: Engine, clock: PhaseClock) -> None:
    """Time an engine that was made under :func:`timed_hooks`; autograd itself is timed by :func:`timed_backward`."""
    clock.time(engine, "gradients", NORM)
    clock.time(engine, "step", WEIGHTS)
    inside: Any = engine
    if isinstance(getattr(inside, "_adam", None), FlatAdamW):
        clock.time(inside._adam, "step", ADAMW)
    elif hasattr(inside, "losses"):
        clock.time(inside.losses, "forward", FORWARD)
        for part in inside._state.parts:
            clock.time(part.flat._adam, "step", ADAMW)
    else:
        clock.time(inside._optimizer, "step", ADAMW)
        for path, phase in _DEEPSPEED.items():
            *owners, name = path.split(".")
            target = getattr(inside._engine, owners[0]) if owners else inside._engine
            if hasattr(target, name):
                clock.time(target, name, phase)


@contextmanager
def timed_backward(clock: PhaseClock) -> Iterator[None]:
    """While this is open, ``backward`` of any tensor, and the torch engine's forward, are timed."""
    import btm.train.torch_engine as torch_engine

    backward, loss_sum = torch.Tensor.backward, torch_engine.loss_sum
    torch.Tensor.backward = clock.timed(backward, BACKWARD)  # pyright: ignore[reportAttributeAccessIssue]
    torch_engine.loss_sum = clock.timed(loss_sum, FORWARD)
    try:
        yield
    finally:
        torch.Tensor.backward = backward
        torch_engine.loss_sum = loss_sum
