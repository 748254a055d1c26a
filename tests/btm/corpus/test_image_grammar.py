import pytest
import torch

from btm.corpus.images.grammar import ImageGrammar
from btm.corpus.images.vocabulary import MixedVocabulary

VOCABULARY = MixedVocabulary(begin_id=5, end_id=6, first_code=7, num_codes=3, fingerprint="0" * 12)
TEXT, CODES, END = {0, 1, 2, 3, 4, 5}, {7, 8, 9}, {6}


def allowed_after(*rows, num_patches=4):
    scores = ImageGrammar(VOCABULARY, num_patches)(torch.tensor(rows), torch.zeros(len(rows), 12))
    return [set(torch.isfinite(row).nonzero()[:, 0].tolist()) for row in scores]


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([0, 1], TEXT),
        ([0, 5], CODES),
        ([5, 7, 8, 9], CODES),
        ([5, 7, 8, 9, 9], END),
        ([1, 1, 1, 1, 1, 5, 7, 8, 9, 9], END),
        ([5, 7, 8, 9, 9, 6], TEXT),
        ([5, 7, 8, 9, 9, 6, 5], CODES),
        ([5, 7, 6, 1], TEXT),
        ([5, 7, 6, 5, 7], CODES),
        ([5, 7, 8, 9, 9, 9], TEXT),
    ],
)
def test_what_may_follow(tokens, allowed):
    assert allowed_after(tokens) == [allowed]


def test_rows_do_not_mix():
    assert allowed_after([0, 5, 7], [0, 1, 1], [5, 7, 6], num_patches=2) == [CODES, TEXT, TEXT]
    assert allowed_after([5, 7, 8], [0, 5, 7], num_patches=2) == [END, CODES]


def test_scores_of_what_is_allowed_stay():
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    found = ImageGrammar(VOCABULARY, 4)(torch.tensor([[0, 5]]), scores)
    assert torch.equal(found[0, 7:10], scores[0, 7:10])


def test_random_sequences_are_always_well_formed():
    """Sampling uniformly from what is allowed gives whole pictures only."""
    generator = torch.Generator().manual_seed(1)
    ids, grammar = torch.zeros(8, 1, dtype=torch.long), ImageGrammar(VOCABULARY, 3)
    for _ in range(60):
        chances = grammar(ids, torch.zeros(8, 12)).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    begun = 0
    for row in ids.tolist():
        position = 0
        while position < len(row):
            assert row[position] not in CODES | END
            if row[position] == VOCABULARY.begin_id and position + 4 < len(row):
                begun += 1
                assert set(row[position + 1 : position + 4]) <= CODES
                assert row[position + 4] == VOCABULARY.end_id
                position += 4
            elif row[position] == VOCABULARY.begin_id:
                break
            position += 1
    assert begun > 8
