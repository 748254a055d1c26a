"""A forest with one ELM of text and one of pictures, from one command; it draws and it describes."""

import re
from pathlib import Path

import pytest

from btm.corpus.images.pictures import load_picture
from btm.records import Evaluation
from tests.conftest import SMOKE, run_btm

pytestmark = pytest.mark.slow  # half a minute; `make test-slow`

PICTURES = ("tokenizer.image_size=16", "tokenizer.image_codes=32", "data.images=[pictures]", "data.caption_keys=[en]")


@pytest.fixture(scope="module")
def mixed_forest(tmp_path_factory, corpora, picture_folder):
    folder = tmp_path_factory.mktemp("mixed")
    domains = (f"data.domains.docs={corpora / 'docs.jsonl'}", f"data.domains.pictures={picture_folder}")
    run_btm("run", *SMOKE, *domains, *PICTURES, f"forest={folder / 'forest'}", cwd=folder)
    return folder / "forest"


def generate(forest, *arguments):
    options = ("generate.model=elm/pictures", "generate.max_new_tokens=40", "generate.temperature=1.0")
    done = run_btm("generate", f"forest={forest}", *options, *arguments, cwd=forest.parent)
    return done.stdout, [Path(found) for found in re.findall(r"\[(/[^]]+\.png)\]", done.stdout)]


def test_both_domains_are_learned_and_scored(mixed_forest):
    evaluation = Evaluation.load(mixed_forest / "evaluation.json")
    assert evaluation.domains == ["docs", "pictures"]
    assert {"elm/docs", "elm/pictures", "ensemble/uniform"} <= set(evaluation.models)


@pytest.mark.parametrize("model", ["elm/pictures", "ensemble"])
def test_an_asked_for_picture_is_drawn_whole(mixed_forest, tmp_path, model):
    out = f"generate.image_directory={tmp_path / 'drawn'}"
    said, paths = generate(mixed_forest, "generate.prompt='a bright piece<image>'", f"generate.model={model}", out)
    assert said.startswith("a bright piece[")
    assert paths[0] == tmp_path / "drawn" / "image-1.png"
    assert load_picture(paths[0]).shape == (16, 16, 3)


def test_a_shown_picture_stands_before_its_description(mixed_forest, picture_folder):
    said, paths = generate(mixed_forest, f"generate.image={picture_folder / '007.png'}")
    assert said.startswith(f"[{mixed_forest / 'generated' / 'image-1.png'}]")
    assert paths[0].is_file()


def test_text_forests_have_no_pictures(forest, picture_folder, tmp_path):
    done = run_btm(
        "generate", f"forest={forest}", f"generate.image={picture_folder / '007.png'}", cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "has no image codes" in done.stderr


def test_contradictions_are_named(tmp_path):
    given = ("data.domains.a=a.jsonl", "data.images=[b]", "tokenizer.image_size=30", "tokenizer.image_patch=4")
    done = run_btm("run", *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "data.images names unknown domains ['b']; known: ['a']" in done.stderr
    assert "tokenizer.image_size must be a multiple of tokenizer.image_patch (4), got 30" in done.stderr
