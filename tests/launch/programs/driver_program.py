"""A driver that the tests interrupt and kill: runs two tasks and waits."""

import signal
import sys
import time
from pathlib import Path

from launch.local import LocalExecutor
from launch.ray_executor import RayExecutor
from launch.task import Executor, Task


def main(kind: str, folder: Path) -> None:
    # A shell starts background jobs, and so perhaps these tests, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    executor: Executor = RayExecutor(num_cpus=2) if kind == "ray" else LocalExecutor()
    try:
        for name in ("first", "second"):
            arguments = ("tree", str(folder / name))
            executor.submit(
                Task(name=name, module="task_program", arguments=arguments, log_path=folder / f"{name}.log")
            )
        while True:
            executor.poll()
            time.sleep(0.02)
    except KeyboardInterrupt:
        (folder / "interrupted").write_text(executor.poll()["first"].state, encoding="utf-8")
        while not (folder / "go on").exists():
            time.sleep(0.01)
    finally:
        executor.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
