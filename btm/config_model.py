"""Keys ``model.*`` and ``engine.*``: what one model is and what runs its forward, backward and update."""

from enum import StrEnum
from typing import Any

from pydantic import Field

from btm.schema import Model


class ModelConfig(Model):
    """Architecture of a model trained from scratch, or the pretrained directory to start from."""

    path: str | None = None
    """Hugging Face causal LM directory that becomes the seed (its weights are taken); null trains from scratch."""
    arch: str = "llama"
    """Any ``model_type`` of transformers' causal LMs whose config takes the sizes below."""
    num_layers: int = Field(default=4, ge=1)
    """Transformer blocks."""
    hidden_size: int | None = Field(default=None, ge=8)
    """Width; null is 64 per layer."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; null is one per 64 of width."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped-query attention); null is ``num_heads``."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Feed-forward width; null is 8/3 of the width rounded up to a multiple of 32."""
    max_positions: int = Field(default=2048, ge=16)
    """Longest sequence of positions."""
    tie_embeddings: bool = True
    """Share the input and output embedding."""
    extra: dict[str, Any] = {}
    """Further keys of the transformers config, taken as they are."""


class Dtype(StrEnum):
    """Arithmetic of forward and backward; master weights and optimizer state are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class EngineName(StrEnum):
    """Who runs forward, backward and the optimizer step."""

    torch = "torch"
    deepspeed = "deepspeed"
    megatron = "megatron"


class Offload(StrEnum):
    """What leaves the device between its uses."""

    none = "none"
    optimizer = "optimizer"
    all = "all"


class EngineConfig(Model):
    """What runs forward, backward and the optimizer step of one model."""

    name: EngineName = EngineName.torch
    """Engine: torch, deepspeed (ZeRO, https://arxiv.org/abs/1910.02054) or megatron (https://arxiv.org/abs/1909.08053)."""
    dtype: Dtype = Dtype.bf16
    """Arithmetic of forward and backward."""
    num_processes: int = Field(default=1, ge=1)
    """Processes that train one model."""
    expert_parallel: int = Field(default=1, ge=1)
    """Of these, how many share out the experts of each layer, tokens travelling between them; it (times tensor_parallel) divides num_processes, and the rest is data parallel."""
    deterministic: bool = True
    """Only algorithms that give the same bits every time."""
    zero_stage: int | None = Field(default=None, ge=0, le=3)
    """With deepspeed, what processes share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too; null is 2."""
    offload: Offload = Offload.none
    """With deepspeed, what lies in CPU memory: none, optimizer (master weights and moments; ZeRO 1-3), all (weights too; ZeRO 3)."""
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed's own configuration, such as ``zero_optimization.reduce_bucket_size``."""
    tensor_parallel: int = Field(default=1, ge=1)
    """With megatron, processes that share out each layer; divides ``num_processes``, heads and feed-forward widths, also of experts."""
    sequence_parallel: bool = False
    """With megatron and tensor_parallel above 1, share out norms and residuals along the sequence, too (https://arxiv.org/abs/2205.05198)."""


OPEN_DEEPSPEED_KEYS = (
    "aio", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "wall_clock_breakdown",
    "zero_optimization",
)  # fmt: skip
"""Keys of DeepSpeed's configuration that ``engine.deepspeed`` takes: what changes speed and memory, not what is learnt."""
_NVME = (
    "engine.offload=optimizer or all; offload to NVMe is not supported, checkpoints could not be gathered from there"
)
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_sequences",
    "gradient_accumulation_steps": "train.micro_batch_sequences",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.lr, train.beta1, train.beta2, train.eps and train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "engine.dtype=bf16",
    "bfloat16": "engine.dtype=bf16",
    "fp16": "engine.dtype=bf16 or fp32",
    "amp": "engine.dtype=bf16 or fp32",
    "torch_autocast": "engine.dtype=bf16 or fp32",
    "data_types": "engine.dtype=bf16 or fp32",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": _NVME,
    "zero_optimization.offload_param": _NVME,
    "zero_optimization.cpu_offload": "engine.offload=optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload=all",
}
"""Keys of DeepSpeed's configuration that follow from ours -> ours."""


MEGATRON_ARCHITECTURES = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
"""``model_type`` of the architectures whose blocks engine=megatron computes."""


def engine_problems(
    engine: EngineConfig, *, is_sparse: bool, num_processes: int | None = None, model: ModelConfig | None = None
) -> list[str]:
    """List contradictions between the keys of ``engine``, worded for the user.

    Args:
        engine: The keys.
        is_sparse: Whether the model has expert layers.
        num_processes: Processes per model, where GPUs decide; None is ``engine.num_processes``.
        model: Sizes of a model trained from scratch; None looks at the engine alone.
    """
    problems = _foreign_keys(engine)
    problems += _expert_problems(engine, num_processes or engine.num_processes, is_sparse=is_sparse)
    if engine.name is EngineName.deepspeed:
        stage = 2 if engine.zero_stage is None else engine.zero_stage
        least = {Offload.none: 0, Offload.optimizer: 1, Offload.all: 3}[engine.offload]
        if stage < least:
            problems.append(f"engine.offload={engine.offload} needs engine.zero_stage of at least {least}, got {stage}")
        if is_sparse and stage == 3:
            problems.append(
                "engine.zero_stage=3 trains dense models only, got expert layers (ffn); set engine.zero_stage to 0, 1 "
                "or 2 and share out experts by engine.expert_parallel, or use engine=torch"
            )
        problems += _deepspeed_problems(engine.deepspeed)
    if engine.name is EngineName.megatron:
        problems += _megatron_problems(engine, num_processes or engine.num_processes, model)
    return problems


def _megatron_problems(engine: EngineConfig, num_processes: int, model: ModelConfig | None) -> list[str]:
    size = engine.tensor_parallel
    problems = []
    if num_processes % size:
        problems.append(
            f"engine.tensor_parallel={size} must divide the {num_processes} processes of a model; set "
            f"engine.num_processes, or launch.gpus_per_elm, to a multiple of it"
        )
    if engine.sequence_parallel and size == 1:
        problems.append("engine.sequence_parallel=true needs engine.tensor_parallel of at least 2, got 1")
    if model is None or model.path:
        return problems
    if model.arch not in MEGATRON_ARCHITECTURES:
        known = ", ".join(MEGATRON_ARCHITECTURES)
        problems.append(f"engine=megatron trains {known} models, got model.arch={model.arch!r}; use engine=torch")
    heads = model.num_heads or max(1, (model.hidden_size or 64 * model.num_layers) // 64)
    for key, count in (("num_heads", heads), ("num_kv_heads", model.num_kv_heads or heads)):
        if count % size:
            problems.append(f"engine.tensor_parallel={size} must divide model.{key} ({count})")
    return problems


def _foreign_keys(engine: EngineConfig) -> list[str]:
    """Keys that another engine than the one asked for takes."""
    asked = {
        EngineName.deepspeed: {
            "zero_stage": engine.zero_stage is not None,
            "offload": engine.offload is not Offload.none,
            "deepspeed": bool(engine.deepspeed),
        },
        EngineName.megatron: {
            "tensor_parallel": engine.tensor_parallel > 1,
            "sequence_parallel": engine.sequence_parallel,
        },
    }
    return [
        f"engine.{key} needs engine={owner}, got engine={engine.name}"
        for owner, keys in asked.items()
        for key, is_asked in keys.items()
        if is_asked and engine.name is not owner
    ]


def _expert_problems(engine: EngineConfig, num_processes: int, *, is_sparse: bool) -> list[str]:
    """What does not fit with ``engine.expert_parallel`` on ``num_processes`` processes per model."""
    size = engine.expert_parallel
    if size > 1 and not is_sparse:
        return [f"engine.expert_parallel={size} needs expert layers, got ffn=dense; choose another ffn, or leave it 1"]
    factor = size * engine.tensor_parallel
    if size > 1 and num_processes % factor:
        sharing = f" times engine.tensor_parallel={engine.tensor_parallel}" if engine.tensor_parallel > 1 else ""
        return [
            f"engine.expert_parallel={size}{sharing} must divide the {num_processes} processes of a model; set "
            f"engine.num_processes to a multiple of it, such as {-(-num_processes // factor) * factor}"
        ]
    return []


def share_problems(engine: EngineConfig, num_experts: int | None) -> list[str]:
    """What does not fit with layers of ``num_experts`` experts; None where domains decide how many.

    DeepSpeed's processes exchange gradients in buckets of equal sizes, and Megatron's gather equal parts, so all need
    equally many experts.
    """
    size = engine.expert_parallel
    if engine.name is EngineName.torch or num_experts is None or num_experts % size == 0:
        return []
    return [
        f"engine={engine.name} shares out experts equally: engine.expert_parallel={size} must divide the {num_experts} "
        f"experts of a layer; choose another number of experts, or use engine=torch"
    ]


def _deepspeed_problems(given: dict[str, Any]) -> list[str]:
    zero = given.get("zero_optimization")
    nested = {f"zero_optimization.{key}" for key in zero} if isinstance(zero, dict) else set()
    problems = []
    for key in sorted(given.keys() | nested):
        if key in OWNED_DEEPSPEED_KEYS:
            problems.append(f"engine.deepspeed.{key} follows from other keys; set {OWNED_DEEPSPEED_KEYS[key]} instead")
        elif "." not in key and key not in OPEN_DEEPSPEED_KEYS:
            problems.append(f"engine.deepspeed.{key} is not taken; it takes {', '.join(OPEN_DEEPSPEED_KEYS)}")
    if "zero_optimization" in given and not isinstance(zero, dict):
        problems.append(f"engine.deepspeed.zero_optimization must be a table of keys, got {zero!r}")
    return problems
