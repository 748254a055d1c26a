"""Runs that die and go on, by other engines too."""

import os
import signal
from collections.abc import Callable

import pytest
from training_runs import outcome, rows

from btm.config_model import EngineConfig
from btm.requests import TrainSpec
from btm.train.checkpoint import CheckpointStore

KILLED, PEER_LOST = -signal.SIGKILL, 75


def by_torch(spec: TrainSpec, world: int, **engine) -> TrainSpec:
    """``spec`` on the torch engine, in fp32."""
    return spec.model_copy(update={"engine": EngineConfig(**({"dtype": "fp32", "num_processes": world} | engine))})


def by_deepspeed(spec: TrainSpec, stage: int, world: int, **engine) -> TrainSpec:
    """``spec`` under DeepSpeed, in fp32; ZeRO 3 cuts up tiny weights, too."""
    small = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings = {"dtype": "fp32", "name": "deepspeed", "zero_stage": stage, "num_processes": world, "deepspeed": small}
    return spec.model_copy(update={"engine": EngineConfig(**(settings | engine))})


def by_megatron(spec: TrainSpec, tensor: int, world: int, **engine) -> TrainSpec:
    """``spec`` under Megatron, in fp32."""
    settings = {"dtype": "fp32", "name": "megatron", "tensor_parallel": tensor, "num_processes": world}
    return spec.model_copy(update={"engine": EngineConfig(**(settings | engine))})


def dying_after(update: int, victim: int = 0) -> Callable[[int], None]:
    """Let the main rank kill itself as soon as it has written the checkpoint of ``update``."""

    def prepare(rank: int) -> None:
        if rank != victim:
            return
        original = CheckpointStore.save

        def save(self, number: int, *arguments):
            path = original(self, number, *arguments)
            if number == update:
                os.kill(os.getpid(), signal.SIGKILL)
            return path

        CheckpointStore.save = save

    return prepare


def same_curve(spec: TrainSpec, reference: TrainSpec) -> None:
    """Both runs have the same metric rows, up to rounding, and the same counts."""
    for ours, right in zip(rows(spec), rows(reference), strict=True):
        assert ours.keys() == right.keys()
        for key, value in right.items():
            assert ours[key] == pytest.approx(value, rel=1e-4), (key, ours["update"])
    kept = ("realised_tokens", "updates", "num_parameters", "tokens", "flops")
    results = [outcome(one)["result"] for one in (spec, reference)]
    assert [results[0][key] for key in kept] == [results[1][key] for key in kept]
