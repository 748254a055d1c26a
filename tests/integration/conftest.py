"""Sparse models made once for all tests that look at them; none may change what it gets."""

import pytest

from tests.conftest import SMOKE, run_btm, two_domains


@pytest.fixture(scope="session")
def sparse_run(tmp_path_factory, corpora):
    """Train and evaluate with one kind of layer; returns the directory, the arguments and what was printed."""
    made = {}

    def make(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            arguments = [*SMOKE, *two_domains(corpora), f"ffn={kind}", "baselines=dense"]
            done = run_btm("run", *arguments, f"forest={folder / 'forest'}", cwd=folder)
            made[kind] = (folder / "forest", arguments, done.stdout)
        return made[kind]

    return make
