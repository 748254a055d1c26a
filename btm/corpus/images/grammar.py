"""Keeps generated sequences well formed: a begun picture gets all its codes and its end, and no code stands alone."""

import torch

from btm.corpus.images.vocabulary import MixedVocabulary


class ImageGrammar:
    """A logits processor for transformers' ``generate``.

    After ``<image>`` only image codes are allowed until the picture has ``num_patches`` of them, then only
    ``</image>``; elsewhere neither. What is allowed is a function of the tokens so far alone.
    """

    def __init__(self, vocabulary: MixedVocabulary, num_patches: int) -> None:
        """Take where the codes lie, and how many a picture has."""
        self._vocabulary, self._num_patches = vocabulary, num_patches

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores with -inf for what is not allowed next.

        Args:
            input_ids: Tokens so far ``(B, T)``.
            scores: Of the next token ``(B, V)``.

        Returns:
            ``(B, V)``.
        """
        vocabulary = self._vocabulary
        tail = input_ids[:, -(self._num_patches + 1) :]
        places = torch.arange(1, tail.shape[1] + 1, device=tail.device)
        begun = ((tail == vocabulary.begin_id) * places).amax(1)
        ended = ((tail == vocabulary.end_id) * places).amax(1)
        is_open = begun > ended
        is_full = is_open & (tail.shape[1] - begun >= self._num_patches)
        ids = torch.arange(scores.shape[1], device=scores.device)
        is_code = (ids >= vocabulary.first_code) & (ids < vocabulary.size)
        is_end = ids == vocabulary.end_id
        inside = torch.where(is_full[:, None], is_end, is_code)
        # Ids behind the vocabulary are the padding of a model's embedding.
        allowed = torch.where(is_open[:, None], inside, ~(is_code | is_end) & (ids < vocabulary.size))
        return scores.masked_fill(~allowed, -torch.inf)  # pyright: ignore[reportReturnType]
