"""Which sequences of a batch go through the model together.

Layers that balance or limit loads look at all tokens of a pass, so for them the passes belong to what is learnt: a run
keeps those that it began with, whatever processes continue it. Where loads are balanced globally, those of all
processes count: such a run is cut anew, and without ``train.micro_batch_sequences`` all tokens of an update count.
"""

import numpy as np

from btm.config_ffn import Balance, FfnConfig, FfnLayer, RouterName


def routes_by_token(ffn: FfnConfig) -> bool:
    """Whether what a layer does with a token, and its losses, depend on no other token."""
    return ffn.layer in (FfnLayer.dense, FfnLayer.demix)


def keeps_passes(ffn: FfnConfig) -> bool:
    """Whether a run must keep the passes that it began with, whatever processes continue it."""
    by_choice = ffn.layer is FfnLayer.top_k and ffn.router is not RouterName.expert_choice
    is_free = by_choice and ffn.capacity_factor is None and ffn.balance is Balance.globally
    return not routes_by_token(ffn) and not is_free


def passes_of(num_sequences: int, num_processes: int, micro_batch_sequences: int | None) -> list[int]:
    """Sequences of each pass, in the order of the batch.

    Each process has as equal a share of neighbouring sequences as possible, in passes of at most
    ``micro_batch_sequences`` (None: in a single one).
    """
    sizes: list[int] = []
    for rank in range(num_processes):
        rows = (rank + 1) * num_sequences // num_processes - rank * num_sequences // num_processes
        count = micro_batch_sequences or max(1, rows)
        sizes += [min(count, rows - begin) for begin in range(0, rows, count)]
    return sizes


def passes_of_rank(num_passes: int, rank: int, num_processes: int) -> range:
    """Numbers of the passes that one process runs."""
    return range(rank * num_passes // num_processes, (rank + 1) * num_passes // num_processes)


def order_by_expert(domain: np.ndarray, num_shares: int, num_groups: int) -> np.ndarray:
    """Order of the sequences of a DEMix batch in which most meet the process that holds their expert.

    Processes are numbered by group and, inside it, by share. Where every domain has equally many sequences and the
    shares have equally many domains, no token has to travel (section 3.2 of https://arxiv.org/abs/2108.05036).

    Args:
        domain: Domain of each sequence.
        num_shares: Processes of a group.
        num_groups: Groups that each hold every expert.

    Returns:
        Index of the sequences, int64, as many as ``domain``.
    """
    parts = np.array_split(np.argsort(domain, kind="stable"), num_shares * num_groups)
    places = [(share, group) for group in range(num_groups) for share in range(num_shares)]
    return np.concatenate([parts[share * num_groups + group] for share, group in places])
