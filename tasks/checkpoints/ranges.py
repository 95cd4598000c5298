"""ranges: a weight file that is no file of this machine, as Python's open files are."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, Literal

from msgspec import Struct, field

from tasks.checkpoints.stored import FileStat

# Of what a format looks for first: the header of a shard, the directory of an archive.
WINDOW_BYTES = 32 << 10

Read = Callable[[int, int], Iterator[bytes]]  # start, nbytes


class RangedFile(Struct, frozen=True):
    """A weight file that is read by ranges: what a format needs of a path.

    Attributes:
        location: where it is, for messages.
        size: in bytes.
        read: yields the bytes of a range.
    """

    location: str
    size: int
    read: Read
    _windows: list[tuple[int, bytes]] = field(default_factory=list)  # each is fetched once

    def __str__(self) -> str:
        return self.location

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return PurePosixPath(self.location).name

    @property
    def suffix(self) -> str:
        """What its name ends with."""
        return PurePosixPath(self.location).suffix

    def stat(self) -> FileStat:
        """Return its size."""
        return FileStat(self.size)

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it to read."""
        return io.BufferedReader(_Ranges(self.size, self.read, self._windows), 1)


class _Ranges(io.RawIOBase):
    """The bytes of a file, a window at a time."""

    def __init__(self, size: int, read: Read, windows: list[tuple[int, bytes]]) -> None:
        self._size = size
        self._read = read
        self._position = 0
        self._windows = windows

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        begin, window = self._window(wanted)
        start = self._position - begin
        data = window[start : start + wanted]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _window(self, wanted: int) -> tuple[int, bytes]:
        """Return bytes around the position, and where they begin."""
        at = self._position
        for begin, window in self._windows:
            if begin <= at < begin + len(window):
                return begin, window
        begin, end = at, min(at + max(wanted, WINDOW_BYTES), self._size)
        if end == self._size:  # an archive's directory, which is read from its end on
            begin = min(begin, max(0, end - WINDOW_BYTES))
        for there, window in self._windows:
            begin = max(begin, there + len(window)) if there < at else begin
            end = min(end, there) if there > at else end
        window = b"".join(self._read(begin, end - begin))
        self._windows.append((begin, window))
        return begin, window
