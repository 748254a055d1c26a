"""The processes of a task that `btm step` or a Slurm job runs as its own children."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from task_waiting import facts, is_gone, until

PROGRAMS = Path(__file__).parent / "programs"
DRIVER = """
import sys
from pathlib import Path
from launch.slurm_group import StopRequest, run_group
from launch.task import Task
folder = Path(sys.argv[1])
task = Task(name="two", module="task_program", arguments=("stubborn", str(folder / "note")),
            log_path=folder / "two.log", num_processes=2, num_cpus=1)
run_group(task, StopRequest(), stop_s=60.0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_survives_a_driver_that_dies(tmp_path, number):
    """They do not care for TERM, and nobody is left who would send them KILL but the kernel."""
    path = os.pathsep.join([str(PROGRAMS), *(entry for entry in sys.path if entry)])
    driver = psutil.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    facts(tmp_path / "note")
    children = until(lambda: found if len(found := driver.children()) == 2 else None)
    driver.send_signal(number)
    driver.wait(60)
    for child in children:
        until(lambda child=child: is_gone(child.pid))


def test_a_fresh_interpreter_of_the_fork_server_dies_with_it_as_well(tmp_path):
    """A task that gets no fork but an interpreter of its own keeps what the kernel was asked for."""
    code = f"""
import sys
from pathlib import Path
from launch.local import LocalExecutor
from launch.task import Task
import time
folder = Path({str(tmp_path)!r})
executor = LocalExecutor()
executor.submit(Task(name="one", module="task_program", arguments=("stubborn", str(folder / "note")),
                     log_path=folder / "one.log", env={{"PYTHONHASHSEED": "0"}}))
while True:
    executor.poll()
    time.sleep(0.02)
"""
    path = os.pathsep.join([str(PROGRAMS), *(entry for entry in sys.path if entry)])
    driver = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    pid = facts(tmp_path / "note")["pid"]
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    until(lambda: is_gone(pid))
    driver.kill()
    driver.wait()
