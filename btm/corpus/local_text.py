"""Real text that every installation of this program holds: the demo's corpus, without a download.

The domains are taken from the installed packages that this program depends on. Which files, and in which order, is
decided by hashes of their names, so that the same installation always gives the same documents.
"""

import importlib.util
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from btm.corpus.randomness import hash_text

HELD_BACK = "symbolic-maths"
"""The domain that joins after the first round."""
MAX_DOMAIN_BYTES = 4_000_000
"""Text taken per domain."""
MAX_DOCUMENT_BYTES = 16_384
"""Longest document; longer files are cut at line borders."""
_MIN_DOCUMENT_BYTES = 200
_SHORT, _MANY = 4096, 64
"""Longest document, and documents per file, of the domains that have few files."""
_FORMAT = 1
_CODE_PACKAGES = (
    *("PIL", "_pytest", "aiohttp", "anyio", "attr", "click", "cryptography", "datasets", "fontTools", "fsspec"),
    *("huggingface_hub", "hydra", "jinja2", "matplotlib", "mpl_toolkits", "networkx", "numpy", "omegaconf", "pandas"),
    *("psutil", "pyarrow", "pydantic", "pygments", "ray", "requests", "rich", "tokenizers", "torch", "tqdm"),
    *("transformers", "urllib3", "virtualenv", "wandb", "yaml"),
)
_HEADER_PACKAGES = ("numpy", "pyarrow", "torch")
_TRIPLE_QUOTED = re.compile(r"""(^[ \t]*[rRuU]?)?(\"{3}|'{3})(.*?)\2""", re.DOTALL | re.MULTILINE)
_LICENCE_NAME = re.compile(r"(licen[cs]e|copy(ing|right)|notice|patents|third.?party)", re.IGNORECASE)
_SMALLEST_DOCSTRING = 80


class _Kind(NamedTuple):
    """One domain: which files, and how a file becomes text."""

    top_folders: Callable[[str], bool]
    is_wanted: Callable[[str], bool]
    text_of: Callable[[str], str]
    limit: int = MAX_DOCUMENT_BYTES
    max_documents: int = 4


def environment_identity() -> str:
    """What the local text depends on: the Python version and every installed package's name and version."""
    installed = sorted(entry for root in _roots() for entry in os.listdir(root) if entry.endswith(".dist-info"))
    return f"installation {hash_text(str(_FORMAT), sys.version, *installed):016x}"


def local_domains() -> dict[str, Callable[[], Iterator[str]]]:
    """Name of each domain -> function that gives its documents, the same ones at every call."""
    return {name: _Factory(name, kind) for name, kind in _KINDS.items()}


class _Factory:
    def __init__(self, name: str, kind: _Kind) -> None:
        self._name, self._kind = name, kind

    def __call__(self) -> Iterator[str]:
        total = 0
        for path in _files(self._kind, self._name):
            try:
                text = self._kind.text_of(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
            for piece in cut_text(text, self._kind.limit)[: self._kind.max_documents]:
                if "\0" not in piece and len(piece) >= _MIN_DOCUMENT_BYTES:
                    yield piece
                    total += len(piece.encode())
            if total >= MAX_DOMAIN_BYTES:
                return


def cut_text(text: str, limit: int = MAX_DOCUMENT_BYTES) -> list[str]:
    """Cut ``text`` at line borders into pieces of at most ``limit`` UTF-8 bytes; a longer line is left out."""
    pieces: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode())
        if size + length > limit and lines:
            pieces.append("".join(lines))
            lines, size = [], 0
        if length <= limit:
            lines.append(line)
            size += length
    return [*pieces, "".join(lines)] if lines else pieces


def docstrings(source: str) -> str:
    """The docstrings of Python source, without indentation, one blank line between them."""
    found = [match[3] for match in _TRIPLE_QUOTED.finditer(source) if match[1] is not None]
    texts = [textwrap.dedent(" " * _margin(text) + text).strip() for text in found]
    return "\n\n".join(text for text in texts if len(text) >= _SMALLEST_DOCSTRING) + "\n"


def without_docstrings(source: str) -> str:
    """Python source without its docstrings."""
    return _TRIPLE_QUOTED.sub(lambda match: match[0] if match[1] is None else "", source)


def _margin(text: str) -> int:
    """Indentation of the lines below the first."""
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return min((len(line) - len(line.lstrip()) for line in lines), default=0)


def _description(metadata: str) -> str:
    """What a package says of itself: a README as it is, METADATA without its header lines."""
    if not metadata.startswith("Metadata-Version:"):
        return metadata
    return metadata.partition("\n\n")[2].strip() + "\n"


def _as_it_is(text: str) -> str:
    return text


def _roots() -> list[Path]:
    """Folders that hold the installed packages: this environment's, and where else our dependencies are found."""
    paths = [Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")]
    specs = [importlib.util.find_spec(package) for package in ("numpy", "ray", "sympy", "torch", "transformers")]
    paths += [Path(spec.origin).parent.parent for spec in specs if spec and spec.origin]
    return list(dict.fromkeys(path.resolve() for path in paths if path.is_dir()))


def _files(kind: _Kind, name: str) -> Iterable[Path]:
    """Files of a domain in the order of a hash of their names."""
    found = []
    for root in _roots():
        for top in os.listdir(root):
            if not kind.top_folders(top):
                continue
            for folder, folders, names in os.walk(root / top):
                folders[:] = [inner for inner in folders if inner not in ("__pycache__", "_vendor", "thirdparty_files")]
                where = os.path.relpath(folder, root)
                found += [(root, relative) for n in names if kind.is_wanted(relative := f"{where}/{n}")]
    found.sort(key=lambda entry: (hash_text(name, entry[1]), entry[1]))
    return [root / relative for root, relative in found]


def _has_words(top: str) -> bool:
    return top.endswith(".dist-info") or top in _CODE_PACKAGES


def _is_test(path: str) -> bool:
    parts = path.split("/")
    return "tests" in parts or "test" in parts or "testing" in parts or parts[-1].startswith("test_")


def _is_library_code(path: str) -> bool:
    return path.endswith(".py") and not _is_test(path) and "_pb2" not in path


def _gives_docstrings(path: str) -> bool:
    """Half of the files give their docstrings and the other half their code, so that no file is in both domains."""
    return hash_text("docstrings", path) % 2 == 0


def _is_licence(path: str) -> bool:
    name = path.rsplit("/", 1)[-1].lower()
    is_other = name.startswith("readme") or name.endswith((".py", ".pyi", ".json", ".so", ".h"))
    return not is_other and (bool(_LICENCE_NAME.match(name)) or "/licenses/" in path)


def _is_description(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return name == "METADATA" or (name.lower().endswith((".md", ".rst")) and "licen" not in path.lower())


def _ends(*suffixes: str) -> Callable[[str], bool]:
    return lambda path: path.endswith(suffixes)


_KINDS = {
    "python-code": _Kind(
        _CODE_PACKAGES.__contains__,
        lambda path: _is_library_code(path) and not _gives_docstrings(path),
        without_docstrings,
    ),
    "cpp-headers": _Kind(_HEADER_PACKAGES.__contains__, _ends(".h", ".hpp", ".cuh"), _as_it_is),
    "docstrings": _Kind(
        _CODE_PACKAGES.__contains__, lambda path: _is_library_code(path) and _gives_docstrings(path), docstrings
    ),
    "package-descriptions": _Kind(_has_words, _is_description, _description, _SHORT, _MANY),
    "licences": _Kind(_has_words, _is_licence, _as_it_is, _SHORT, _MANY),
    "type-stubs": _Kind(_CODE_PACKAGES.__contains__, _ends(".pyi"), _as_it_is),
    HELD_BACK: _Kind("sympy".__eq__, _is_library_code, without_docstrings),
}
NAMES = tuple(_KINDS)
"""All domains, the held-back one included."""
