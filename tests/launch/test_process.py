import json
import os
import site
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.process import (
    MessageBuffer,
    ProcessSpec,
    added_import_path,
    check_task,
    encode,
    interpreter_command,
    needs_fresh_interpreter,
    process_specs,
    rank_environment,
)
from launch.resources import Allocation
from launch.task import Task


def task(**fields):
    return Task(**{"name": "a", "module": "m", "log_path": Path("log.txt"), **fields})


def test_the_environment_of_a_rank():
    allocation = Allocation(cores=(2, 3, 4, 5), gpus=("GPU-a",))
    env = {"HOME": "/h", "RANK": "9", "CUDA_VISIBLE_DEVICES": "0,1", "A": "outer"}
    given_task = task(num_processes=2, num_cpus=4, env={"A": "inner"})
    assert rank_environment(given_task, 1, allocation, env=env, rendezvous_file="/r") == {
        "HOME": "/h",
        "A": "inner",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RENDEZVOUS_FILE": "/r",
    }


def test_specs_hold_what_a_fork_needs_and_survive_the_channel():
    allocation = Allocation(cores=(0, 1, 2))
    weird = "new\nline 'q' \u00fc \udcff"
    specs = process_specs(
        task(num_processes=2, arguments=(weird,), env={"X": weird}),
        allocation,
        env={},
        working_dir="/w",
        rendezvous_file="/r",
    )
    assert [spec.env["RANK"] for spec in specs] == ["0", "1"]
    assert {spec.num_threads for spec in specs} == {1}
    assert {spec.cores for spec in specs} == {(0, 1, 2)}
    assert specs[0].log_path == os.path.abspath("log.txt")
    buffer = MessageBuffer()
    data = b"".join(encode({"start": spec.to_json()}) for spec in specs)
    received = [message for index in range(len(data)) for message in buffer.feed(data[index : index + 1])]
    assert [ProcessSpec.from_json(message["start"]) for message in received] == specs


def test_the_command_of_a_fresh_interpreter():
    spec = process_specs(
        task(arguments=("--x", "a b")), Allocation(cores=(0,)), env={}, working_dir="", rendezvous_file=""
    )
    assert interpreter_command(spec[0]) == [sys.executable, "-P", "-m", "m", "--x", "a b"]


@pytest.mark.parametrize(
    ("env", "is_needed"),
    [
        ({}, False),
        ({"OMP_NUM_THREADS": "2", "BTM_X": "1"}, False),
        ({"PYTHONPATH": "/x"}, True),
        ({"LD_PRELOAD": "x"}, True),
    ],
)
def test_variables_that_are_read_at_start_need_a_fresh_interpreter(env, is_needed):
    assert needs_fresh_interpreter(env) is is_needed


def test_a_thread_count_of_the_task_wins():
    spec = process_specs(
        task(env={"OMP_NUM_THREADS": "5"}), Allocation(cores=(0,)), env={}, working_dir="", rendezvous_file=""
    )[0]
    assert (spec.num_threads, spec.env["OMP_NUM_THREADS"], spec.is_forked) == (5, "5", True)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.text()), max_size=5), st.integers(1, 7))
def test_messages_come_out_as_they_went_in(messages, chunk):
    data = b"".join(encode(message) for message in messages)
    buffer = MessageBuffer()
    received = [m for start in range(0, len(data), chunk) for m in buffer.feed(data[start : start + chunk])]
    assert json.dumps(received) == json.dumps(messages)


def test_only_paths_that_an_interpreter_lacks_are_added(tmp_path):
    paths = [
        "",
        "/not/there",
        str(tmp_path),
        os.path.dirname(os.__file__),
        *site.getsitepackages(),
    ]
    assert added_import_path(paths) == os.pathsep.join([os.getcwd(), str(tmp_path)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "must not be empty"),
        ({"num_processes": 0}, "num_processes of task 'a' must be at least 1, got 0"),
        ({"num_cpus": 0}, "num_cpus of task 'a' must be at least 1, got 0"),
        ({"num_gpus": -1}, "num_gpus of task 'a' must be at least 0, got -1"),
        ({"arguments": ("x\0y",)}, "NUL"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"env": {"OMP_NUM_THREADS": "many"}}, "must be a positive number, got 'many'"),
    ],
)
def test_malformed_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_task(task(**fields))
