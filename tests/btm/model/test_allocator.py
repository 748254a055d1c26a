import subprocess
import sys

from btm.model.allocator import tune_allocator

PROGRAM = """
import resource, sys, torch
from btm.model.allocator import tune_allocator
torch.set_num_threads(1)
tuned = sys.argv[1] == "tuned" and tune_allocator()
for _ in range(10):
    torch.empty(1 << 23).fill_(1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(1 << 23).fill_(1.0)
print(int(tuned), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    tuned, faults = map(int, done.stdout.split())
    return tuned, faults


def test_memory_is_reused_instead_of_faulted_in_again():
    _, plain_faults = _page_faults("plain")
    took_effect, tuned_faults = _page_faults("tuned")
    if took_effect:
        assert tuned_faults < plain_faults / 5


def test_a_second_call_changes_nothing():
    assert tune_allocator() == tune_allocator()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert tune_allocator() is False
