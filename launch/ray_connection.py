"""The connection of this process to Ray: of its own making on this machine, or to a cluster of others."""

import contextlib
import importlib
import logging
from typing import Any

from launch.ray_session import PrivateSession, end_processes, termination_handler_kept, unreachable
from launch.resources import available_gpus

_OBJECT_STORE_BYTES = 100 << 20


def connect(address: str) -> None:
    """Connect to an existing cluster, with the token that the environment names.

    Raises:
        ConnectionError: If nothing answers at ``address``, or it refuses the token.
    """
    import ray

    _check_access(address)
    with termination_handler_kept():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)


def start_private(session: PrivateSession, *, num_cpus: int, dashboard: bool) -> None:
    """Start a Ray of this process's own in the directory of ``session``, and connect to it."""
    import ray

    session.enter_environment()
    try:
        _forget_token()
        with termination_handler_kept():
            ray.init(
                "local",
                num_cpus=num_cpus,
                num_gpus=len(available_gpus()),
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(session.ray_dir),
            )
    except BaseException:
        disconnect(session)
        raise


def disconnect(session: PrivateSession | None) -> None:
    """Leave a cluster, or end the Ray of ``session`` with all its processes."""
    import ray

    processes = session.processes() if session else []
    ray.shutdown(wait_for_processes=True)
    if session:
        end_processes(processes)
        session.leave_environment()
        # The token file goes last: threads of the connection that drain may still read it.
        _forget_token()
        session.remove()


def _check_access(address: str) -> None:
    # Ray itself tries a dead address for a minute, and a wrong token for 20 seconds before it says something else.
    from ray.exceptions import AuthenticationError

    problem = unreachable(address)
    if problem:
        raise ConnectionError(problem)
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        try:
            raylet.GcsClient(address=address)
        except AuthenticationError:
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the path of its token file"
            raise ConnectionError(f"the Ray cluster at {address} refuses this session's token; {remedy}") from None


def _forget_token() -> None:
    # Ray keeps the token of a process's first connection. Not public: without it, one session per process works.
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
