import pytest

from btm.corpus.local_text import (
    HELD_BACK,
    MAX_DOCUMENT_BYTES,
    MAX_DOMAIN_BYTES,
    NAMES,
    cut_text,
    docstrings,
    environment_identity,
    local_domains,
    without_docstrings,
)


@pytest.fixture(scope="module")
def texts():
    return {name: list(factory()) for name, factory in local_domains().items()}


def test_enough_domains_with_enough_text(texts):
    assert tuple(texts) == NAMES
    assert HELD_BACK in NAMES
    assert len(NAMES) >= 6
    for name, documents in texts.items():
        size = sum(len(document.encode()) for document in documents)
        assert 600_000 < size < MAX_DOMAIN_BYTES + 64 * MAX_DOCUMENT_BYTES, name
        assert max(len(document.encode()) for document in documents) <= MAX_DOCUMENT_BYTES, name
        assert len(documents) >= 100, name


def test_no_two_domains_share_documents(texts):
    """B3: domains are disjoint."""
    sets = {name: set(documents) for name, documents in texts.items()}
    shared = {(a, b) for a in sets for b in sets if a < b and sets[a] & sets[b]}
    assert shared == set()


def test_the_same_at_every_call(texts):
    assert list(local_domains()["licences"]()) == texts["licences"]
    assert environment_identity() == environment_identity()


def test_cutting_keeps_every_line():
    text = "".join(f"line {number} \u00e9\n" for number in range(1000)) + "end"
    pieces = cut_text(text, 300)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 300
    assert cut_text("") == []
    assert cut_text("short\n" + "x" * 50 + "\nend\n", 20) == ["short\n", "end\n"]


SOURCE = '''"""What the module is for, in one sentence that is long enough to count as text, not as a label.

    Indented.
"""
query = """select something
from somewhere"""


def f():
    """First line of a docstring that is long enough to be taken for text, and then some.

    Second paragraph.
    """
    return query
'''


def test_docstrings_and_code_are_parted():
    text = docstrings(SOURCE)
    assert text.startswith("What the module")
    assert "\nFirst line of a docstring" in text
    assert "\nSecond paragraph." in text
    assert "select" not in text
    code = without_docstrings(SOURCE)
    assert "select something" in code
    assert "return query" in code
    assert "docstring" not in code
