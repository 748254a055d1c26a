"""The one file that imports megatron.core: quietly, and with its process groups."""

import atexit
import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from btm.errors import TrainingError
from btm.train.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this process stands: tensor-parallel processes are neighbours, data-parallel ones are apart.

    Of the data-parallel ones neighbours share out experts, and those apart have the same ones.
    """

    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    expert_rank: int
    expert_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup

    @property
    def of_replicas(self) -> "Mesh":
        """The same with the processes that have the same experts in the place of the data-parallel ones."""
        group = self.replica_group
        return replace(self, data_rank=group.rank(), data_size=group.size(), data_group=group)


def join_mesh(ranks: Ranks, tensor_parallel: int, expert_parallel: int = 1) -> Mesh:
    """Form Megatron's process groups. Collective: every rank calls it.

    Args:
        ranks: The processes that run one model; a single one gets a group of its own, which Megatron needs.
        tensor_parallel: Processes that share out each layer; divides their number.
        expert_parallel: Groups of such processes that share out the experts; divides the number of groups.

    Raises:
        TrainingError: If Megatron-Core is not installed.
    """
    state = imported("megatron.core.parallel_state")
    # Exchanges have other names in newer versions of torch; the other advice is about CUDA.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if ranks.device.type == "cpu":
        warnings.filterwarnings("ignore", message="When using .* recommended to set the environment")
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(_leave_group)
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=tensor_parallel,
        create_gloo_process_groups=False,
    )
    # There is no dropout; sequence parallelism would ask CUDA for the state of its random numbers.
    imported("megatron.core.tensor_parallel.random").initialize_rng_tracker(
        inference_rng_tracker=True, force_reset=True
    )
    return Mesh(
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_parallel,
        data_rank=state.get_data_parallel_rank(),
        data_size=ranks.size // tensor_parallel,
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_size=expert_parallel,
        tensor_group=state.get_tensor_model_parallel_group(),
        data_group=state.get_data_parallel_group(),
        expert_group=state.get_expert_model_parallel_group(),
        replica_group=state.get_expert_data_parallel_group(),
    )


@contextlib.contextmanager
def answering_for_cuda(device: torch.device) -> Iterator[None]:
    """Without a GPU: name the CPU where Megatron's sequence parallelism asks for the current CUDA device."""
    if device.type == "cuda":
        yield
        return
    original = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.cuda.current_device = original


def imported(name: str) -> Any:
    """A module of Megatron-Core, by its full name.

    Raises:
        TrainingError: If Megatron-Core is not installed.
    """
    try:
        with quiet():
            import megatron.core  # noqa: F401

            return importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(
            f"engine=megatron needs Megatron-Core ({error}); pip install megatron-core, or use engine=torch"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what Megatron says about libraries that are not there and modules that it did not write."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
