"""The backbone: a transformers causal LM, built from sizes or read from and written to a Hugging Face directory."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import PreTrainedConfig as TransformersConfig
from transformers.utils import logging as transformers_logging

from btm.config_model import ModelConfig
from btm.errors import CheckpointError
from btm.files import directory_in_one_step, write_json
from btm.model.architecture import transformers_config
from btm.model.demix import dense_of_domain
from btm.model.learning_routers import auxiliary_routers, matmul_weights, trains_auxiliary_only
from btm.model.sparse_lm import inactive_matmul_weights, is_sparse_directory, read_sparse, sparsity_of, write_sparse
from btm.records import TOKENIZER_FILES

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_ONE_FILE = "1000TB"


def build_model(config: ModelConfig, *, vocab_size: int, eos_id: int, seed: int) -> PreTrainedModel:
    """Build a causal LM with random fp32 weights.

    The weights depend on the sizes and ``seed`` alone: not on the number of threads, nor on random numbers drawn
    before; the global random state is left as it was.

    Args:
        config: Sizes and architecture; ``config.path`` is not looked at (see :func:`load_model`).
        vocab_size: Entries of the tokenizer.
        eos_id: Token that ends a document; also the begin-of-sequence token, since documents are read as EOS + tokens.
        seed: Root of the random weights.

    Returns:
        The model on the CPU, in fp32 and training mode.

    Raises:
        ConfigError: If transformers does not know the architecture, or its config does not take the sizes.
    """
    architecture = transformers_config(config, vocab_size=vocab_size, eos_id=eos_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id)
    return model.train()


def load_model(
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    vocab_size: int | None = None,
    domain: str | None = None,
) -> PreTrainedModel:
    """Read a causal LM: a Hugging Face directory, or a sparse model that :func:`save_model` wrote.

    Only safetensors are read, and no code of the directory runs.

    Args:
        directory: Folder with ``config.json`` and ``model.safetensors`` (or its sharded form).
        dtype: Type of the weights in memory.
        vocab_size: Entries of the tokenizer that the model will be used with; the model must have at least as many.
        domain: Of a DEMix model take the dense model with the experts of this domain.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: If the directory is not such a folder, holds only pickles, needs code of its own, or its
            tensors do not fit its config or the tokenizer.
        ConfigError: If ``domain`` is given and the model has no experts of it.
    """
    folder = Path(directory)
    _check_directory(folder)
    model = read_sparse(folder, dtype) if is_sparse_directory(folder) else _read_transformers(folder, dtype)
    own_size = model.get_input_embeddings().get_parameter("weight").shape[0]
    if vocab_size is not None and own_size < vocab_size:
        raise CheckpointError(
            f"{folder} has embeddings for {own_size} tokens, but the tokenizer has {vocab_size}; use the tokenizer "
            f"that the model was trained with"
        )
    return model.eval() if domain is None else dense_of_domain(model, domain).eval()


def _read_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                # Reported by _check_loaded, which names the tensors.
                ignore_mismatched_sizes=True,
            )
            model, info = loaded
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder} does not load as a transformers causal LM: {first}; it must be what save_pretrained writes for "
            f"an architecture that this transformers version knows"
        ) from error
    _check_loaded(folder, info)
    return model


def save_model(
    model: PreTrainedModel, directory: Path | str, dtype: torch.dtype, tokenizer_dir: Path | str | None = None
) -> None:
    """Write ``model`` as a directory that replaces ``directory`` in one step; dense models as Hugging Face has them.

    The directory holds ``config.json``, one ``model.safetensors``, ``generation_config.json`` and the tokenizer's
    files; equal weights give equal bytes.

    Args:
        model: Any causal LM, patched or not, on any device; it is not changed.
        directory: Folder to write; an existing one is replaced.
        dtype: Type that the floating-point weights are stored in.
        tokenizer_dir: Folder whose tokenizer files are copied beside the weights.

    Raises:
        CheckpointError: If ``tokenizer_dir`` has no tokenizer files.
    """
    files = _tokenizer_files(Path(tokenizer_dir)) if tokenizer_dir is not None else []
    with directory_in_one_step(Path(directory)) as folder:
        if sparsity_of(model) is not None:
            write_sparse(model, folder, _state_of_type(model, dtype))
        else:
            with _without_progress_bars():
                model.save_pretrained(
                    folder, state_dict=_state_of_type(model, dtype), max_shard_size=_ONE_FILE, save_original_format=True
                )
        config_path = folder / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(config_path, config)
        for file in files:
            shutil.copyfile(file, folder / file.name)


def num_parameters(model: nn.Module) -> int:
    """Weights of ``model``; shared ones (tied embeddings) count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel | TransformersConfig, sequence_length: int) -> float:
    """Training FLOPs (forward and backward) per token.

    ``6 * N + 12 * L * W * T``: N weights of matrices that multiply every token (all parameters with two or more
    dimensions, without embedding tables, with the output head once even when it is tied, and of experts only those
    that a token meets), L layers, W heads times head width, T the sequence length. The attention term counts the full
    T x T square, as is usual for reported FLOPs (PaLM, appendix B, https://arxiv.org/abs/2204.02311), although causal
    attention needs only half of it. A model that only auxiliary routers learn from runs forward, a third of it.

    Args:
        model: A causal LM or its transformers config.
        sequence_length: Tokens per sequence, T.
    """
    if isinstance(model, TransformersConfig):
        with torch.device("meta"):
            return flops_per_token(AutoModelForCausalLM.from_config(model, dtype=torch.float32), sequence_length)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    attention = 12 * config.num_hidden_layers * width * sequence_length
    active = _num_matmul_weights(model) - inactive_matmul_weights(model)
    if trains_auxiliary_only(model):
        # Two passes more over these routers; their gradient goes no further.
        learning = sum(matmul_weights(router) for router in auxiliary_routers(model, with_choice=True))
        return 2.0 * active + 4.0 * learning + attention / 3
    return 6.0 * active + attention


def _num_matmul_weights(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        tables.discard(id(head.weight))
    return sum(weight.numel() for weight in model.parameters() if weight.ndim >= 2 and id(weight) not in tables)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _check_directory(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; give a Hugging Face model directory")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give a Hugging Face model directory")
    if (folder / _WEIGHTS).is_file():
        return
    if (folder / _WEIGHTS_INDEX).is_file():
        _check_shards(folder)
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are "
            f"read; convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{folder} has no {_WEIGHTS}; give a directory written by save_pretrained")


def _check_shards(folder: Path) -> None:
    try:
        shards = set(json.loads((folder / _WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _WEIGHTS_INDEX} is not a safetensors index ({error})") from None
    for shard in sorted(map(str, shards)):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / _WEIGHTS_INDEX} names {shard!r}, which is not a .safetensors file beside it"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks {shard}, which {_WEIGHTS_INDEX} names; copy the directory again")


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    for kind, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(
                f"{folder} {verb} {len(names)} tensors of its config ({shown}); config.json and the weights belong to "
                f"different models: restore both from one copy"
            )


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} has no tokenizer files; give the forest's tokenizer directory")
    return files


def _state_of_type(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in converted:
            converted[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = converted[key]
    return state
