"""A Slurm of its own on one machine, for the tests: munge, a controller and nodes in network namespaces.

Every daemon runs in the foreground as a child of this process, so that it is ended by its handle, and everything lies
in one directory. A node is a network namespace with an address and a host name; :meth:`Cluster.cut_off` takes it off
the network and :meth:`Cluster.kill_node` ends all that runs on it. Needs root, ``ip``, ``nsenter`` and Debian's
packages ``slurm-wlm`` and ``munge``.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_FINAL = ("CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare")
_GPUS = 8
"""That each node claims; there is none."""
_SBIN = "/usr/sbin:/sbin"
_CONF = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=5
KillWait={kill_wait_s}
ReturnToService=2
NodeName={prefix}[0-{last}] NodeHostname={prefix}[0-{last}] NodeAddr={network}.[10-{last_address}] Port={node_port} \
Gres=gpu:{gpus} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=30 PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=ALL DefaultTime=10 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=10 MaxTime=30 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL DefaultTime=10 MaxTime=30 PriorityTier=20 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge iproute2 util-linux)"
    return None if os.getuid() == 0 else "needs root, for network namespaces"


class Cluster:
    """A running cluster; :meth:`close` ends it.

    Args:
        directory: Receives keys, state and logs; its path must be short (sockets).
        num_nodes: Nodes.
        cpus: Cores that each node claims.
        kill_wait_s: Seconds between TERM and KILL of a cancelled job.
    """

    def __init__(self, directory: Path, *, num_nodes: int = 2, cpus: int = 2, kill_wait_s: int = 20) -> None:
        self.directory = directory
        self.prefix = f"t{os.getpid() % 10000}n"
        self.nodes = [f"{self.prefix}{index}" for index in range(num_nodes)]
        self._network = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        self._bridge = f"{self.prefix}br"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
            "SLURM_CONF": str(directory / "slurm.conf"),
        }
        for name in ("state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (directory / name).mkdir(parents=True)
        try:
            self._start(cpus, kill_wait_s)
        except BaseException:
            self.close()
            raise

    def command(self, *arguments: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Output of a command that speaks to this cluster."""
        done = subprocess.run(
            arguments, env=self.env | (env or {}), capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments} exited with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def sbatch(self, *arguments: str, env: dict[str, str] | None = None) -> int:
        """Submit; returns the id of the job."""
        return int(self.command("sbatch", "--parsable", *arguments, env=env))

    def state(self, job: int | str) -> str:
        """State of a job, such as RUNNING; empty when the controller has forgotten it."""
        return self.field(job, "JobState")

    def field(self, job: int | str, name: str) -> str:
        """One field of ``scontrol show job``."""
        fields = self.command("scontrol", "--oneliner", "show", "job", str(job), check=False).split()
        return next((field.partition("=")[2] for field in fields if field.startswith(f"{name}=")), "")

    def jobs(self, *options: str) -> dict[int, str]:
        """Ids and names of the jobs in the queue."""
        lines = self.command("squeue", "--noheader", "--array", "--format=%A %j", *options).splitlines()
        return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines}

    def wait_for(self, job: int | str, *states: str, timeout_s: float = 120.0) -> str:
        """Wait until a job is in one of ``states``, sparing it the two minutes that Slurm lets a requeued one wait."""

        hurried: set[str] = set()

        def look() -> str | None:
            state = self.state(job)
            restart = self.field(job, "Restarts")
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime" and restart not in hurried:
                # Not at once: the node refuses a job within the second in which it was revoked.
                hurried.add(restart)
                self.command("scontrol", "update", f"JobId={job}", "StartTime=now+5", check=False)
            if state in _FINAL and state not in states:
                raise AssertionError(f"job {job} is {state}, not {states}")
            return state if state in states else None

        return until(look, timeout_s=timeout_s, what=lambda: f"job {job} is {self.state(job)}, not {states}")

    def limit(self, job: int | str, *, minutes_more: int) -> None:
        """Move the limit of a running job to so many minutes from now, rounded up to whole ones of its own time."""
        hours, minutes, _ = map(int, self.field(job, "RunTime").split(":"))
        limit = 60 * hours + minutes + 1 + minutes_more
        self.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def node_state(self, node: str) -> str:
        """State of a node, such as IDLE or DOWN*."""
        fields = self.command("scontrol", "--oneliner", "show", "node", node, check=False).split()
        return next((field.partition("=")[2] for field in fields if field.startswith("State=")), "")

    def pids(self, node: str) -> list[int]:
        """Processes on a node: those in its network namespace."""
        own = os.stat(f"/proc/{self._daemons[node].pid}/ns/net").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.stat(entry / "ns/net").st_ino == own:
                    found.append(int(entry.name))
        return found

    def kill_node(self, node: str) -> None:
        """KILL to everything on a node, as a power cut does."""
        os.kill(self._daemons[node].pid, signal.SIGSTOP)  # keeps the namespace while the rest goes
        for pid in self.pids(node):
            if pid != self._daemons[node].pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def cut_off(self, node: str, *, up: bool = False) -> None:
        """Take a node off the network, or put it back; what runs on it goes on."""
        self.command("ip", "link", "set", f"{node}v", "up" if up else "down")

    def start_node(self, node: str) -> None:
        """Start a node that has not been started, or was killed."""
        index = self.nodes.index(node)
        script = (
            f"hostname {node} && mount --bind {self.directory}/hosts /etc/hosts && ip link set lo up && "
            f"until ip addr show eth0 2>/dev/null | grep -q inet; do sleep 0.02; done && exec slurmd -D -N {node}"
        )
        daemon = self._spawn(node, ["unshare", "--net", "--uts", "--mount", "sh", "-c", script])
        until(lambda: os.stat(f"/proc/{daemon.pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino)
        inside = ("nsenter", f"--target={daemon.pid}", "--net", "ip")
        self.command("ip", "link", "add", f"{node}v", "type", "veth", "peer", "name", "eth0", "netns", str(daemon.pid))
        self.command("ip", "link", "set", f"{node}v", "master", self._bridge, "up")
        self.command(*inside, "link", "set", "eth0", "up")
        self.command(*inside, "addr", "add", f"{self._network}.{10 + index}/24", "dev", "eth0")

    def close(self) -> None:
        """End all jobs, all daemons and everything that is left on the nodes."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(Exception):
                for job in self.jobs():
                    self.command("scancel", str(job), check=False)
                until(lambda: not self.jobs(), timeout_s=30)
        for node in self.nodes:
            if node in self._daemons:
                self.kill_node(node)
        for name in ("slurmctld", "munged"):
            if name in self._daemons:
                self._daemons[name].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._daemons[name].wait(10)
                self._daemons[name].kill()
                self._daemons.pop(name).wait()
        self.command("ip", "link", "del", self._bridge, check=False)

    def _start(self, cpus: int, kill_wait_s: int) -> None:
        conf = _CONF.format(
            host=socket.gethostname().partition(".")[0],
            address=f"{self._network}.1",
            port=_free_port(),
            node_port=_free_port(),
            directory=self.directory,
            prefix=self.prefix,
            network=self._network,
            last=len(self.nodes) - 1,
            last_address=10 + len(self.nodes) - 1,
            cpus=cpus,
            gpus=_GPUS,
            kill_wait_s=kill_wait_s,
        )
        (self.directory / "slurm.conf").write_text(conf)
        self._pretend_gpus()
        hosts = [f"{self._network}.{10 + index} {node}" for index, node in enumerate(self.nodes)]
        own = f"{self._network}.1 {socket.gethostname().partition('.')[0]}"
        (self.directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", own, *hosts, ""]))
        self.command("ip", "link", "add", self._bridge, "type", "bridge")
        self.command("ip", "addr", "add", f"{self._network}.1/24", "dev", self._bridge)
        self.command("ip", "link", "set", self._bridge, "up")
        self._start_munge()
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.idle_nodes() == len(self.nodes), timeout_s=30, what=lambda: self.command("sinfo", "-N"))

    def _pretend_gpus(self) -> None:
        # Slurm wants character devices, and numbers them as their names end.
        for index in range(_GPUS):
            (self.directory / f"gpu{index}").symlink_to("/dev/null")
        nodes = f"{self.prefix}[0-{len(self.nodes) - 1}]"
        line = f"NodeName={nodes} Name=gpu File={self.directory}/gpu[0-{_GPUS - 1}]"
        (self.directory / "gres.conf").write_text(f"AutoDetect=off\n{line}\n")

    def idle_nodes(self) -> int:
        """Nodes that wait for jobs."""
        states = self.command("sinfo", "--noheader", "-N", "-p", "main", "--format=%T", check=False).split()
        return states.count("idle")

    def _start_munge(self) -> None:
        key = self.directory / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.directory / name}" for option, name in names.items()]
        self._spawn("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])
        until(lambda: (self.directory / "munge.socket").exists())

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return self._daemons[name]


def until(look: Callable[[], object], *, timeout_s: float = 20.0, what: Callable[[], str] = str) -> str:
    """Wait until ``look`` returns something true; returns it as text."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if seen := look():
            return str(seen)
        time.sleep(0.2)
    raise AssertionError(f"waited {timeout_s:g} s in vain: {what()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
