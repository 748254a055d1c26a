"""Sizes and costs known before anything runs: parameters, FLOPs, bytes and updates, computed without torch.

A run has ``U = tokens / batch`` updates. The seed phase takes ``s * U`` of them with the whole batch; afterwards every
ELM takes the other ``(1 - s) * U`` updates with an equal share of the batch, so that seed phase and ELMs together see
as many tokens as a dense model trained for ``U`` updates (Branch-Train-Merge, https://arxiv.org/abs/2208.03306).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btm.config_ffn import FfnConfig, FfnLayer, Placement, RouterName, copies_per_token, expert_width
from btm.config_model import Dtype, ModelConfig
from btm.config_train import TrainConfig
from btm.files import read_json


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the cost of a model depends on."""

    num_parameters: int
    """All weights."""
    num_matmul_parameters: int
    """Weights that multiply a token: without the input embedding, with the output head; of experts, those that a token
    meets on average."""
    num_layers: int
    attention_width: int
    """Heads times head width."""
    hidden_size: int
    """Model width."""
    intermediate_size: int
    """Feed-forward width of the dense network."""
    num_expert_parameters: int = 0
    """Weights of all experts of all layers."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs (forward and backward) per token: 6 per matmul weight plus attention over the sequence."""
        attention = 12 * self.num_layers * self.attention_width * sequence_length
        return 6.0 * self.num_matmul_parameters + attention

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one training checkpoint: fp32 master weights and two Adam moments, of all experts."""
        return 12 * self.num_parameters

    def model_bytes(self, dtype: Dtype) -> int:
        """Bytes of the finished model on disk."""
        return (4 if dtype is Dtype.fp32 else 2) * self.num_parameters

    def training_bytes(self, dtype: Dtype, *, expert_parallel: int = 1) -> int:
        """Bytes of memory that one process of the torch engine holds between two updates, activations left out.

        fp32 master weights, gradients and two Adam moments; with bf16 also the weights that forward and backward use.

        Args:
            dtype: Of forward and backward.
            expert_parallel: Processes that share out the experts.
        """
        elsewhere = self.num_expert_parameters - -(-self.num_expert_parameters // expert_parallel)
        return (16 if dtype is Dtype.fp32 else 18) * (self.num_parameters - elsewhere)


@dataclass(frozen=True, slots=True)
class Updates:
    """How the updates of a run divide between seed phase and ELMs."""

    total: int
    seed: int
    batch_sequences: int
    """Sequences per update of the seed and dense models."""
    elm_batch_sequences: int
    """Sequences per update of one ELM."""

    @property
    def elm(self) -> int:
        """Updates of one ELM."""
        return self.total - self.seed


def resolved_sizes(config: ModelConfig) -> dict[str, int]:
    """Fill in the sizes that ``config`` leaves to the rules in :class:`btm.config_model.ModelConfig`."""
    width = config.hidden_size or 64 * config.num_layers
    heads = config.num_heads or max(1, width // 64)
    feed_forward = config.intermediate_size or -(-width * 8 // 3 // 32) * 32
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_kv_heads or heads,
        "intermediate_size": feed_forward,
        "num_hidden_layers": config.num_layers,
    }


def model_size(config: ModelConfig, vocab_size: int) -> ModelSize:
    """Size of a Llama-type model (gated feed-forward, no biases) of these dimensions.

    For a pretrained directory the sizes come from its ``config.json``. Architectures with other feed-forward layers
    differ by some per cent; the ledger of a finished run counts the real parameters.
    """
    if config.path:
        sizes, vocab_size, tied = _pretrained_sizes(read_json(Path(config.path) / "config.json"))
    else:
        sizes, tied = resolved_sizes(config), config.tie_embeddings
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    head_width = sizes.get("head_dim") or width // sizes["num_attention_heads"]
    attention_width = head_width * sizes["num_attention_heads"]
    key_value_width = head_width * sizes["num_key_value_heads"]
    block = 2 * width * attention_width + 2 * width * key_value_width + 3 * width * sizes["intermediate_size"]
    embedding = vocab_size * width
    norms = (2 * layers + 1) * width
    return ModelSize(
        num_parameters=layers * block + norms + embedding * (1 if tied else 2),
        num_matmul_parameters=layers * block + embedding,
        num_layers=layers,
        attention_width=attention_width,
        hidden_size=width,
        intermediate_size=sizes["intermediate_size"],
    )


def sparse_size(dense: ModelSize, ffn: FfnConfig, num_domains: int, *, is_pretrained: bool = False) -> ModelSize:
    """Size of a model with expert layers.

    Args:
        dense: The model whose feed-forward networks give way.
        ffn: The expert layers.
        num_domains: Experts of a DEMix layer.
        is_pretrained: Whether weights are taken over, which decides where BASE layers stand.

    Returns:
        ``dense`` itself when there are no expert layers.

    Raises:
        ConfigError: If the shared network of ``top_k`` layers leaves nothing for the experts.
    """
    if not ffn.is_sparse:
        return dense
    if ffn.placement is None:
        ffn = ffn.model_copy(update={"placement": Placement.inserted if is_pretrained else Placement.in_place})
    stays = ffn.layer is FfnLayer.base and ffn.placement is Placement.inserted
    network = 0 if stays else 3 * dense.hidden_size * dense.intermediate_size
    all_weights, met, of_experts = 0, 0.0, 0
    for place in range(len(ffn.blocks(dense.num_layers))):
        layer = _expert_layer(dense, ffn, num_domains, is_shallow=ffn.depth_fraction is not None and place % 2 == 0)
        all_weights += layer[0] - network
        met += layer[1] - network
        of_experts += layer[2]
    return replace(
        dense,
        num_parameters=dense.num_parameters + all_weights,
        num_matmul_parameters=dense.num_matmul_parameters + round(met),
        num_expert_parameters=of_experts,
    )


def _expert_layer(dense: ModelSize, ffn: FfnConfig, num_domains: int, *, is_shallow: bool) -> tuple[int, float, int]:
    """All weights of one expert layer, how many of those in matrices a token meets on average, and the experts' own."""
    width = dense.hidden_size
    inner = expert_width(ffn, dense.intermediate_size)
    experts = {FfnLayer.demix: num_domains, FfnLayer.modality: sum(ffn.group_sizes)}.get(ffn.layer, ffn.num_experts)
    matrices, vectors = 3 * width * inner, 0
    if ffn.layer is FfnLayer.base:
        matrices, vectors = 2 * width * inner * ffn.num_sublayers, (3 * width + inner) * ffn.num_sublayers
    has_scores = ffn.layer is not FfnLayer.demix and (
        ffn.layer is not FfnLayer.top_k or ffn.router is not RouterName.hash
    )
    # What every token passes: routers and the shared network.
    common, biases = experts * width if has_scores else 0, 0
    if ffn.layer is FfnLayer.top_k:
        common += 3 * width * ffn.shared_hidden_width
    if ffn.layer is FfnLayer.modality:
        auxiliary = max(1, width // 2)
        outputs = [experts, *([1] if is_shallow else [])]
        common += sum(auxiliary * (width + count) for count in outputs) + (width if is_shallow else 0)
        biases = sum(auxiliary + count for count in outputs)
    share = copies_per_token(ffn) / experts * (ffn.depth_fraction or 1.0 if is_shallow else 1.0)
    own = experts * (matrices + vectors)
    return own + common + biases, experts * matrices * share + common, own


def divide_updates(train: TrainConfig, num_elms: int) -> Updates:
    """Divide ``train.tokens`` between the seed phase and ``num_elms`` ELMs.

    The batch is rounded down to a multiple of ``num_elms`` sequences, so that every model of the run sees equal tokens.
    """
    sequences = train.batch_tokens // train.sequence_length
    elm_sequences = max(1, sequences // max(1, num_elms))
    sequences = elm_sequences * max(1, num_elms)
    total = max(1, train.tokens // (sequences * train.sequence_length))
    return Updates(
        total=total,
        seed=round(total * train.seed_fraction),
        batch_sequences=sequences,
        elm_batch_sequences=elm_sequences,
    )


def _pretrained_sizes(raw: dict[str, Any]) -> tuple[dict[str, int], int, bool]:
    width = raw.get("hidden_size") or raw["n_embd"]
    heads = raw.get("num_attention_heads") or raw["n_head"]
    sizes = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "intermediate_size": raw.get("intermediate_size") or raw.get("n_inner") or 4 * width,
        "num_hidden_layers": raw.get("num_hidden_layers") or raw["n_layer"],
        "head_dim": raw.get("head_dim") or 0,
    }
    return sizes, raw["vocab_size"], raw.get("tie_word_embeddings", True)
