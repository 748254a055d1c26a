"""Megatron-Core's ``GPTModel`` for one process, and the loss over a vocabulary that is shared out.

Megatron's own loss holds the logits of all tokens, in fp32; here they are made and used chunk by chunk.
The model is built from the layers of Megatron's that run everywhere and from :mod:`btm.train.megatron_modules`; with a
GPU and Transformer Engine installed, linear layers and attention are that library's.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from btm.model.expert_pass import ExpertPass
from btm.model.linear_cross_entropy import linear_cross_entropy_rows, linear_cross_entropy_sum
from btm.model.loss import IGNORED
from btm.train.megatron_experts import BlockExperts, ExpertFeedForward, TokenLabels, with_experts
from btm.train.megatron_modules import (
    CausalAttention,
    FixedRow,
    LinearOfSpec,
    RmsNorm,
    RotaryAngles,
    SwiGlu,
    WholeNorm,
    residual_sum,
    run_again,
)
from btm.train.megatron_shape import GptShape, QueryKeyNorm
from btm.train.megatron_start import Mesh, imported, quiet
from btm.train.shared_vocabulary import SharedVocabulary


class GptLosses(nn.Module):
    """Megatron's ``GPTModel`` and the loss of every token as one module; its parameters hold no values yet."""

    def __init__(
        self,
        shape: GptShape,
        mesh: Mesh,
        *,
        frequencies: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        is_sequence_parallel: bool = False,
        is_checkpointed: bool = False,
        experts: Sequence[BlockExperts] = (),
    ) -> None:
        """Build this process's part of the model, on the CPU.

        Args:
            shape: Of the model; divisible by the tensor-parallel processes.
            mesh: From :func:`join_mesh`.
            frequencies: Of the rotary embedding, ``(head_size / 2,)``.
            dtype: Of the parameters.
            device: Where the model will run; decides which layers are taken.
            is_sequence_parallel: Share out norms and residuals along the sequence.
            is_checkpointed: Keep of each layer its input only, and run it again in the backward pass.
            experts: Expert layers of each block; nothing for a dense model.
        """
        super().__init__()
        transformer_config = imported("megatron.core.transformer").TransformerConfig
        rows = shape.padded_vocabulary(mesh.tensor_size)
        self._vocabulary = None
        if mesh.tensor_size > 1:
            first = mesh.tensor_rank * (rows // mesh.tensor_size)
            self._vocabulary = SharedVocabulary(first, shape.vocabulary, mesh.tensor_group)
        self._is_tied, self._is_sequence_parallel = shape.is_tied, is_sequence_parallel
        with quiet():
            config = transformer_config(
                num_layers=shape.num_layers,
                hidden_size=shape.hidden_size,
                num_attention_heads=shape.num_heads,
                num_query_groups=shape.num_groups,
                kv_channels=shape.head_size,
                ffn_hidden_size=shape.intermediate_size,
                layernorm_epsilon=shape.norm_eps,
                normalization="RMSNorm",
                activation_func=functional.silu,
                gated_linear_unit=True,
                use_te_activation_func=True,  # takes the activation module of the specification, whoever wrote it
                add_bias_linear=False,  # LinearOfSpec decides
                hidden_dropout=0.0,
                attention_dropout=0.0,
                softmax_scale=shape.score_scale,
                tensor_model_parallel_size=mesh.tensor_size,
                sequence_parallel=is_sequence_parallel,
                use_cpu_initialization=True,
                perform_initialization=False,
                params_dtype=dtype,
                bf16=dtype is torch.bfloat16,
                deterministic_mode=torch.are_deterministic_algorithms_enabled(),
            )
            self.gpt = imported("megatron.core.models.gpt").GPTModel(
                config=config,
                transformer_layer_spec=_block_spec(shape, mesh, device, is_checkpointed, experts),
                vocab_size=rows,
                max_sequence_length=1,  # of learned positions, which there are not
                share_embeddings_and_output_weights=shape.is_tied,
                position_embedding_type="rope",
            )
        self.gpt.rotary_pos_emb = RotaryAngles(frequencies.to(device))
        self.gpt.post_process = False  # it returns the last hidden states
        if shape.padding_token is not None:
            part = (mesh.tensor_rank, mesh.tensor_size) if is_sequence_parallel else None
            self.gpt.embedding.word_embeddings.register_forward_hook(FixedRow(shape.padding_token, part))

    def logits(self, inputs: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        """This process's columns of the logits, [B, T, rows / tensor_size]; those of padding are -inf.

        Args:
            inputs: int64 [B, T], the same on all tensor-parallel processes.
            segments: int [B, T] document of each token, or None.
        """
        logits = self._hidden(inputs, segments).transpose(0, 1) @ self._head.t()
        return logits if self._vocabulary is None else self._vocabulary.without_padding(logits)

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        segments: torch.Tensor | None,
        experts: ExpertPass | None = None,
        by_token: bool = False,
    ) -> torch.Tensor:
        """Sum of the losses of all targets but those of -100, fp32 nats; the same on tensor-parallel processes.

        With ``by_token`` the loss of each, [B, T], without gradients. Expert layers report to ``experts``, which knows
        the tokens already.
        """
        hidden, known = self._hidden(inputs, segments, experts), targets.t()
        kept = known != IGNORED
        rows = hidden.flatten(0, 1) if bool(kept.all()) else hidden[kept]
        losses = None if self._vocabulary is None else self._vocabulary.losses
        if not by_token:
            return linear_cross_entropy_sum(rows, self._head, known[kept], losses)
        result = torch.zeros(known.shape, dtype=torch.float32, device=known.device)
        result[kept] = linear_cross_entropy_rows(rows, self._head, known[kept], losses)
        return result.t()

    @property
    def _head(self) -> torch.Tensor:
        """This process's rows of the output head, [rows / tensor_size, C]."""
        return (self.gpt.embedding.word_embeddings if self._is_tied else self.gpt.output_layer).weight

    def _hidden(
        self, inputs: torch.Tensor, segments: torch.Tensor | None, experts: ExpertPass | None = None
    ) -> torch.Tensor:
        """Last hidden states of all tokens, [T, B, C]; their gradient is the sum over tensor-parallel processes."""
        hidden = self.gpt(inputs, None, segments if experts is None else TokenLabels(segments, experts))
        if self._vocabulary is None:
            return hidden
        mappings = imported("megatron.core.tensor_parallel.mappings")
        if self._is_sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(hidden)
        return mappings.copy_to_tensor_model_parallel_region(hidden)


def _block_spec(
    shape: GptShape, mesh: Mesh, device: torch.device, is_checkpointed: bool, experts: Sequence[BlockExperts]
) -> Any:
    layers = imported("megatron.core.transformer.transformer_layer")
    attention = imported("megatron.core.transformer.attention")
    mlp = imported("megatron.core.transformer.mlp")
    block = imported("megatron.core.transformer.transformer_block")
    mask = imported("megatron.core.transformer.enums").AttnMaskType
    spec: Any = imported("megatron.core.transformer.spec_utils").ModuleSpec
    identity = imported("megatron.core.transformer.identity_op").IdentityOp
    column, row, fused = _backend(device)

    def linear(kind: type[nn.Module], has_bias: bool, has_norm: bool = False) -> Any:
        return spec(LinearOfSpec, params={"linear": kind, "has_bias": has_bias, "has_norm": has_norm})

    def head_norm(num_heads: int) -> Any:
        if shape.query_key_norm is QueryKeyNorm.whole:
            own = num_heads // mesh.tensor_size
            return spec(WholeNorm, params={"num_heads": own, "group": mesh.tensor_group})
        return None if shape.query_key_norm is QueryKeyNorm.none else RmsNorm

    norm = identity if shape.has_post_norms else RmsNorm
    attention_parts = attention.SelfAttentionSubmodules(
        linear_qkv=linear(column, shape.has_qkv_bias),
        core_attention=spec(CausalAttention, params={"fused": fused}),
        linear_proj=linear(row, shape.has_projection_bias, shape.has_post_norms),
        q_layernorm=head_norm(shape.num_heads),
        k_layernorm=head_norm(shape.num_groups),
    )
    self_attention = spec(attention.SelfAttention, params={"attn_mask_type": mask.causal}, submodules=attention_parts)
    feed_forward = mlp.MLPSubmodules(
        linear_fc1=linear(column, shape.has_feed_forward_bias),
        activation_func=SwiGlu,
        linear_fc2=linear(row, shape.has_feed_forward_bias, shape.has_post_norms),
    )

    def layer_of(block: BlockExperts) -> Any:
        network = spec(mlp.MLP, submodules=feed_forward)
        if block.mlp is not None:
            network = spec(ExpertFeedForward, params={"module": block.mlp, "has_norm": shape.has_post_norms})
        parts = layers.TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention,
            self_attn_bda=residual_sum,
            pre_mlp_layernorm=norm,
            mlp=network,
            mlp_bda=residual_sum,
        )
        return spec(kind, submodules=parts, params={"behind": block.behind} if experts else {})

    kind = with_experts(layers.TransformerLayer) if experts else layers.TransformerLayer
    if is_checkpointed:
        kind = run_again(kind, has_experts=bool(experts))
    return block.TransformerBlockSubmodules(
        layer_specs=[layer_of(one) for one in experts or [BlockExperts()] * shape.num_layers], layer_norm=RmsNorm
    )


def _backend(device: torch.device) -> tuple[type[nn.Module], type[nn.Module], type[nn.Module] | None]:
    """Column-parallel and row-parallel linear layer, and fused attention where there is one."""
    if device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        if torch.are_deterministic_algorithms_enabled():
            os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        engine = imported("megatron.core.extensions.transformer_engine")
        return engine.TEColumnParallelLinear, engine.TERowParallelLinear, engine.TEDotProductAttention
    layers = imported("megatron.core.tensor_parallel")
    return layers.ColumnParallelLinear, layers.RowParallelLinear, None
