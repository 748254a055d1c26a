"""Bytes of a file, plain or compressed, in bounded memory; a stream that ends early is an error, never a short text."""

import gzip
import io
from pathlib import Path
from typing import IO, cast

_CHUNK_BYTES = 1 << 20
_COMPRESSED_BYTES = 4096
"""Read at a time; even the densest Zstandard data grows from this to 128 MiB at most."""


class ZstdStream(io.RawIOBase):
    """The content of a Zstandard file, any number of frames; raises EOFError where the file was cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        # A larger window than this is not made by any ordinary compressor, and would be taken from memory at once.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self._frame = self._decompressor.decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fill ``buffer``; 0 at the end.

        Raises:
            EOFError: If the file ends inside a frame.
            OSError: If it is not Zstandard data.
        """
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_inside = self._decompressor.decompressobj(), False
            chunk = chunk or self._file.read(_COMPRESSED_BYTES)
            if not chunk:
                if self._is_inside:
                    raise EOFError("the compressed file ends early")
                return 0
            self._is_inside = True
            self._ready = memoryview(self._decompress(chunk))
            self._is_inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        import zstandard

        try:
            return self._frame.decompress(chunk)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        """Close the file below."""
        self._file.close()
        super().close()


def open_bytes(path: Path) -> IO[bytes]:
    """Open ``path`` for reading, decompressed when its name ends in ``.gz`` or ``.zst``.

    Raises:
        OSError: If it cannot be opened.
    """
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    file = open(path, "rb", buffering=_CHUNK_BYTES)  # noqa: SIM115 (the caller closes it)
    if name.endswith(".zst"):
        return cast(IO[bytes], io.BufferedReader(ZstdStream(file), buffer_size=_CHUNK_BYTES))
    return file
