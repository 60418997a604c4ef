"""Text in zstd frames, read with windows of up to 2 GiB as `zstd --long=31` writes them."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import zstandard

logger = logging.getLogger("sngpt_jax")

MAX_WINDOW = 2**31
_ANNOUNCED = 2**27  # a larger window, which the command `zstd -d` refuses without --long, is said
_READ = 2**12  # bytes at once: 31 of them may unpack to 1 MiB


class Reader(io.RawIOBase):
    """The bytes of all frames in the file `path`. A read raises OSError for damaged, truncated or
    foreign bytes, and for a window above `MAX_WINDOW`.
    """

    def __init__(self, path: Path):
        self._file, self._path = io.FileIO(path), path
        self._chunks, self._rest = self._unpacked(self._file), memoryview(b"")
        self._window_takes = "its zstd window takes too much"

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)  # 128 MiB at most, of which a read takes a little
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def _unpacked(self, file: io.FileIO) -> Iterator[bytes]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        frame = None
        while data := file.read(_READ):
            while data:
                if frame is None:
                    self._announce(data)
                    frame = decompressor.decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as problem:
                    if "Allocation" in str(problem):
                        raise MemoryError(f"{self._path}: {self._window_takes}") from None
                    too_large = "memory" in str(problem)  # the library's word for a window
                    remedy = "; compress it again with zstd --long=31 or less" * too_large
                    raise OSError(f"{problem}{remedy}") from None
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise OSError("the file ends inside a frame")

    def _announce(self, data: bytes) -> None:
        """Says how much memory the frame's window takes, if that is unusual."""
        try:
            window = zstandard.get_frame_parameters(data).window_size
        except zstandard.ZstdError:
            return  # reading tells what is wrong with the frame, or its header is cut by the end
        self._window_takes = f"its zstd window takes {window / 2**30:.2f} GiB of memory"
        if window > _ANNOUNCED:
            logger.info(f"{self._path}: {self._window_takes}")
