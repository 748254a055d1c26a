"""The tasks of an executor that wait, and the status of all."""

from collections import deque

from launch.process import check_task
from launch.task import State, Status, Task


class TaskQueue:
    """Tasks in the order of submission: plain first in, first out, so that none starves."""

    def __init__(self) -> None:
        self.waiting: deque[Task] = deque()
        self.statuses: dict[str, Status] = {}
        self.is_closed = False

    def add(self, task: Task, *, problem: str | None) -> None:
        """Take in ``task``.

        Args:
            task: The new task.
            problem: Why the executor could never run it; None when it can.

        Raises:
            ValueError: If there is a problem, the task is malformed, or its name is that of a task that has not ended.
            RuntimeError: If the executor is closed.
        """
        if self.is_closed:
            raise RuntimeError(f"cannot submit task {task.name!r}: the executor is closed")
        check_task(task)
        if problem:
            raise ValueError(f"task {task.name!r} {problem}")
        if task.name in self.statuses and not self.statuses[task.name].is_final:
            raise ValueError(f"task {task.name!r} has not ended; wait for it, cancel it or take another name")
        self.waiting.append(task)
        self.set(task.name, State.queued)

    def set(self, name: str, state: State, reason: str = "") -> None:
        """Note a state that has no exit code."""
        self.statuses[name] = Status(name=name, state=state, reason=reason)

    def withdraw(self, name: str) -> None:
        """Cancel a task that has not begun to run."""
        self.waiting = deque(task for task in self.waiting if task.name != name)
        self.set(name, State.cancelled, "cancelled before it started")

    def is_over(self, name: str) -> bool:
        """Whether a task has ended.

        Raises:
            ValueError: If no task of this name was submitted.
        """
        if name not in self.statuses:
            raise ValueError(f"there is no task {name!r}; submitted were: {', '.join(self.statuses) or 'none'}")
        return self.statuses[name].is_final


def check_num_groups(num_groups: int | None) -> int | None:
    """Return ``num_groups`` when it makes sense.

    Raises:
        ValueError: If it is less than 1.
    """
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, or None for as many as fit; got {num_groups}")
    return num_groups
