"""A forest as one causal language model: ordinary transformers ``generate``, cost by the number of active ELMs.

``logits`` are log-probabilities of the mixture ``sum_j w_j p_j`` (Branch-Train-Merge, https://arxiv.org/abs/2208.03306,
section 2.2). ELMs are read one after the other, prompts in pieces, and each is added to the mixture at once, so that
the logits of one ELM and one piece are the largest temporary; nothing has the size ELMs x tokens x vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from btm.config_ensemble import EnsembleConfig, PosteriorMode
from btm.corpus.tokenizer import load_tokenizer
from btm.ensemble.cache import EnsembleCache
from btm.ensemble.members import EnsembleMembers, choose_by_prior
from btm.ensemble.mixing import Mixture, Reading
from btm.ensemble.posterior import keep_top_k, log_joint, log_prior_of
from btm.errors import EnsembleError
from btm.files import read_json
from btm.model.causal_lm import load_model

PIECE_TOKENS = 2048
"""Tokens of a batch of prompts, at most, that one forward pass of one ELM reads."""


class EnsembleForCausalLM(EnsembleMembers, GenerationMixin):
    """Mixture of ELMs by their domain posterior, for inference.

    The posterior sees the tokens of ``input_ids`` (padding excluded) but the first of each row, which no ELM predicts:
    begin a document with the end-of-text token, as in training, and all of its tokens count.

    Which ELMs are active when ``config.top_k`` is less than their number: with a prior that is not uniform, or with
    ``posterior=fixed``, the ``top_k`` of largest prior, and only those are kept in memory; with a uniform prior all
    ELMs read the prompt, then each sequence goes on with the ``top_k`` of largest posterior after its prompt (without
    a KV cache: of each position). Weights are renormalised; ties go to the ELM that comes first.

    With ``prior=updating`` the prior follows the documents of one :meth:`perplexity` call; generation uses ``prior``.
    """

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Read ``input_ids`` ``(B, T)`` after what ``past_key_values`` holds.

        Args:
            input_ids: New tokens.
            attention_mask: ``(B, past + T)``, 0 at padding (left padding when generating).
            position_ids: ``(B, T)``; by default counted from the first token that is not padding.
            past_key_values: State of an earlier call; an empty cache of another kind is replaced.
            use_cache: Return the state.
            logits_to_keep: Positions at the end whose logits are wanted; 0 is all.
            labels: As for any causal LM, ``(B, T)`` with -100 where not counted; ``loss`` is then the mean in nats.

        Returns:
            ``logits``: log-probabilities of the next token, ``(B, T or logits_to_keep, V)``, float32.

        Raises:
            EnsembleError: If ``past_key_values`` is not the state of an ensemble.
        """
        batch_size, num_tokens = input_ids.shape
        state = self._state(past_key_values, batch_size, input_ids.device)
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch_size, state.length + num_tokens)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
        reading = Reading(input_ids, attention_mask, position_ids.expand(batch_size, -1), state)
        keep = min(logits_to_keep or num_tokens, num_tokens) if labels is None else num_tokens
        logits = self._mix_next(reading)[:, None] if keep == 1 else self._mix_all(reading)[:, num_tokens - keep :]
        return CausalLMOutputWithPast(
            loss=None if labels is None else _loss(logits, labels),  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=None if use_cache is False else state,
        )

    def continue_text(self, text: str, *, max_new_tokens: int, **options: Any) -> str:
        """Continue ``text`` as the beginning of a document; ``options`` go to ``generate`` (greedy by default).

        Raises:
            EnsembleError: If there is no tokenizer.
        """
        tokenizer = self.text_tokenizer
        prompt = [self.eos_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        input_ids = torch.tensor([prompt], device=self.device)
        defaults = {"do_sample": False, "attention_mask": torch.ones_like(input_ids), "pad_token_id": self.eos_id}
        output = self.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, max_new_tokens=max_new_tokens, **defaults | options
        )
        return str(tokenizer.decode(output[0, 1:].tolist(), skip_special_tokens=True))

    def posterior(self, state: EnsembleCache) -> Tensor:
        """Weights of the ELMs for the token after ``state``: ``(E, B)``, float64, in the order of ``names``."""
        return torch.softmax(self._joint_next(state), 0)

    def _state(self, past: Cache | None, batch_size: int, device: torch.device) -> EnsembleCache:
        if isinstance(past, EnsembleCache):
            return past
        if past is not None and past.get_seq_length() > 0:
            raise EnsembleError(
                f"past_key_values must come from this ensemble, got a filled {type(past).__name__}; pass None"
            )
        state = EnsembleCache([elm.config for elm in self._members()], batch_size, device)
        state.selected = self._top_k == len(self.elms)
        return state

    def _mix_next(self, reading: Reading) -> Tensor:
        """Let every active ELM read; mixture of the last position, ``(B, V)``."""
        state = reading.state
        for elm in range(len(self.elms)):
            for _ in self._pieces(elm, reading):
                pass
        reading.finish()
        joint = self._joint_next(state)
        if not state.selected:
            joint = keep_top_k(torch.log_softmax(joint, 0), self._top_k)
            state.keep(joint > -torch.inf)
        mixture = Mixture(joint.shape[1:], self.config.vocab_size, joint.device)
        for elm, rows in enumerate(state.rows):
            logp = state.next_logp[elm]
            if logp is not None and state.has_rows(elm):
                mixture.add((rows,), joint[elm, rows], logp)
        return mixture.logp

    def _mix_all(self, reading: Reading) -> Tensor:
        """Let every active ELM read; mixture of all positions, ``(B, T, V)``."""
        state = reading.state
        log_w = None if state.selected else self._weights_first(reading)
        mixture = Mixture(reading.input_ids.shape, self.config.vocab_size, reading.input_ids.device)
        for elm, rows in enumerate(state.rows):
            for piece, logp in self._pieces(elm, reading):
                joint = self._joint(elm, reading) if log_w is None else log_w[elm]
                mixture.add((rows, piece), joint[rows, piece], logp)
        reading.finish()
        if log_w is not None:
            state.keep(log_w[..., -1] > -torch.inf)
        return mixture.logp

    def _weights_first(self, reading: Reading) -> Tensor:
        """Log weights ``(E, B, T)`` with the top-k of every position, at the price of reading twice."""
        trial = copy.deepcopy(reading)
        joint = []
        for elm in range(len(self.elms)):
            for _ in self._pieces(elm, trial):
                pass
            joint.append(self._joint(elm, trial))
        return keep_top_k(torch.log_softmax(torch.stack(joint), 0), self._top_k)

    def _pieces(self, elm: int, reading: Reading) -> Iterator[tuple[slice, Tensor]]:
        """Let one ELM read its rows; note the evidence, yield log-probabilities ``(rows, piece, V)`` by piece."""
        state, model = reading.state, self.elms[elm]
        if not state.has_rows(elm):
            return
        rows, num_tokens = state.rows[elm], reading.input_ids.shape[1]
        width = max(1, PIECE_TOKENS // len(reading.input_ids))
        for start in range(0, num_tokens, width):
            piece = slice(start, min(start + width, num_tokens))
            positions = {"position_ids": reading.position_ids[rows, piece]} if self._takes_positions[elm] else {}
            output = model(
                input_ids=reading.input_ids[rows, piece],
                attention_mask=reading.attention_mask[rows, : state.length + piece.stop],
                past_key_values=state.elms[elm],
                use_cache=True,
                **positions,
            )
            logp = torch.log_softmax(output.logits.float(), -1)
            reading.note(elm, piece, logp)
            yield piece, logp

    def _joint(self, elm: int, reading: Reading) -> Tensor:
        """Log of prior x likelihood of one ELM after each position: ``(B, T)``, right as far as the ELM has read."""
        state, mode = reading.state, self.ensemble.posterior
        evidence = reading.evidence[elm]
        if mode is PosteriorMode.history:
            evidence = torch.cat([evidence[:, :1] + state.evidence[elm, :, None], evidence[:, 1:]], -1)
        # The appended column stands for the next token, whose weight looks at everything before it.
        evidence = torch.nn.functional.pad(evidence, (0, 1))
        prior = torch.where(state.active[elm], self._log_prior[elm].to(state.active.device), -torch.inf)
        joint = log_joint(evidence[None], prior[None], mode=mode, temper=self.ensemble.temper)[0, :, 1:]
        if mode is PosteriorMode.last_token:
            joint = torch.where(reading.counted, joint, _equal_weights(prior)[:, None])
        return joint

    def _joint_next(self, state: EnsembleCache) -> Tensor:
        """Log of prior x likelihood of every ELM for the token after ``state``: ``(E, B)``."""
        prior = torch.where(state.active, self._log_prior.to(state.active.device)[:, None], -torch.inf)
        if self.ensemble.posterior is PosteriorMode.history:
            return prior + self.ensemble.temper * state.evidence
        if self.ensemble.posterior is PosteriorMode.last_token:
            return torch.where(state.has_last, prior + self.ensemble.temper * state.last, _equal_weights(prior))
        return prior


def load_ensemble(
    directories: Sequence[tuple[str, Path | str]],
    *,
    config: EnsembleConfig,
    prior: dict[str, float] | None = None,
    sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> EnsembleForCausalLM:
    """Load ELMs and join them into one causal LM, on the CPU.

    Args:
        directories: Name and directory of each ELM, in manifest order; the first directory's tokenizer is attached.
        config: How to mix. With ``top_k`` and a prior that is not uniform only those ELMs are loaded.
        prior: ELM -> weight, for instance a cached prior from ``evaluation.json``; None is uniform.
        sequence_length: Window of :meth:`EnsembleForCausalLM.perplexity`; None is the models' longest.
        dtype: Type of the weights in memory; None is the type that the first directory stores.

    Returns:
        The ensemble, in evaluation mode; move it with ``.to(device)``.

    Raises:
        EnsembleError: If there are no directories, vocabularies differ, or the prior does not fit the names.
        CheckpointError: If a directory cannot be loaded.
    """
    if not directories:
        raise EnsembleError("an ensemble needs at least one ELM, got none; `btm run` trains some")
    names = [name for name, _ in directories]
    chosen = choose_by_prior(log_prior_of(prior, names), config)
    dtype = dtype or _stored_dtype(Path(directories[0][1]))
    ensemble = EnsembleForCausalLM(
        [load_model(directories[index][1], dtype) for index in chosen],
        names=[names[index] for index in chosen],
        prior=None if prior is None else {names[index]: prior.get(names[index], 0.0) for index in chosen},
        ensemble=config,
        sequence_length=sequence_length,
    )
    folder = Path(directories[0][1])
    if (folder / "tokenizer.json").is_file():
        ensemble.tokenizer = load_tokenizer(folder)
    return ensemble


def _equal_weights(log_prior: Tensor) -> Tensor:
    return torch.where(log_prior.isneginf(), log_prior, torch.zeros_like(log_prior))


def _loss(logp: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:].to(logp.device)
    nats = -logp[:, :-1].gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return nats[targets != -100].mean()


def _stored_dtype(directory: Path) -> torch.dtype:
    config = read_json(directory / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
