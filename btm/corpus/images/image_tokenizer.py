"""Vector-quantising image tokenizer: a picture becomes the numbers of its patches' nearest centres, and comes back.

The codebook is k-means over patches of training pictures, the plain form of vector quantisation (Gray 1984) that
learned tokenizers (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937) start from. On disk it is
``codebook.safetensors`` and ``image_tokenizer.json`` in one directory.

Shapes: B pictures, H and W pixels, P patch side, G = H / P * W / P patches of a picture, K codes.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from btm.corpus.images.kmeans import kmeans, nearest
from btm.corpus.randomness import hash_positions, hash_text
from btm.errors import DataError, ForestError
from btm.files import directory_in_one_step, read_json, write_json

FORMAT = 1
CODEBOOK_FILE, SETTINGS_FILE = "codebook.safetensors", "image_tokenizer.json"
_POINTS_PER_CODE = 256
_SCALE = 255.0


class ImageTokenizer:
    """Codes of square patches.

    Attributes:
        size: Side of the pictures that documents hold, pixels.
        patch: Side P of a patch, pixels.
        codebook: Centres in [0, 1], float32 ``(K, P * P * 3)``.
        report: What its training measured, for example ``psnr_db``.
    """

    def __init__(self, codebook: np.ndarray, *, size: int, patch: int, report: dict[str, Any] | None = None) -> None:
        """Take a codebook.

        Raises:
            DataError: If the sizes do not fit.
        """
        check_sizes(size, patch)
        if codebook.ndim != 2 or codebook.shape[1] != patch * patch * 3 or not len(codebook):
            raise DataError(f"a codebook for patches of {patch} must be (codes, {patch**2 * 3}), got {codebook.shape}")
        if not np.isfinite(codebook).all():
            raise DataError("a codebook must hold finite numbers, got NaN or Inf; train the image tokenizer again")
        self.size, self.patch = size, patch
        self.codebook = np.ascontiguousarray(codebook, dtype=np.float32)
        self.report = dict(report or {})

    @property
    def num_codes(self) -> int:
        """Codes K."""
        return len(self.codebook)

    @property
    def num_patches(self) -> int:
        """Codes G of one picture of ``size``."""
        return (self.size // self.patch) ** 2

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which codes a picture has."""
        head = f"{FORMAT} {self.size} {self.patch} {self.codebook.shape}".encode()
        return hashlib.sha256(head + self.codebook.astype("<f4").tobytes()).hexdigest()

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """Codes of one or more pictures, row by row.

        Args:
            pictures: uint8 ``(H, W, 3)`` or ``(B, H, W, 3)``; H and W are multiples of the patch.

        Returns:
            int64 ``(G,)`` or ``(B, G)``.

        Raises:
            DataError: If shape or type do not fit.
        """
        batch = pictures[None] if pictures.ndim == 3 else pictures
        patches = patches_of(batch, self.patch)
        codes, _ = nearest(patches.reshape(-1, patches.shape[-1]) / np.float32(_SCALE), self.codebook)
        codes = codes.reshape(patches.shape[:2])
        return codes[0] if pictures.ndim == 3 else codes

    def decode(self, codes: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Pictures of codes.

        Args:
            codes: Integers ``(G,)`` or ``(B, G)``.
            shape: H and W in pixels; None is a square of ``size``.

        Returns:
            uint8 ``(H, W, 3)`` or ``(B, H, W, 3)``.

        Raises:
            DataError: If a code is outside of the codebook, or their number does not fit.
        """
        height, width = shape or (self.size, self.size)
        rows, columns, patch = height // self.patch, width // self.patch, self.patch
        batch = np.atleast_2d(codes)
        if (height % patch or width % patch) or batch.shape[1] != rows * columns:
            raise DataError(f"a picture of {height} x {width} has {rows * columns} codes, got {batch.shape[1]}")
        if batch.size and not (batch.min() >= 0 and batch.max() < self.num_codes):
            raise DataError(f"image codes must lie in [0, {self.num_codes}), got {batch.min()} to {batch.max()}")
        pixels = (self.codebook * np.float32(_SCALE)).round().clip(0, 255).astype(np.uint8)[batch]
        pixels = pixels.reshape(len(batch), rows, columns, patch, patch, 3).swapaxes(2, 3)
        pixels = pixels.reshape(len(batch), height, width, 3)
        return pixels[0] if codes.ndim == 1 else pixels

    def psnr(self, pictures: np.ndarray) -> float:
        """Peak signal-to-noise ratio of the reconstruction in dB over all ``pictures`` ``(B, H, W, 3)``."""
        shape = (pictures.shape[1], pictures.shape[2])
        error = self.decode(self.encode(pictures), shape).astype(np.float64) - pictures
        mean = float(np.square(error).mean())
        return float("inf") if mean == 0 else 10 * float(np.log10(_SCALE**2 / mean))

    def save(self, directory: Path | str) -> None:
        """Write it to ``directory``, in one step."""
        from safetensors.numpy import save_file

        settings = {
            "format": FORMAT,
            "size": self.size,
            "patch": self.patch,
            "num_codes": self.num_codes,
            "fingerprint": self.fingerprint,
            "report": self.report,
        }
        with directory_in_one_step(Path(directory)) as temporary:
            save_file({"codebook": self.codebook}, temporary / CODEBOOK_FILE)
            write_json(temporary / SETTINGS_FILE, settings)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read the tokenizer in ``directory``.

        Raises:
            DataError: If it is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        directory = Path(directory)
        try:
            settings = read_json(directory / SETTINGS_FILE)
            if settings["format"] != FORMAT:
                raise DataError(f"its format is {settings['format']}, this program reads {FORMAT}")
            codebook = load_file(directory / CODEBOOK_FILE)["codebook"]
            found = cls(codebook, size=settings["size"], patch=settings["patch"], report=settings["report"])
            if found.fingerprint != settings["fingerprint"]:
                raise DataError("its fingerprint does not fit its codebook")
        except (DataError, ForestError, OSError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DataError(
                f"{directory} holds no sound image tokenizer ({error}); restore it from a copy or prepare the corpus "
                "in a new forest"
            ) from None
        return found


def check_sizes(size: int, patch: int) -> None:
    """Refuse a picture size that is not a positive multiple of the patch.

    Raises:
        DataError: If it is not.
    """
    if not (isinstance(size, int) and isinstance(patch, int) and patch >= 1 and size >= patch and size % patch == 0):
        raise DataError(f"the picture size must be a multiple of the patch ({patch} pixels), got {size}")


def patches_of(pictures: np.ndarray, patch: int) -> np.ndarray:
    """Cut pictures into patches, row by row.

    Args:
        pictures: uint8 ``(B, H, W, 3)``.
        patch: Side P.

    Returns:
        uint8 ``(B, G, P * P * 3)``.

    Raises:
        DataError: If shape or type do not fit.
    """
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise DataError(f"pictures must be uint8 (height, width, 3), got {pictures.dtype} {pictures.shape[1:]}")
    count, height, width, _ = pictures.shape
    if height % patch or width % patch or not height or not width:
        raise DataError(f"height and width must be multiples of the patch ({patch}), got {height} x {width}")
    rows, columns = height // patch, width // patch
    cut = pictures.reshape(count, rows, patch, columns, patch, 3).swapaxes(2, 3)
    return cut.reshape(count, rows * columns, patch * patch * 3)


def train_image_tokenizer(
    batches: Iterable[np.ndarray], *, size: int, patch: int, num_codes: int, seed: int = 0
) -> ImageTokenizer:
    """Train a codebook on pictures of one size; the same pictures and seed give the same codebook.

    Equal patches are counted, not repeated. Where there are more than 256 distinct patches per code, a random choice of
    as many is taken.

    Args:
        batches: Pictures uint8 ``(B, size, size, 3)``.
        size: Side of the pictures, pixels.
        patch: Side of a patch, pixels.
        num_codes: Codes at most; fewer where the pictures have fewer distinct patches.
        seed: Of every random choice.

    Raises:
        DataError: If there are no pictures, or they do not fit.
    """
    check_sizes(size, patch)
    distinct, counts, pictures = np.zeros((0, patch * patch * 3), dtype=np.uint8), np.zeros(0), 0
    for batch in batches:
        pictures += len(batch)
        cut = patches_of(batch, patch).reshape(-1, distinct.shape[1])
        distinct, counts = _count_equal(np.concatenate([distinct, cut]), np.concatenate([counts, np.ones(len(cut))]))
    if not pictures:
        raise DataError(
            "no training picture is there for the image tokenizer; give a domain in data.images more pictures"
        )
    chosen = _choose(distinct, num_codes * _POINTS_PER_CODE, seed)
    found = kmeans(distinct[chosen] / np.float32(_SCALE), counts[chosen], num_codes, seed=seed)
    report = {"pictures": pictures, "distinct_patches": len(distinct), "rounds": found.rounds}
    return ImageTokenizer(found.centres, size=size, patch=patch, report=report)


def _count_equal(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    as_one = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1])))[:, 0]
    _, first, inverse = np.unique(as_one, return_index=True, return_inverse=True)
    return rows[first], np.bincount(inverse, weights=counts)


def _choose(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Random rows; by hash of their number, in ascending order."""
    if len(rows) <= count:
        return np.arange(len(rows))
    order = np.argsort(hash_positions(hash_text("patches", str(seed)), np.arange(len(rows))), kind="stable")
    return np.sort(order[:count])
