"""Modules that stand in Megatron-Core's layer specification: what it leaves open, or has for CUDA only.

Nothing is imported from Megatron; each module takes the arguments that a specification is called with. The fast CPU
kernels of the torch engine are used here, too.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from btm.model.attention import LONGEST, causal_attention
from btm.model.elementwise import rms_norm, swiglu


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self._eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., C]."""
        return rms_norm(states, self.weight, self._eps)


class _SumOverGroup(torch.autograd.Function):
    """Sum over processes of values that all of them go on to use, each for a part of the result."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class WholeNorm(nn.Module):
    """The norm of OLMo 2's queries and keys: over all heads, those of the other tensor-parallel processes included."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, num_heads: int, group: dist.ProcessGroup) -> None:
        """Make the norm of one process.

        Args:
            config: Megatron's.
            hidden_size: Width of a head.
            eps: Added to the mean square.
            num_heads: Heads of this process; all processes have equally many.
            group: The tensor-parallel processes.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads * hidden_size, dtype=config.params_dtype))
        self._eps = eps
        self._group = group

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise [T, B, H, D] over H and D. Collective: all processes of the group call it."""
        flat = states.flatten(2)
        if self._group.size() == 1:
            return rms_norm(flat, self.weight, self._eps).view(states.shape)
        wide = flat.float()
        squares = _SumOverGroup.apply(wide.square().sum(-1, keepdim=True), self._group)
        scale = torch.rsqrt(squares / (flat.shape[-1] * self._group.size()) + self._eps)
        return (wide * scale * self.weight).to(states.dtype).view(states.shape)


class LinearOfSpec(nn.Module):
    """A linear layer of Megatron's with the bias that the architecture has; Megatron knows one flag for all layers.

    With ``has_norm`` the output is normalised, bias included (OLMo 2).
    """

    def __new__(cls, *arguments: Any, linear: type[nn.Module], has_bias: bool, has_norm: bool, **options: Any) -> Any:
        """Build the layer; only one with a norm is wrapped."""
        if has_norm:
            return super().__new__(cls)
        return linear(*arguments, **(options | {"bias": has_bias}))

    def __init__(
        self, *arguments: Any, linear: type[nn.Module], has_bias: bool, has_norm: bool, config: Any, **options: Any
    ) -> None:
        super().__init__()
        del has_norm
        self.linear = linear(*arguments, config=config, **(options | {"bias": has_bias}))
        self.norm = RmsNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Project and normalise; there is no bias left to add."""
        output, bias = self.linear(states)
        return self.norm(output if bias is None else output + bias), None


class SwiGlu(nn.Module):
    """``silu(gate) * up`` of a tensor that holds both (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        del config

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., 2 F] to [..., F]."""
        gate, up = states.chunk(2, dim=-1)
        return swiglu(gate, up)


class CausalAttention(nn.Module):
    """Core attention: matrix products on CPUs, Transformer Engine where there is one, torch's kernel elsewhere.

    Where Megatron passes a mask, this takes the documents of packed sequences. Rotary positions go on from document to
    document; scores depend on differences alone, so that this computes what positions that restart do.
    """

    def __init__(self, config: Any, *, fused: type[nn.Module] | None, softmax_scale: float, **options: Any) -> None:
        """Make the attention of one layer.

        Args:
            config: Megatron's.
            fused: Transformer Engine's attention, if there is one.
            softmax_scale: Factor of the scores.
            options: What else Megatron gives to a core attention.
        """
        super().__init__()
        self._scale = softmax_scale
        self._fused = None if fused is None else fused(config=config, softmax_scale=softmax_scale, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, B, H, D].
            key: [T, B, G, D].
            value: Like ``key``.
            attention_mask: Not a mask: int [B, T] document of each token, or None for one document per sequence.
            options: What else Megatron gives.

        Returns:
            [T, B, H * D].
        """
        segments = attention_mask
        if self._fused is not None and segments is None:
            return self._fused(query, key, value, None, **options)
        length = query.shape[0]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if query.device.type == "cpu" and length <= LONGEST:
            mixed = causal_attention(query, key, value, scaling=self._scale, segments=segments)
            return mixed.flatten(2).transpose(0, 1).contiguous()
        mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=True
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


class RotaryAngles(nn.Module):
    """Angles of the rotary embedding, with the frequencies that transformers computed for the model."""

    frequencies: torch.Tensor

    def __init__(self, frequencies: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def get_rotary_seq_len(self, context: Any, decoder: Any, states: torch.Tensor, config: Any, packed: Any) -> int:
        """Tokens per sequence, of which sequence parallelism leaves a part to each process."""
        del context, decoder, packed
        return states.shape[0] * (config.tensor_model_parallel_size if config.sequence_parallel else 1)

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """Angles [T, 1, 1, D] of positions 0 to ``length`` - 1."""
        del options
        positions = torch.arange(length, dtype=torch.float32, device=self.frequencies.device)
        angles = torch.outer(positions, self.frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None]


@functools.cache
def run_again(layer: type[nn.Module], *, has_experts: bool = False) -> type[nn.Module]:
    """A transformer layer that keeps its input only, and runs again in the backward pass.

    Megatron's own way to do so asks for the random numbers of a CUDA device; without experts these layers need none.

    Args:
        layer: Megatron's class.
        has_experts: Whether routers may draw random numbers and exchange something inside, which all processes must
            then do again equally often.
    """
    options_of_run = {"use_reentrant": False, "preserve_rng_state": has_experts, "early_stop": not has_experts}

    class LayerRunAgain(layer):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()):
                return super().forward(*arguments, **options)
            return checkpoint(super().forward, *arguments, **options_of_run, **options)

    return LayerRunAgain


class FixedRow:
    """Forward hook of Megatron's embedding: one token's embedding gets no gradient from where it is read.

    Args:
        token: Its id.
        part: Number of this process's part of the sequence, and how many parts there are; None has all of it.
    """

    def __init__(self, token: int, part: tuple[int, int] | None) -> None:
        self._token = token
        self._part = part

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Cut off the gradient of ``output``, [B, T, C] or a part of [T, B, C]."""
        is_fixed = arguments[0] == self._token
        if self._part is not None:
            number, count = self._part
            is_fixed = is_fixed.t().chunk(count)[number]
        return torch.where(is_fixed[..., None], output.detach(), output)


def residual_sum(training: bool, fused: bool) -> Any:
    """What Megatron asks for the sum of a layer's output, its bias and the residual; there is no dropout."""
    del training, fused
    return _residual_sum


def _residual_sum(
    output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, probability: float
) -> torch.Tensor:
    del probability
    output, bias = output_and_bias
    return residual + (output if bias is None else output + bias)
