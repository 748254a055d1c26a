"""The one file that imports deepspeed: start it quietly."""

import atexit
import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from btm.errors import ConfigError, TrainingError
from btm.model.expert_pass import ExpertPass
from btm.model.loss import loss_sum, token_losses
from btm.train.ranks import Ranks


class Losses(nn.Module):
    """The model and its loss as one module, which is what DeepSpeed hooks into."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        segments: torch.Tensor | None,
        experts: ExpertPass | None = None,
        by_token: bool = False,
    ) -> torch.Tensor:
        """Sum of the losses of all targets; with ``by_token`` the loss of each [B, T], without gradients."""
        return (token_losses if by_token else loss_sum)(self.model, inputs, targets, segments, experts)


def mark_expert(parameter: Any, expert_parallel: int) -> None:
    """Mark a parameter that only some processes hold, so that DeepSpeed reduces its gradient among these alone."""
    parameter.allreduce = False
    parameter.group_name = f"ep_size_{expert_parallel}"


def initialize(
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    ranks: Ranks,
    *,
    expert_parallel: int = 1,
) -> Any:
    """A DeepSpeed engine around ``losses``; every rank calls it.

    Args:
        losses: Its parameters already have their type and device.
        optimizer: Over these parameters.
        settings: DeepSpeed's configuration.
        ranks: The processes that run this model; a single one gets a group of its own, which DeepSpeed needs.
        expert_parallel: Neighbouring processes that share out the parameters marked by :func:`mark_expert`.

    Raises:
        ConfigError: If DeepSpeed refuses the settings.
        TrainingError: If DeepSpeed is not installed.
    """
    deepspeed = _imported()
    # DeepSpeed asks the environment, also where there is one process and no launcher.
    os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    if not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(_leave_group)
    if expert_parallel > 1:
        losses.add_module("sharing", _sharing(expert_parallel))
    try:
        # Some of its optimizers print how much memory there is.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=losses, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError([f"DeepSpeed does not take engine.deepspeed: {text}; see its configuration pages"]) from error
    head: Any = losses.model.get_output_embeddings()
    if settings["zero_optimization"]["stage"] == 3 and isinstance(getattr(head, "weight", None), nn.Parameter):
        # The loss multiplies by it outside of the module that owns it.
        deepspeed.zero.register_external_parameter(losses, head.weight)
    return engine


def _sharing(expert_parallel: int) -> nn.Module:
    """An empty module that makes DeepSpeed look for experts: it does so only beside instances of its own layer."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class Sharing(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = expert_parallel

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            del use_data_before_expert_parallel_
            if f"ep_size_{expert_parallel}" not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(expert_parallel)

    return Sharing()


def _imported() -> Any:
    """The deepspeed package, silent, and without building C++ for what gloo and NCCL do."""
    try:
        # The import probes compilers and libraries, and prints what it misses.
        with contextlib.redirect_stdout(io.StringIO()):
            import deepspeed
    except ImportError as error:
        raise TrainingError(
            f"engine=deepspeed needs DeepSpeed ({error}); pip install deepspeed, or use engine=torch"
        ) from error
    # It calls functions that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    logger.handlers.clear()
    logger.propagate = True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
