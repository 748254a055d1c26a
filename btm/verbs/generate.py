"""``btm generate``: continue a prompt with the ensemble, the seed model, one ELM or any model directory."""

from pathlib import Path
from typing import Any

from btm.config import Config
from btm.errors import ConfigError
from btm.forest import Forest
from btm.session import existing_forest


def main(config: Config) -> None:
    """Print the prompt and its continuation.

    Raises:
        ConfigError: If there is no prompt.
    """
    if not config.generate.prompt:
        raise ConfigError(["btm generate needs generate.prompt='some text'"])
    print(continuation(existing_forest(config), config))


def continuation(forest: Forest, config: Config) -> str:
    """The prompt followed by ``generate.max_new_tokens`` tokens of the chosen model."""
    import torch

    from btm.corpus.tokenizer import load_tokenizer

    wanted, tokenizer = config.generate, load_tokenizer(forest.tokenizer_dir)
    model = load(forest, config)
    torch.manual_seed(config.seed)
    prompt = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(wanted.prompt, add_special_tokens=False)]])
    sampling = {"temperature": wanted.temperature, "top_p": wanted.top_p} if wanted.temperature else {}
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=wanted.max_new_tokens,
            do_sample=bool(wanted.temperature),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(output[0][1:], skip_special_tokens=True))


def load(forest: Forest, config: Config) -> Any:
    """The model that ``generate.model`` names.

    Raises:
        ConfigError: If it names nothing.
    """
    import torch

    from btm.forest_models import load_forest_ensemble
    from btm.model.causal_lm import load_model

    name = config.generate.model
    if name == "ensemble":
        return load_forest_ensemble(forest, config.ensemble, domain=config.domain)
    if name == "seed" or name.startswith("elm/"):
        return load_model(forest.directory(name.removeprefix("elm/")), torch.float32)
    if Path(name).is_dir():
        return load_model(Path(name), torch.float32)
    known = ["ensemble", "seed", *(f"elm/{domain}" for domain in forest.domains)]
    raise ConfigError([f"generate.model must be one of {known} or a model directory, got {name!r}"])
