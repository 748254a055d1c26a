"""Pictures that every installation has: pieces of matplotlib's sample images, with captions."""

import json

import matplotlib.cbook
import numpy as np
import pytest

from btm.corpus.images.pictures import load_picture, save_png

SIDE = 16
NAMES = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png")


@pytest.fixture(scope="session")
def photographs():
    """Distinct pieces of three pictures, uint8 ``(B, 16, 16, 3)``."""
    found = {}
    for name in NAMES:
        with matplotlib.cbook.get_sample_data(name) as file:
            whole = load_picture(file.name)
        for top in range(0, whole.shape[0] - SIDE, 2 * SIDE):
            for left in range(0, whole.shape[1] - SIDE, 2 * SIDE):
                piece = whole[top : top + SIDE, left : left + SIDE]
                found[piece.tobytes()] = piece
    pieces = np.stack(list(found.values()))
    assert len(pieces) > 300
    return pieces


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory, photographs):
    """A folder of 160 pictures and ``captions.jsonl`` with captions in two languages."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, picture in enumerate(photographs[:160]):
        save_png(picture, folder / f"{number:03}.png")
        light = "bright" if picture.mean() > 128 else "dark"
        captions = {
            "en": {"name": f"{light} piece number {number}", "keywords": f"{light} | piece | {number}"},
            "de": {"name": f"Stück Nummer {number}"},
        }
        rows.append({"image": f"{number:03}.png", "captions": captions})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
