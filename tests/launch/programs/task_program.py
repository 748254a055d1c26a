"""What the tasks of the tests do; the first argument says which."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def note(path: str, *_: str) -> None:
    """Leave facts about this process in ``path``, in one step."""
    torch = sys.modules.get("torch")
    facts = {
        "pid": os.getpid(),
        "argv": sys.argv,
        "rank": os.environ["RANK"],
        "local_rank": os.environ["LOCAL_RANK"],
        "world_size": os.environ["WORLD_SIZE"],
        "rendezvous": os.environ.get("RENDEZVOUS_FILE"),
        "host": socket.gethostname(),
        "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
        "threads": os.environ["OMP_NUM_THREADS"],
        "torch_threads": torch.get_num_threads() if torch else None,
        "cores": sorted(os.sched_getaffinity(0)),
        "session": os.getsid(0),
        "cwd": os.getcwd(),
        "ray": sorted(name for name in os.environ if name.startswith("RAY_")),
        "flag": os.environ.get("FLAG"),
        "modules": sorted(name for name in sys.modules if "." not in name),
    }
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.rename(path)


def sleep(path: str, seconds: str) -> None:
    note(path)
    time.sleep(float(seconds))


def wait_for(path: str, permission: str) -> None:
    """End as soon as there is a file ``permission``."""
    note(path)
    while not Path(permission).exists():
        time.sleep(0.01)


def say(text: str) -> None:
    print(text)
    print("to stderr", file=sys.stderr)


def fail(text: str) -> None:
    raise RuntimeError(text)


def leak(text: str) -> None:
    """Fail, and let the C library write after the interpreter has ended."""
    libc = ctypes.CDLL(None)
    stream = ctypes.c_void_p.in_dll(libc, "stderr")
    libc.setvbuf(stream, None, 0, 4096)
    libc.fputs(b"leaked 514 functions!\n", stream)
    fail(text)


def tree(path: str) -> None:
    """Start a helper and wait with it."""
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(f"{path}.helper").write_text(str(helper.pid), encoding="utf-8")
    sleep(path, "1000")


def stubborn(path: str) -> None:
    """Answer TERM by a file ``<path>.term`` alone."""
    signal.signal(signal.SIGTERM, lambda *_: Path(f"{path}.term").touch())
    sleep(path, "1000")


def one_fails(path: str) -> None:
    """Rank 1 fails as soon as rank 0, which TERM does not end, is up."""
    if os.environ["RANK"] == "0":
        stubborn(path)
    while not Path(path).exists():
        time.sleep(0.01)
    sys.exit(7)


def last_is_killed(path: str) -> None:
    """The last rank dies by a signal when rank 0 is up."""
    if os.environ["RANK"] == "0":
        sleep(path, "100")
    while not Path(path).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def gloo() -> None:
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    file = os.environ.get("RENDEZVOUS_FILE")
    store = f"file://{file}" if file else "env://"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    value = torch.full((300, 300), rank + 1.0) @ torch.eye(300)
    dist.all_reduce(value)
    print(f"sum {value[0, 0].item():g}")
    dist.destroy_process_group()


ACTIONS = {
    "note": note,
    "exit by rank": lambda *codes: sys.exit(int(codes[int(os.environ["RANK"])])),
    "sleep by rank": lambda path, seconds: sleep(path + os.environ["RANK"], seconds),
    "note by rank": lambda path: note(path + os.environ["RANK"]),
    "sleep": sleep,
    "wait for": wait_for,
    "say": say,
    "exit": lambda code: sys.exit(int(code)),
    "raise": fail,
    "signal": lambda number: os.kill(os.getpid(), int(number)),
    "leak": leak,
    "tree": tree,
    "stubborn": stubborn,
    "one fails": one_fails,
    "last is killed": last_is_killed,
    "gloo": gloo,
}

if __name__ == "__main__":
    ACTIONS[sys.argv[1]](*sys.argv[2:])
