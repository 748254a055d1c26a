"""From plain dictionaries to the typed configuration, with every problem listed at once.

Pydantic finds the problems; this file words them for the user (what, got, allowed, nearest known key) and adds the
checks that concern several fields.
"""

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from btm.config import Config
from btm.config_ffn import SWIGLU_ARCHITECTURES, FfnConfig, FfnLayer, ffn_problems
from btm.config_launch import group_problems, node_problems
from btm.config_merge import MergeMethodName
from btm.config_model import engine_problems, share_problems
from btm.config_train import BranchOptimizer, BranchSource, optimizer_problems
from btm.errors import ConfigError
from btm.files import name_problem
from btm.redaction import names_secret


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Build the configuration from nested dictionaries.

    Raises:
        ConfigError: With all unknown keys, wrong types, bad values and contradictions found.
    """
    try:
        config = Config.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError([_describe(item) for item in error.errors()]) from None
    problems = cross_field_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def key_problem(dotted: str) -> str | None:
    """Say why ``dotted`` (``train.lr``) is not a key of the configuration; None when it is one."""
    model: type[BaseModel] | None = Config
    seen: list[str] = []
    is_named = False
    for part in dotted.split("."):
        if model is None:
            return None
        if is_named:
            # A free name, as in launch.groups.<name>; what comes behind it is not free.
            seen, is_named = [*seen, part], False
            continue
        fields = _fields(model)
        if part not in fields:
            return _unknown_key([*seen, part], fields)
        seen.append(part)
        model, is_named = _submodel(fields[part]), get_origin(fields[part].annotation) is dict
    return None


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values of ``config`` under the names used in YAML."""
    return config.model_dump(mode="json", by_alias=True)


def cross_field_problems(config: Config) -> list[str]:
    """List contradictions between fields, worded for the user."""
    return [
        *_data_problems(config),
        *_train_problems(config),
        *_ffn_problems(config),
        *_other_problems(config),
    ]


def _data_problems(config: Config) -> list[str]:
    data = config.data
    groups = {"domains": data.domains, "novel": data.novel, "add_later": data.add_later}
    problems = []
    owners: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if problem := name_problem(name):
                problems.append(f"data.{group}: {problem}")
            if (other := owners.setdefault(name.lower(), group)) != group:
                problems.append(f"data.{group}.{name} is already in data.{other}; name every domain once")
    if data.dev_fraction + data.test_fraction >= 0.9:
        problems.append(
            f"data.dev_fraction + data.test_fraction must stay below 0.9, got {data.dev_fraction + data.test_fraction}"
        )
    named = {*data.domains, *data.novel, *data.add_later, config.domain}
    if (data.domains or config.domain) and (strange := sorted(set(data.images) - named)):
        problems.append(f"data.images names unknown domains {strange}; known: {sorted(filter(None, named))}")
    size, patch = config.tokenizer.image_size, config.tokenizer.image_patch
    if size % patch:
        problems.append(f"tokenizer.image_size must be a multiple of tokenizer.image_patch ({patch}), got {size}")
    if data.domains and (unknown := sorted(set(data.weights) - set(data.domains))):
        problems.append(f"data.weights names unknown domains {unknown}; known: {sorted(data.domains)}")
    problems += [
        f"data.weights.{name} must be at least 0, got {weight}" for name, weight in data.weights.items() if weight < 0
    ]
    return problems


def _train_problems(config: Config) -> list[str]:
    train, problems = config.train, []
    if train.batch_tokens % train.sequence_length:
        problems.append(
            f"train.batch_tokens must be a multiple of train.sequence_length ({train.sequence_length}), "
            f"got {train.batch_tokens}"
        )
    elif train.batch_tokens < train.sequence_length * max(1, len(config.data.domains)):
        problems.append(
            f"train.batch_tokens must hold one sequence of {train.sequence_length} tokens for each of "
            f"{len(config.data.domains)} ELMs, got {train.batch_tokens}"
        )
    if train.tokens < train.batch_tokens:
        problems.append(f"train.tokens must be at least one batch ({train.batch_tokens}), got {train.tokens}")
    if not config.model.path and train.sequence_length > config.model.max_positions:
        problems.append(
            f"train.sequence_length must be at most model.max_positions ({config.model.max_positions}), "
            f"got {train.sequence_length}"
        )
    if train.min_lr_fraction > 0 and train.warmup_fraction + train.decay_fraction > 1 and train.schedule == "wsd":
        problems.append("train.warmup_fraction + train.decay_fraction must be at most 1 with train.schedule=wsd")
    return problems


def _ffn_problems(config: Config) -> list[str]:
    ffn, model, problems = config.ffn, config.model, ffn_problems(config.ffn)
    if not ffn.is_sparse:
        return problems
    if model.path and ffn.upcycle_from:
        problems.append("model.path and ffn.upcycle_from both say what the model begins as; give one of them")
    if not model.path:
        if model.arch not in SWIGLU_ARCHITECTURES:
            problems.append(
                f"ffn={ffn.layer} needs a model with SwiGLU feed-forward networks; model.arch must be one of "
                f"{', '.join(SWIGLU_ARCHITECTURES)}, got {model.arch!r}"
            )
        try:
            ffn.blocks(model.num_layers)
        except ValueError as error:
            problems.append(str(error))
    if ffn.layer is FfnLayer.demix and len(set(config.data.weights.values())) > 1:
        problems.append(
            f"ffn=demix gives every domain equally many sequences of each update, so data.weights must be equal, got "
            f"{dict(config.data.weights)}; leave them out"
        )
    if config.baselines.random_split:
        problems.append(f"baselines.random_split splits a forest; ffn={ffn.layer} trains one model: set it to false")
    return problems


def _other_problems(config: Config) -> list[str]:
    problems = []
    model, width = config.model, config.model.hidden_size or 64 * config.model.num_layers
    heads = model.num_heads or max(1, width // 64)
    if width % heads:
        problems.append(f"model.hidden_size ({width}) must be a multiple of model.num_heads ({heads})")
    elif heads % (model.num_kv_heads or heads):
        problems.append(f"model.num_heads ({heads}) must be a multiple of model.num_kv_heads, got {model.num_kv_heads}")
    if config.branch.source is not BranchSource.seed and config.branch.optimizer is BranchOptimizer.keep:
        problems.append(
            f"branch.optimizer=continue needs branch.from=seed (a mean of models has no optimizer state), "
            f"got branch.from={config.branch.source}; set branch.optimizer=reset"
        )
    merge = config.merge
    if merge.method is MergeMethodName.weighted and not merge.weights:
        problems.append("merge.method=weighted needs merge.weights, for example merge.weights.law=0.7")
    if any(weight < 0 for weight in merge.weights.values()) or (merge.weights and sum(merge.weights.values()) <= 0):
        problems.append(f"merge.weights must be at least 0 and not all 0, got {dict(merge.weights)}")
    if name := name_problem(config.name):
        problems.append(f"name: {name}")
    if config.launch.cpus_per_elm < config.engine.num_processes:
        problems.append(
            f"launch.cpus_per_elm must be at least engine.num_processes ({config.engine.num_processes}), "
            f"got {config.launch.cpus_per_elm}"
        )
    problems += group_problems(
        config.launch, num_processes=config.engine.num_processes, tensor_parallel=config.engine.tensor_parallel
    )
    problems += node_problems(config.launch, num_processes=config.engine.num_processes)
    processes = max(config.launch.gpus_per_elm, config.engine.num_processes)
    problems += engine_problems(
        config.engine, is_sparse=config.ffn.is_sparse, num_processes=processes, model=config.model
    )
    problems += share_problems(config.engine, _experts_of_a_layer(config.ffn))
    problems += optimizer_problems(config.train)
    for key in model.extra:
        if names_secret(key):
            problems.append(f"model.extra.{key} looks like a secret; secrets come from the environment only")
    return problems


def _experts_of_a_layer(ffn: FfnConfig) -> int | None:
    """None where there are none, or one per domain."""
    if ffn.layer is FfnLayer.modality:
        return sum(ffn.group_sizes)
    return ffn.num_experts if ffn.layer in (FfnLayer.top_k, FfnLayer.base) else None


def _describe(item: Any) -> str:
    path = [str(part) for part in item["loc"] if part not in ("str", "list[str]")]
    if item["type"] == "extra_forbidden":
        model = Config
        for part in path[:-1]:
            field = _fields(model).get(part)
            # Without a field it is a free name, as in launch.groups.<name>.
            model = _submodel(field) or Config if field else model
        return _unknown_key(path, _fields(model))
    if item["type"] == "int_parsing_size":
        return f"{'.'.join(path)} is too large, got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{'.'.join(path)} {message}, got {item['input']!r}"


def _unknown_key(path: list[str], fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.5)
    hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"known keys: {', '.join(sorted(fields))}"
    return f"unknown key {'.'.join(path)}; {hint}"


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _submodel(field: Any) -> type[BaseModel] | None:
    candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
