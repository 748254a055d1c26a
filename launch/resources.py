"""Cores, GPUs and memory of this machine, and their division among groups of processes.

Nothing here imports torch: GPUs are listed by ``CUDA_VISIBLE_DEVICES`` or ``nvidia-smi``.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_LEASE_TIMEOUT_S = 1.0
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_cores() -> tuple[int, ...]:
    """Core ids that this process may use: its affinity, cut to the CPU quota of its control group."""
    cores = sorted(os.sched_getaffinity(0))
    quotas = [quota for text in _cgroup_values("cpu.max") if (quota := cpu_quota(text)) is not None]
    return tuple(cores[: min([len(cores), *quotas])])


def cpu_quota(text: str) -> int | None:
    """Whole cores (at least 1) that the text of a ``cpu.max`` file allows; None when it sets no limit."""
    quota, _, period = text.strip().partition(" ")
    if quota == "max" or not quota.isdigit() or not period.isdigit():
        return None
    return max(1, int(quota) // int(period))


def available_gpus(env: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """GPU ids in the form that ``CUDA_VISIBLE_DEVICES`` takes: the visible ones, or all that ``nvidia-smi`` lists.

    Args:
        env: Environment that is looked at; None is this process's own.
    """
    visible = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible_gpus(visible)
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    # UUIDs: the order of nvidia-smi (by bus) is not the order in which CUDA numbers devices.
    command = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listing.splitlines() if line.strip().startswith("GPU-"))


def visible_gpus(value: str) -> tuple[str, ...]:
    """Ids in a ``CUDA_VISIBLE_DEVICES`` value; as in CUDA, the list ends before the first negative or empty one."""
    ids: list[str] = []
    for entry in value.split(","):
        name = entry.strip()
        if not name or name.startswith("-"):
            break
        ids.append(name)
    return tuple(ids)


def available_memory_bytes() -> int:
    """Bytes of memory that can be taken now: what the machine has free, within the limits of its control groups."""
    limits = [int(text) for text in _cgroup_values("memory.max") if text.strip().isdigit()]
    used = psutil.Process().memory_info().rss
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit in limits)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Cores and GPUs that one task has for itself."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


def private_dir() -> Path:
    """Directory for small temporary files that only this user can enter; the same one for all its processes."""
    directory = Path(tempfile.gettempdir()) / f"launch-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
        directory.chmod(0o700)
        return directory
    # Somebody else has taken the name.
    return Path(tempfile.mkdtemp(prefix="launch-"))


class CoreLeases:
    """Advisory claims on cores among all processes of this user on this machine.

    Two drivers (or two supervisors of a cluster) that pin one-core tasks would both choose the first core; a locked
    file per claim lets each see what the others hold. The kernel drops the claims of a process that dies.

    Args:
        group: Claims of one group avoid each other first, whatever others do; a name without dots.
        directory: Where the files are; None is :func:`private_dir`.
    """

    def __init__(self, group: str, directory: Path | None = None) -> None:
        self._group = group
        self._directory = directory or private_dir()
        self._held: dict[int, tuple[int, Path]] = {}

    def take(self, candidates: Sequence[int], count: int) -> tuple[int, ...]:
        """Claim ``count`` of ``candidates``: those with the fewest claims of the group, then of anybody."""
        with contextlib.suppress(OSError), self._alone():
            groups = self._claims()
            ordered = sorted(candidates, key=lambda core: (groups[core, self._group], groups[core, ""]))
            chosen = tuple(sorted(ordered[:count]))
            for core in chosen:
                path = self._directory / f"core-{core}.{self._group}.{secrets.token_hex(4)}"
                self._held[core] = (_locked(path), path)
            return chosen
        return tuple(candidates[:count])

    def release(self, cores: Sequence[int]) -> None:
        """Give up the claims on ``cores``."""
        for core in cores:
            descriptor, path = self._held.pop(core, (-1, self._directory))
            if descriptor >= 0:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        deadline = time.monotonic() + _LEASE_TIMEOUT_S
        while True:
            try:
                descriptor = _locked(self._directory / "cores")
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        try:
            yield
        finally:
            os.close(descriptor)

    def _claims(self) -> Counter[tuple[int, str]]:
        # Per core and group, and per core with the group "" for all together.
        claims: Counter[tuple[int, str]] = Counter()
        for path in self._directory.glob("core-*.*.*"):
            core, group, _ = path.name.removeprefix("core-").split(".")
            try:
                os.close(_locked(path))
                path.unlink()  # its owner is dead
            except BlockingIOError:
                claims.update([(int(core), group), (int(core), "")])
        return claims


class ResourcePool:
    """Divides cores and GPUs among at most ``num_groups`` tasks at a time; no two hold the same core or GPU.

    Args:
        cores: Core ids to divide.
        gpus: GPU ids to divide.
        num_groups: Most tasks at the same time; None is as many as fit.
        leases: Claims by which other processes' choices are avoided; None looks at nobody else.
    """

    def __init__(
        self,
        cores: Sequence[int],
        gpus: Sequence[str] = (),
        *,
        num_groups: int | None = None,
        leases: CoreLeases | None = None,
    ) -> None:
        self._cores = tuple(cores)
        self._gpus = tuple(gpus)
        self._num_groups = num_groups
        self._leases = leases
        self._given: list[Allocation] = []

    def problem(self, num_cpus: int, num_gpus: int) -> str | None:
        """Say why a task of this size could never run here; None when it can."""
        if num_cpus > len(self._cores):
            return f"needs {num_cpus} cores, this machine offers {len(self._cores)}; ask for fewer (num_cpus)"
        if num_gpus > len(self._gpus):
            return f"needs {num_gpus} GPUs, this machine offers {len(self._gpus)}; ask for fewer (num_gpus)"
        return None

    def acquire(self, num_cpus: int, num_gpus: int) -> Allocation | None:
        """Take cores and GPUs for one task; None while too few are free."""
        if self._num_groups is not None and len(self._given) >= self._num_groups:
            return None
        cores = [core for core in self._cores if all(core not in given.cores for given in self._given)]
        gpus = [gpu for gpu in self._gpus if all(gpu not in given.gpus for given in self._given)]
        if len(cores) < num_cpus or len(gpus) < num_gpus:
            return None
        chosen = self._leases.take(cores, num_cpus) if self._leases else tuple(cores[:num_cpus])
        allocation = Allocation(cores=chosen, gpus=tuple(gpus[:num_gpus]))
        self._given.append(allocation)
        return allocation

    def release(self, allocation: Allocation) -> None:
        """Give back what :meth:`acquire` gave."""
        self._given.remove(allocation)
        if self._leases:
            self._leases.release(allocation.cores)


def nodes_problem(nodes: Sequence[Mapping[str, float]], num_cpus: int, num_gpus: int, num_nodes: int = 1) -> str | None:
    """Say why the nodes of a cluster could never hold a task of this size; None when they can.

    Args:
        nodes: ``CPU`` and ``GPU`` of each node.
        num_cpus: Cores of the task on each of its nodes.
        num_gpus: GPUs of the task on each of its nodes.
        num_nodes: Nodes of the task.
    """
    fitting = [node for node in nodes if node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus]
    if len(fitting) >= num_nodes:
        return None
    offered = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
    where = "one node" if num_nodes == 1 else f"each of {num_nodes} nodes"
    return (
        f"needs {num_cpus} CPUs and {num_gpus} GPUs on {where}; the nodes of this cluster have: "
        f"{offered or 'nothing'}; ask for fewer (num_cpus, num_gpus{'' if num_nodes == 1 else ', num_nodes'})"
    )


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _cgroup_values(name: str) -> list[str]:
    # Version 2 only: one line "0::/path"; a limit of any ancestor counts.
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return []
    values: list[str] = []
    folder = _CGROUP_ROOT / path.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(_CGROUP_ROOT):
            break
        with contextlib.suppress(OSError):
            values.append((place / name).read_text(encoding="utf-8"))
    return values
