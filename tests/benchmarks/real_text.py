"""Real text for the benchmarks: the sources of Python's standard library, as JSON lines, one domain per file."""

import json
import sysconfig
from pathlib import Path

_FOLDERS = ("asyncio", "email", "encodings", "idlelib", "importlib", "json", "lib2to3", "multiprocessing", "unittest")


def write_domains(folder: Path, count: int, *, max_bytes: int = 3_000_000) -> dict[str, Path]:
    """Write ``count`` domains of about equal size; returns name -> path.

    Args:
        folder: Receives ``<name>.jsonl``.
        count: Number of domains.
        max_bytes: Text per domain.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py")) + [
        path for name in _FOLDERS for path in sorted((library / name).rglob("*.py"))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for index in range(count):
        path = folder / f"part{index}.jsonl"
        _write(path, files[index::count], max_bytes)
        paths[path.stem] = path
    return paths


def _write(path: Path, files: list[Path], max_bytes: int) -> None:
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for source in files:
            text = source.read_text(encoding="utf-8", errors="replace")
            if total >= max_bytes:
                return
            if text.strip():
                file.write(json.dumps({"text": text}) + "\n")
                total += len(text)
