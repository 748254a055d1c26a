"""The ELMs of an ensemble, their prior, and the likelihood of documents under their mixture."""

import copy
import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from btm.config_ensemble import EnsembleConfig, PosteriorMode, Prior
from btm.corpus.windows import document_windows
from btm.ensemble.likelihood import TokenDocuments, token_log_likelihoods
from btm.ensemble.posterior import UpdatingPrior, keep_top_k, log_prior_of, log_weights, mixture
from btm.errors import EnsembleError


class EnsembleMembers(PreTrainedModel):
    """ELMs that share a vocabulary, held as one module.

    Attributes:
        names: Names of the ELMs in memory.
        elms: Those ELMs.
        ensemble: How they are mixed.
        tokenizer: For texts; may be set later.
        sequence_length: Window in which documents are scored, in tokens.
    """

    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        *,
        names: Sequence[str] | None = None,
        prior: dict[str, float] | None = None,
        ensemble: EnsembleConfig | None = None,
        sequence_length: int | None = None,
    ) -> None:
        """Join ``models``, which must share one vocabulary.

        Args:
            models: The ELMs, on one device.
            names: Their names, for ``prior``; by default their positions.
            prior: Name -> weight; None is uniform.
            ensemble: How to mix.
            sequence_length: Window in which documents are scored; None is the longest that the ELMs take.

        Raises:
            EnsembleError: If there are no models, vocabularies differ, names repeat, or the prior does not fit.
        """
        names = list(names) if names is not None else [str(position) for position in range(len(models))]
        _check(models, names)
        ensemble = ensemble or EnsembleConfig.model_validate({})
        log_prior = log_prior_of(prior, names)
        chosen = choose_by_prior(log_prior, ensemble)
        super().__init__(copy.deepcopy(models[0].config))
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.ensemble = ensemble
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.sequence_length = sequence_length or self.config.max_position_embeddings
        self.names = [names[index] for index in chosen]
        self.elms = torch.nn.ModuleList(models[index] for index in chosen).eval()
        self._takes_positions = ["position_ids" in inspect.signature(elm.forward).parameters for elm in self.elms]
        # Not a buffer: `.to(dtype)` would round it.
        self._log_prior = torch.log_softmax(log_prior[chosen], 0)

    def perplexity(self, documents: Sequence[str] | Sequence[Sequence[int]], *, batch_sequences: int = 16) -> float:
        """Perplexity per token of ``documents``, each read as end-of-text token + tokens.

        Args:
            documents: Texts (``tokenizer`` must be set; the end-of-text token is appended), or token ids as in a token
                shard, their final end-of-text token included.
            batch_sequences: Windows per forward pass of one ELM.

        Raises:
            EnsembleError: If there is nothing to score, or texts are given and there is no tokenizer.
        """
        logp = self.document_log_likelihoods(list(map(self._tokens, documents)), batch_sequences=batch_sequences)
        if not sum(map(len, logp)):
            raise EnsembleError("perplexity needs at least one token, got none")
        return math.exp(-float(torch.cat(logp).mean()))

    def document_log_likelihoods(
        self, documents: Sequence[Sequence[int]], *, batch_sequences: int = 16
    ) -> list[Tensor]:
        """Log-probability (nats, float64) of every token of each document.

        Documents longer than ``sequence_length`` are read in windows; the posterior goes on from window to window and
        starts anew with each document. With ``prior=updating`` the prior follows the documents in their order.
        """
        shard, settings = TokenDocuments(documents), self.ensemble
        windows = document_windows(
            shard,
            sequence_length=self.sequence_length,
            eos_id=self.eos_id,
        )
        scores = [token_log_likelihoods(elm, windows, batch_sequences=batch_sequences) for elm in self._members()]
        updating = UpdatingPrior(len(scores), mode=settings.posterior, temper=settings.temper)
        result = []
        for logp in torch.from_numpy(np.stack(scores)).split(shard.lengths.tolist(), dim=1):
            log_prior = updating.log_prior if settings.prior is Prior.updating else self._log_prior
            log_w = log_weights(logp, log_prior, mode=settings.posterior, temper=settings.temper, top_k=self._top_k)
            result.append(mixture(logp, log_w))
            updating.observe(logp)
        return result

    @property
    def eos_id(self) -> int:
        """The end-of-text token, with which every document begins and ends.

        Raises:
            EnsembleError: If neither the tokenizer nor the ELMs name one.
        """
        eos = self.config.eos_token_id if self.tokenizer is None else self.tokenizer.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
        if not isinstance(eos, int):
            raise EnsembleError("the ELMs name no end-of-text token: set `ensemble.tokenizer` to one that has it")
        return eos

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            EnsembleError: If there is none.
        """
        if self.tokenizer is None:
            raise EnsembleError("texts need a tokenizer: set `ensemble.tokenizer`, or give token ids")
        return self.tokenizer

    def _tokens(self, document: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(document, str):
            return document
        return [
            *self.text_tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            self.eos_id,
        ]

    def _members(self) -> list[PreTrainedModel]:
        return [elm for elm in self.elms if isinstance(elm, PreTrainedModel)]

    @property
    def _top_k(self) -> int:
        return min(self.ensemble.top_k or len(self.elms), len(self.elms))


def choose_by_prior(log_prior: Tensor, ensemble: EnsembleConfig) -> list[int]:
    """Positions of the ELMs that an ensemble needs in memory, ascending: see :class:`EnsembleForCausalLM`."""
    possible = log_prior[log_prior > -torch.inf]
    uniform = bool((possible == possible[0]).all())
    top_k = ensemble.top_k or len(possible)
    if top_k < len(possible) and (not uniform or ensemble.posterior is PosteriorMode.fixed):
        log_prior = keep_top_k(log_prior, top_k)
    return (log_prior > -torch.inf).nonzero().squeeze(1).tolist()


def _check(models: Sequence[PreTrainedModel], names: Sequence[str]) -> None:
    if not models:
        raise EnsembleError("an ensemble needs at least one model, got none")
    if len(names) != len(models) or len(set(names)) != len(names):
        raise EnsembleError(f"an ensemble needs one distinct name per model, got {list(names)} for {len(models)}")
    sizes = {name: model.config.vocab_size for name, model in zip(names, models, strict=True)}
    for name, size in sizes.items():
        if size != sizes[names[0]]:
            raise EnsembleError(
                f"all ELMs must share one vocabulary: {names[0]!r} has {sizes[names[0]]} entries, {name!r} has {size}"
            )
