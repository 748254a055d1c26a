"""DeepSpeed's configuration, made from ours."""

import copy
from typing import Any

from btm.config_model import Dtype, EngineConfig, Offload

_NEVER = 1 << 40
_LARGEST_BUCKET = 500_000_000


def zero_stage(config: EngineConfig) -> int:
    """ZeRO stage that ``config`` asks for."""
    return 2 if config.zero_stage is None else config.zero_stage


def deepspeed_config(config: EngineConfig, num_parameters: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    Gradients are reduced in fp32, and added up in fp32 over micro-batches (in bf16 with ZeRO 0, where DeepSpeed knows
    nothing else). Rates, scales and clipping are the engine's, so DeepSpeed is told of none.

    Args:
        config: Checked by :func:`btm.config_model.engine_problems`.
        num_parameters: Of the model; buckets need not be larger.
    """
    stage = zero_stage(config)
    is_bf16 = config.dtype is Dtype.bf16
    bucket = min(_LARGEST_BUCKET, max(2, num_parameters + num_parameters % 2))
    zero = {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **copy.deepcopy(config.deepspeed.get("zero_optimization", {})),
        "stage": stage,
    }
    memory = {"device": "cpu", "pin_memory": False}
    if config.offload is not Offload.none:
        zero["offload_optimizer"] = dict(memory)
    if config.offload is Offload.all:
        zero["offload_param"] = dict(memory)
    return {
        **copy.deepcopy(config.deepspeed),
        "train_micro_batch_size_per_gpu": 1,
        # The engine says which backward is the last; above 1, some stages would divide the gradient by it.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
        "bf16": {"enabled": is_bf16},
        "data_types": {"grad_accum_dtype": "bf16" if is_bf16 and stage == 0 else "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
