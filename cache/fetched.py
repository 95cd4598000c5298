"""fetched: blobs whose bytes come from elsewhere piece by piece, and go again when they were used.

```
blobs/packs/KEY          the bytes, as far as they have come
blobs/packs/DIGEST       of KEY: the digest of each whole piece of them
```
A fetch that was cut off goes on behind the last piece that is still what was written: a power cut
may have left others. The key says what the bytes are a copy of, so that no other file is ever taken
for one, or removed as one. To all else in the store, who garbage collection is, it is a container.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import xxhash

from cache.blobs import CONTAINERS, Blobs, Part
from cache.digest import digest
from cache.errors import WrongLength
from cache.files import atomic, own, space
from cache.records.sealed import Damaged

PIECE_BYTES = 256 << 10
_DIGEST_BYTES = 16
Read = Callable[[int], Iterator[bytes]]  # the bytes from an offset on


class FetchedBlobs:
    """Blobs of a store that are copies of what lies elsewhere. Safe in threads and processes."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs
        self._folder = blobs.root / CONTAINERS

    def part(self, key: str, length: int) -> Part:
        """Return where the bytes of ``key`` lie, once they are fetched."""
        return Part(str(self._folder / key), 0, length, None)

    def size(self, key: str) -> int | None:
        """Return how many bytes of ``key`` lie here: all, or what came before it was cut off."""
        try:
            return (self._folder / key).stat().st_size
        except FileNotFoundError:
            return None

    def fetch(self, key: str, length: int, read: Read) -> str:
        """Make a blob of all bytes of ``key``, and return its digest.

        What is there already is not read again.

        Args:
            key: says what they are a copy of, 32 hexadecimal digits.
            length: how many bytes.
            read: yields those from an offset on.

        Raises:
            NoRoom: the disk is full.
            WrongLength: ``read`` yielded more or fewer.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with space.enospc_as_no_room(self._folder, length), self._alone(key) as file:
            # Opened to append: what is behind the last whole piece is cut off first.
            with open(self._digests(key), "a+b", buffering=0, opener=own.open_own) as digests:
                state = xxhash.xxh3_128()
                begin = _intact(file, digests, length, state)
                space.require_free(self._folder, length - begin)
                written = _append(
                    file, digests, begin, read(begin) if begin < length else (), state
                )
            if begin + written != length:
                raise WrongLength(length, begin + written)
            self.blobs.meter.written += written
        blob_digest = state.hexdigest()
        self.blobs.refer(blob_digest, [self.part(key, length)])
        return blob_digest

    def drop(self, key: str, known: str | None) -> None:
        """Remove the bytes of ``key``; ``known`` is lost then, unless it lies elsewhere.

        Who reads them meanwhile, in another process, finds them lost, and makes them again.
        """
        path = self._folder / key
        if known:
            reference = self.blobs.reference_path(known)
            with suppress(FileNotFoundError, Damaged):
                if any(part.path == str(path) for part in self.blobs.reference(reference)):
                    reference.unlink()
        path.unlink(missing_ok=True)
        self._digests(key).unlink(missing_ok=True)

    def _digests(self, key: str) -> Path:
        return self._folder / digest(key.encode())  # a container that garbage collection removes

    @contextmanager
    def _alone(self, key: str) -> Iterator[IO[bytes]]:
        """Open the file of ``key``, which nobody else fills at the same time."""
        path = self._folder / key
        while True:
            descriptor = own.open_own(path, os.O_RDWR | os.O_CREAT)
            with open(descriptor, "r+b", buffering=0) as file:
                with suppress(OSError):  # a file system without locks: who fills it twice
                    fcntl.flock(descriptor, fcntl.LOCK_EX)  # writes the same bytes
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                        yield file
                        return
            # It was dropped while this waited for who filled it.


def _intact(file: IO[bytes], digests: IO[bytes], length: int, state: xxhash.xxh3_128) -> int:
    """Return how many bytes are there as they were written; ``state`` takes them in.

    Both files end there afterwards.
    """
    digests.seek(0)
    known = digests.read()
    at = 0
    buffer = memoryview(bytearray(PIECE_BYTES))
    file.seek(0)
    for number in range(len(known) // _DIGEST_BYTES):
        piece = buffer[: min(PIECE_BYTES, length - at)]
        wanted = known[number * _DIGEST_BYTES :][:_DIGEST_BYTES]
        if not piece or file.readinto(piece) != len(piece) or _digest(piece) != wanted:  # type: ignore[attr-defined]
            break
        state.update(piece)
        at += len(piece)
    file.truncate(at)
    digests.truncate(-(-at // PIECE_BYTES) * _DIGEST_BYTES)
    return at


def _append(
    file: IO[bytes],
    digests: IO[bytes],
    begin: int,
    data: Iterator[bytes] | tuple[()],
    state: xxhash.xxh3_128,
) -> int:
    """Write what comes from ``begin`` on, and the digest behind each piece; return how much."""
    at, buffer, held = begin, memoryview(bytearray(PIECE_BYTES)), 0
    for chunk in data:
        rest = memoryview(chunk)
        while rest:  # small as it comes from a socket: with each call other threads are waited for
            now = rest[: PIECE_BYTES - held]
            rest = rest[len(now) :]
            if len(now) == PIECE_BYTES:
                at += _write(file, digests, at, now, state)
                continue
            buffer[held : held + len(now)] = now
            held += len(now)
            if held == PIECE_BYTES:
                at, held = at + _write(file, digests, at, buffer, state), 0
    if held:
        at += _write(file, digests, at, buffer[:held], state)
    return at - begin


def _write(
    file: IO[bytes], digests: IO[bytes], at: int, piece: memoryview, state: xxhash.xxh3_128
) -> int:
    atomic.write_all(file, piece, at)
    state.update(piece)
    digests.write(_digest(piece))
    return len(piece)


def _digest(data: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)
