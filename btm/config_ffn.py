"""Keys ``ffn.*``: expert layers in the place of a model's feed-forward networks. Names follow :mod:`moe_kernels`."""

import re
from enum import StrEnum

from pydantic import Field, field_validator

from btm.errors import ConfigError
from btm.schema import Model

SWIGLU_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "smollm3")
"""Architectures whose feed-forward networks can give way to experts."""
_LAYERS = re.compile(r"all|(every|spread)_[1-9][0-9]*")
_MULTIPLE = 8
_BASE_MATRICES, _GATED_MATRICES = 2, 3


class FfnLayer(StrEnum):
    """Kind of feed-forward layer."""

    dense = "dense"
    top_k = "top_k"
    demix = "demix"
    base = "base"
    modality = "modality"


class RouterName(StrEnum):
    """Routers of ``top_k`` layers."""

    top_k = "top_k"
    switch = "switch"
    expert_choice = "expert_choice"
    hash = "hash"


class Score(StrEnum):
    """How router logits become weights."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Balance(StrEnum):
    """Whose load the balancing loss looks at."""

    micro = "micro"
    globally = "global"


class Placement(StrEnum):
    """Where a BASE layer stands."""

    in_place = "in_place"
    inserted = "inserted"


class Initial(StrEnum):
    """What experts start from."""

    copy_dense = "copy"
    random = "random"


class Assignment(StrEnum):
    """How BASE assigns tokens in training."""

    exact = "exact"
    auction = "auction"


class Inference(StrEnum):
    """How modality-aware layers route outside of training."""

    auxiliary = "auxiliary"
    expert_choice = "expert_choice"


class FfnConfig(Model):
    """Which expert layers a model has, and where."""

    layer: FfnLayer = FfnLayer.dense
    """dense: none; top_k: each token takes its best experts; demix: an expert per domain; base: balanced assignment; modality: experts by modality."""
    layers: str | list[int] = "all"
    """Blocks with an expert layer: all, every_2 (every second one), spread_1 (one after half of the blocks, as BASE places them), or a list of numbers from 0."""
    num_experts: int = Field(default=8, ge=1)
    """Experts per layer; demix has one per domain and modality those of group_sizes instead."""
    hidden_width: int | None = Field(default=None, ge=1)
    """Feed-forward width of one expert; null gives a token as many FLOPs as the dense model does."""
    initial: Initial | None = None
    """copy: experts start as copies (or slices) of the dense network; random; null is copy for demix and pretrained models, else random."""
    router: RouterName = RouterName.top_k
    """Router of top_k layers."""
    experts_per_token: int = Field(default=2, ge=1)
    """Experts that a token takes (top_k), on average for expert_choice; switch and hash take one."""
    score: Score = Score.softmax
    """softmax over experts or sigmoid of each (routers top_k and expert_choice)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Tokens that an expert may take over the mean load; null drops none (top_k layers)."""
    shared_hidden_width: int = Field(default=0, ge=0)
    """Feed-forward width of a network that all tokens pass as well; 0 for none (top_k layers)."""
    balance: Balance = Balance.micro
    """micro: loads of each forward pass; global: loads of all processes and of the passes of an update so far (https://arxiv.org/abs/2501.11873)."""
    load_balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss, which is 1 when balanced."""
    z_weight: float = Field(default=0.001, ge=0)
    """Weight of the squared log-sum-exp of the router logits."""
    num_sublayers: int = Field(default=1, ge=1)
    """Feed-forward networks in each BASE expert."""
    assignment: Assignment = Assignment.exact
    """exact, or the published auction (BASE, training)."""
    is_priced: bool = True
    """Whether BASE (with assignment=exact) subtracts the running prices of its training assignments when a token chooses its expert outside of training, which keeps the experts balanced; false takes the highest score, as the paper does."""
    placement: Placement | None = None
    """BASE layers in_place of the feed-forward network of their block (equal FLOPs), or inserted behind the block; null is in_place from scratch and inserted into pretrained models."""
    group_sizes: list[int] = [4, 4]
    """Experts of each modality; a single group serves all modalities alike, and an expert alone in its group is a dense network."""
    modality_starts: list[int] = []
    """First token id of each modality after the first, ascending; empty asks the tokenizer where its image codes begin."""
    is_noisy: bool | None = None
    """Gumbel-sigmoid noise on the scores of modality-aware layers in training; null is true for upcycled models alone."""
    upcycle_from: str | None = None
    """Trained sparse model with one expert per modality (ffn.group_sizes=[1,1]), or its forest, whose experts are copied to all of their group; its cost counts as the model's own."""
    depth_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the tokens that pass every second expert layer, beginning with the first (mixture of depths, modality-aware layers); null lets all pass all."""
    inference: Inference = Inference.auxiliary
    """auxiliary: causal, by auxiliary routers; expert_choice: looks at the whole batch (modality-aware layers)."""
    auxiliary_weight: float = Field(default=1.0, ge=0)
    """Weight of the auxiliary routers' loss, whose gradient reaches nothing but these routers."""
    auxiliary_tokens: int = Field(default=0, ge=0)
    """Tokens on which the auxiliary routers learn after the model, all else frozen; 0 lets them learn beside it."""
    backend: str = Field(default="auto", pattern="^(auto|loop|grouped_mm|triton)$")
    """What multiplies: auto, loop, grouped_mm, triton."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, str) and not _LAYERS.fullmatch(value):
            raise ValueError("must be all, every_<k>, spread_<n> or a list of block numbers")
        if isinstance(value, list) and (not value or min(value) < 0 or len(set(value)) < len(value)):
            raise ValueError("must list different block numbers from 0, at least one")
        return value

    @property
    def is_sparse(self) -> bool:
        """Whether there are expert layers."""
        return self.layer is not FfnLayer.dense

    @property
    def has_two_routings(self) -> bool:
        """Whether tokens are routed by auxiliary routers outside of training, and over the whole batch in it."""
        is_chosen = max(self.group_sizes, default=1) > 1 or self.depth_fraction is not None
        return self.layer is FfnLayer.modality and self.inference is Inference.auxiliary and is_chosen

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens are routed over the whole batch outside of training, too."""
        if self.layer is FfnLayer.top_k:
            return self.router is RouterName.expert_choice
        return self.layer is FfnLayer.modality and self.inference is Inference.expert_choice

    def blocks(self, num_layers: int) -> list[int]:
        """Numbers of the blocks that get an expert layer, ascending.

        Args:
            num_layers: Transformer blocks L. ``spread_<n>`` places layer i of n behind ``floor(i * L / (n + 1))`` blocks
                (BASE, https://arxiv.org/abs/2103.16716).

        Raises:
            ValueError: If there are not so many blocks.
        """
        if isinstance(self.layers, list):
            blocks = sorted(self.layers)
        elif self.layers == "all":
            blocks = list(range(num_layers))
        else:
            kind, number = self.layers.split("_")
            count = int(number)
            if kind == "every":
                blocks = list(range(count - 1, num_layers, count))
            else:
                blocks = sorted({max(0, i * num_layers // (count + 1) - 1) for i in range(1, count + 1)})
                if len(blocks) < count:
                    raise ValueError(f"ffn.layers={self.layers} needs {count} blocks apart, the model has {num_layers}")
        if not blocks or blocks[-1] >= num_layers:
            raise ValueError(f"ffn.layers={self.layers} names blocks beyond the {num_layers} of the model")
        return blocks


def ffn_problems(ffn: FfnConfig) -> list[str]:
    """List contradictions between the keys of ``ffn``, worded for the user."""
    problems = []
    if ffn.depth_fraction is not None and ffn.layer is not FfnLayer.modality:
        problems.append(f"ffn.depth_fraction belongs to ffn=modality, got {ffn.layer}; leave it null")
    if ffn.layer is FfnLayer.top_k and ffn.experts_per_token > ffn.num_experts:
        problems.append(
            f"ffn.experts_per_token must be at most ffn.num_experts ({ffn.num_experts}), got {ffn.experts_per_token}"
        )
    if ffn.auxiliary_tokens and (not ffn.has_two_routings or not ffn.auxiliary_weight):
        problems.append(
            "ffn.auxiliary_tokens trains auxiliary routers: it needs ffn=modality with several experts in a group or "
            "ffn.depth_fraction, ffn.inference=auxiliary and ffn.auxiliary_weight above 0; set it to 0 otherwise"
        )
    if ffn.upcycle_from is not None and ffn.layer is not FfnLayer.modality:
        problems.append(f"ffn.upcycle_from belongs to ffn=modality, got {ffn.layer}; leave it null")
    if ffn.layer is FfnLayer.modality:
        if min(ffn.group_sizes, default=0) < 1:
            problems.append(f"ffn.group_sizes must be at least 1 each, got {ffn.group_sizes}")
        starts, wanted = ffn.modality_starts, len(ffn.group_sizes) - 1
        if starts and (len(starts) != wanted or starts != sorted(starts)):
            problems.append(
                f"ffn.modality_starts must hold {wanted} ascending token ids, the first of each modality after the "
                f"first, got {starts}; leave it empty to ask the tokenizer"
            )
    return problems


def expert_width(ffn: FfnConfig, dense_width: int) -> int:
    """Feed-forward width of one expert; where it is not given, the one that costs a token the FLOPs of the dense one.

    Args:
        ffn: Of the layer.
        dense_width: Feed-forward width of the dense network.

    Raises:
        ConfigError: If the shared network leaves nothing for the experts.
    """
    if ffn.hidden_width is not None:
        return ffn.hidden_width
    if ffn.layer is FfnLayer.base:
        inner = dense_width if ffn.placement is Placement.inserted else dense_width * _GATED_MATRICES / _BASE_MATRICES
        return _rounded(inner / ffn.num_sublayers)
    if ffn.layer is not FfnLayer.top_k:
        return dense_width
    rest = dense_width - ffn.shared_hidden_width
    if rest < _MULTIPLE:
        raise ConfigError(
            [
                f"ffn.shared_hidden_width ({ffn.shared_hidden_width}) leaves no width for experts below the dense "
                f"network's {dense_width}; lower it, or set ffn.hidden_width"
            ]
        )
    return _rounded(rest / copies_per_token(ffn))


def copies_per_token(ffn: FfnConfig) -> int:
    """Experts that a token takes, on average."""
    is_many = ffn.layer is FfnLayer.top_k and ffn.router in (RouterName.top_k, RouterName.expert_choice)
    return ffn.experts_per_token if is_many else 1


def _rounded(width: float) -> int:
    return max(_MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE)
