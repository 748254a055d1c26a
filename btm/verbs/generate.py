"""``btm generate``: continue a prompt with the ensemble, the seed model, one ELM or any model directory."""

from pathlib import Path
from typing import Any

from btm.config import Config
from btm.errors import ConfigError
from btm.forest import Forest
from btm.session import existing_forest


def main(config: Config) -> None:
    """Print the prompt and its continuation; pictures of it are written as PNG files.

    Raises:
        ConfigError: If there is no prompt.
    """
    if not config.generate.prompt and not config.generate.image:
        raise ConfigError(["btm generate needs generate.prompt='some text'"])
    print(continuation(existing_forest(config), config))


def continuation(forest: Forest, config: Config) -> str:
    """The prompt followed by ``generate.max_new_tokens`` tokens of the chosen model.

    A picture in it is written to a file, whose path stands in brackets in its place.
    """
    import torch

    from btm.corpus.images.vocabulary import IMAGE_TOKENIZER_DIR
    from btm.corpus.tokenizer import load_tokenizer

    wanted, tokenizer = config.generate, load_tokenizer(forest.tokenizer_dir)
    pictures = None
    if wanted.image or (forest.tokenizer_dir / IMAGE_TOKENIZER_DIR).is_dir():
        pictures = _Pictures(forest, config)
    model = load(forest, config)
    torch.manual_seed(config.seed)
    before = pictures.prompt if pictures else []
    text = tokenizer.encode(wanted.prompt, add_special_tokens=False)
    prompt = torch.tensor([[tokenizer.eos_token_id, *before, *text]])
    sampling = {"temperature": wanted.temperature, "top_p": wanted.top_p} if wanted.temperature else {}
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=wanted.max_new_tokens,
            do_sample=bool(wanted.temperature),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
            **(pictures.options if pictures else {}),
        )
    ids = output[0][1:]
    return pictures.written(ids.tolist()) if pictures else str(tokenizer.decode(ids, skip_special_tokens=True))


class _Pictures:
    """What pictures add: one before the prompt, the rule of well-formed ones, files of those that come out."""

    def __init__(self, forest: Forest, config: Config) -> None:
        from btm.corpus.images.decoder import MixedDecoder

        self._decoder, self._path = MixedDecoder(forest.tokenizer_dir), config.generate.image
        self._directory = Path(config.generate.image_directory or forest.path / "generated")

    @property
    def prompt(self) -> list[int]:
        """Token ids of the picture before the prompt."""
        from btm.corpus.images.pictures import fit_square, load_picture

        if self._path is None:
            return []
        tokenizer = self._decoder.image_tokenizer
        codes = tokenizer.encode(fit_square(load_picture(self._path), tokenizer.size))
        return self._decoder.vocabulary.image_ids(codes).tolist()

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of ``generate``."""
        from transformers import LogitsProcessorList

        from btm.corpus.images.grammar import ImageGrammar

        decoder = self._decoder
        grammar = ImageGrammar(decoder.vocabulary, decoder.image_tokenizer.num_patches)
        return {"logits_processor": LogitsProcessorList([grammar])}

    def written(self, ids: list[int]) -> str:
        """The text of ``ids`` with the file of each picture in its place."""
        paths = iter(self._decoder.save_images(ids, self._directory))
        return "".join(part if isinstance(part, str) else f"[{next(paths)}]" for part in self._decoder.decode(ids))


def load(forest: Forest, config: Config) -> Any:
    """The model that ``generate.model`` names.

    Raises:
        ConfigError: If it names nothing.
    """
    import torch

    from btm.forest_models import load_forest_ensemble
    from btm.model.causal_lm import load_model

    name = config.generate.model
    if config.ffn.is_sparse and name.partition("/")[0] in ("ensemble", "sparse", "dense"):
        return _load_trained(forest, config)
    if name == "ensemble":
        return load_forest_ensemble(forest, config.ensemble, domain=config.domain)
    if name == "seed" or name.startswith("elm/"):
        return load_model(forest.directory(name.removeprefix("elm/")), torch.float32)
    if Path(name).is_dir():
        return load_model(Path(name), torch.float32)
    known = ["ensemble", "seed", *(f"elm/{domain}" for domain in forest.domains)]
    raise ConfigError([f"generate.model must be one of {known} or a model directory, got {name!r}"])


def _load_trained(forest: Forest, config: Config) -> Any:
    """The sparse model, the mixture over its domains where it has them, one domain's model, or the dense baseline."""
    import torch

    from btm.config_ffn import FfnLayer
    from btm.ensemble.demix import load_demix_ensemble
    from btm.forest_models import trained_length
    from btm.model.causal_lm import load_model
    from btm.plan_steps import ROUTERS
    from btm.sparse_models import SparseModels

    model, _, domain = config.generate.model.replace("ensemble", "sparse").partition("/")
    is_demix = model == "sparse" and config.ffn.layer is FfnLayer.demix
    if model == "sparse" and config.ffn.auxiliary_tokens:
        model = ROUTERS
    directory = SparseModels.open(forest.path).directory if is_demix else forest.path / "runs" / model / "model"
    if is_demix and not domain:
        return load_demix_ensemble(directory, config=config.ensemble, sequence_length=trained_length(forest))
    return load_model(directory, torch.float32, domain=domain or None)
