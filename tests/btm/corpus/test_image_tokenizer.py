import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from btm.corpus.images.image_tokenizer import ImageTokenizer, patches_of, train_image_tokenizer
from btm.corpus.images.pictures import fit_square, load_picture, picture_hash, save_png
from btm.errors import DataError

SIZE, PATCH = 16, 4


@pytest.fixture(scope="module")
def trained(photographs):
    return train_image_tokenizer([photographs[:200]], size=SIZE, patch=PATCH, num_codes=64, seed=3)


def obvious_codes(tokenizer, picture):
    """One patch after the other, in float64."""
    codes = []
    for top in range(0, picture.shape[0], tokenizer.patch):
        for left in range(0, picture.shape[1], tokenizer.patch):
            patch = picture[top : top + tokenizer.patch, left : left + tokenizer.patch].reshape(-1) / 255.0
            codes.append(int(((tokenizer.codebook.astype(np.float64) - patch) ** 2).sum(1).argmin()))
    return codes


def test_codes_are_those_of_the_obvious_loop(trained, photographs):
    for picture in photographs[200:230]:
        assert trained.encode(picture).tolist() == obvious_codes(trained, picture)


def test_decoding_puts_each_code_in_its_place(trained):
    codes = np.arange(trained.num_patches)
    picture = trained.decode(codes)
    assert picture.shape == (SIZE, SIZE, 3)
    for place, code in enumerate(codes):
        top, left = PATCH * (place // 4), PATCH * (place % 4)
        expected = np.round(trained.codebook[code].reshape(PATCH, PATCH, 3) * 255)
        np.testing.assert_array_equal(picture[top : top + PATCH, left : left + PATCH], expected)


def test_codes_of_a_decoded_picture_are_the_codes(trained, photographs):
    """Decoding rounds to whole grey levels, which moves no patch to another centre."""
    codes = trained.encode(photographs[:50])
    np.testing.assert_array_equal(trained.encode(trained.decode(codes)), codes)


def test_pictures_that_are_not_square(trained, photographs):
    wide = np.concatenate([photographs[0], photographs[1]], axis=1)
    codes = trained.encode(wide)
    assert codes.shape == (SIZE // PATCH * 2 * SIZE // PATCH,)
    assert codes.tolist() == obvious_codes(trained, wide)
    joined = np.concatenate([trained.decode(trained.encode(photographs[index])) for index in (0, 1)], axis=1)
    np.testing.assert_array_equal(trained.decode(codes, (SIZE, 2 * SIZE)), joined)


def test_more_codes_show_more(photographs):
    train, held_out = photographs[:200], photographs[200:]
    quality = [
        train_image_tokenizer([train], size=SIZE, patch=PATCH, num_codes=codes).psnr(held_out) for codes in (1, 16, 256)
    ]
    assert quality == sorted(quality)
    grey = 10 * np.log10(255**2 / np.square(held_out - train.mean(axis=(0, 1, 2))).mean())
    assert quality[-1] > grey + 5


def test_psnr_is_its_definition(trained, photographs):
    pictures = photographs[:20]
    error = [
        (int(a) - int(b)) ** 2
        for picture in pictures
        for a, b in zip(picture.ravel(), trained.decode(trained.encode(picture)).ravel(), strict=True)
    ]
    assert trained.psnr(pictures) == pytest.approx(10 * np.log10(255**2 / np.mean(error)))


def test_pictures_of_few_patches_come_back_exactly():
    digits = np.kron(np.random.default_rng(0).integers(0, 2, (40, 4, 4)), np.ones((4, 4))).astype(np.uint8) * 255
    pictures = np.repeat(digits[..., None], 3, axis=-1)
    trained = train_image_tokenizer([pictures], size=SIZE, patch=PATCH, num_codes=64)
    assert trained.num_codes == 2
    np.testing.assert_array_equal(trained.decode(trained.encode(pictures)), pictures)
    assert trained.psnr(pictures) == float("inf")


def test_digits_of_scikit_learn():
    from sklearn import datasets

    digits = (datasets.load_digits().images * 255 / 16).round().astype(np.uint8)[..., None].repeat(3, axis=-1)
    trained = train_image_tokenizer([digits[:1500]], size=8, patch=2, num_codes=128)
    assert trained.psnr(digits[1500:]) > 20


def test_same_pictures_same_codebook_whatever_the_batches(photographs):
    whole = train_image_tokenizer([photographs[:100]], size=SIZE, patch=PATCH, num_codes=32, seed=1)
    parts = train_image_tokenizer([photographs[:33], photographs[33:100]], size=SIZE, patch=PATCH, num_codes=32, seed=1)
    other = train_image_tokenizer([photographs[:100]], size=SIZE, patch=PATCH, num_codes=32, seed=2)
    assert whole.fingerprint == parts.fingerprint != other.fingerprint


def test_stored_and_loaded(tmp_path, trained, photographs):
    trained.save(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "codebook.safetensors",
        "image_tokenizer.json",
    ]
    found = ImageTokenizer.load(tmp_path / "kept")
    assert (found.size, found.patch, found.fingerprint) == (SIZE, PATCH, trained.fingerprint)
    assert found.report == trained.report
    np.testing.assert_array_equal(found.encode(photographs), trained.encode(photographs))


def _other_codebook(folder):
    codebook = load_file(folder / "codebook.safetensors")["codebook"].copy()
    codebook[0, 0] += 0.25
    save_file({"codebook": codebook}, folder / "codebook.safetensors")


def _edit(**changes):
    def edit(folder):
        path = folder / "image_tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_codebook, "fingerprint does not fit"),
        (_edit(patch=2), r"must be \(codes, 12\)"),
        (_edit(size=17), "multiple of the patch"),
        (_edit(format=9), "format is 9"),
        (lambda folder: (folder / "codebook.safetensors").write_bytes(b"broken"), "no sound image tokenizer"),
        (lambda folder: (folder / "codebook.safetensors").unlink(), "no sound image tokenizer"),
        (lambda folder: (folder / "image_tokenizer.json").write_text("[]"), "no sound image tokenizer"),
    ],
)
def test_damage_is_noticed(tmp_path, trained, damage, words):
    trained.save(tmp_path / "kept")
    damage(tmp_path / "kept")
    with pytest.raises(DataError, match=words):
        ImageTokenizer.load(tmp_path / "kept")


def test_bad_values_are_named(trained):
    with pytest.raises(DataError, match=r"must lie in \[0, 64\), got 0 to 64"):
        trained.decode(np.array([0] * 15 + [64]))
    with pytest.raises(DataError, match="has 16 codes, got 15"):
        trained.decode(np.zeros(15, dtype=np.int64))
    with pytest.raises(DataError, match="multiples of the patch"):
        trained.encode(np.zeros((16, 18, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="must be uint8"):
        trained.encode(np.zeros((16, 16, 3)))
    with pytest.raises(DataError, match="no training picture"):
        train_image_tokenizer([], size=16, patch=4, num_codes=4)
    with pytest.raises(DataError, match="multiple of the patch"):
        train_image_tokenizer([], size=18, patch=4, num_codes=4)
    with pytest.raises(DataError, match="finite"):
        ImageTokenizer(np.full((2, 48), np.nan), size=16, patch=4)


def test_patches_are_cut_row_by_row():
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(1, 8, 8, 3)
    patches = patches_of(picture, 4)
    for place, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        np.testing.assert_array_equal(patches[0, place], picture[0, top : top + 4, left : left + 4].ravel())


def test_the_same_picture_in_any_file_has_one_hash(tmp_path, photographs):
    picture = photographs[0]
    save_png(picture, tmp_path / "a.png")
    Image.fromarray(picture).save(tmp_path / "b.bmp")
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "c.webp", lossless=True)
    hashes = {picture_hash(load_picture(path)) for path in tmp_path.iterdir()}
    assert hashes == {picture_hash(picture)}
    assert picture_hash(picture) != picture_hash(photographs[1])
    assert picture_hash(picture) != picture_hash(picture.reshape(32, 8, 3))


def test_transparent_and_grey_and_deep_pictures(tmp_path):
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[0, 0] = (255, 0, 0, 255)
    clear[1, 1] = (0, 0, 0, 128)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = load_picture(tmp_path / "clear.png")
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[3, 3].tolist() == [255, 255, 255]
    assert abs(int(found[1, 1, 0]) - 127) <= 1
    Image.fromarray(np.full((4, 4), 77, dtype=np.uint8)).save(tmp_path / "grey.png")
    assert (load_picture(tmp_path / "grey.png") == 77).all()
    Image.fromarray(np.full((4, 4), 77 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (load_picture(tmp_path / "deep.png") == 77).all()


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (1, 200), (7, 7)])
def test_fitted_pictures_keep_their_shape_on_white(shape):
    found = fit_square(np.zeros((*shape, 3), dtype=np.uint8), 16)
    assert found.shape == (16, 16, 3)
    dark = found[..., 0] < 128
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    scale = 16 / max(shape)
    assert (len(rows), len(columns)) == (max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale)))
    assert dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png is no picture that can be read"):
        load_picture(tmp_path / "a.png")


def test_pipes_and_folders_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="it is not a file"):
            load_picture(path)


def test_a_cut_file_and_a_huge_one(tmp_path, photographs, monkeypatch):
    save_png(np.kron(photographs[0], np.ones((8, 8, 1), dtype=np.uint8)), tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.png is no picture"):
        load_picture(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="exceeds limit"):
        load_picture(tmp_path / "a.png")
