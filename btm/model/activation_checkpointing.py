"""Activation checkpointing: memory for time, without a change of any result (https://arxiv.org/abs/1604.06174)."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from btm.errors import ConfigError
from btm.model.expert_block import expert_modules


def checkpoint_activations(model: PreTrainedModel, *, is_reentrant: bool = False) -> None:
    """Let training keep of each block of ``model`` its input only, and run the block again in the backward pass.

    Blocks with expert layers report once, and all of such a block is run again, so that processes which exchange
    tokens inside of it exchange them equally often.

    Args:
        model: Any transformers causal LM whose blocks can be run again.
        is_reentrant: Run blocks again under an autograd of their own, as DeepSpeed's ZeRO 3 needs it, whose weights
            are not there between their uses; dense models only.

    Raises:
        ConfigError: If the architecture cannot do it.
    """
    has_experts = bool(expert_modules(model))
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not model.supports_gradient_checkpointing or (has_experts and is_reentrant):
        raise ConfigError(
            [
                f"train.activation_checkpointing=true needs blocks that can be run again, which this "
                f"{model.config.model_type!r} model does not have; leave it false, and make passes smaller with "
                f"train.micro_batch_sequences"
            ]
        )
    options = {"use_reentrant": is_reentrant}
    if has_experts:
        options["early_stop"] = False
    # Newer versions of transformers warn of the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
