"""hashed_files: files of this machine that a hub says the sha256 of, hashed while they are read.

It is a second reading, in file order, by a thread of its own: mostly of what the system has in
memory for the first. What a file was found to have is remembered as long as it stays.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from cache.records.memos import Memos
from tasks.checkpoints import file_digests
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError


class HashedFiles:
    """Hashes files one after another. Safe in threads."""

    def __init__(self) -> None:
        self._found: dict[Path, Future[str]] = {}
        self._queue: SimpleQueue[tuple[Path, Memos]] = SimpleQueue()
        self._asking = threading.Lock()

    def begin(self, checkpoint: Checkpoint, keys: Iterable[str], memos: Memos) -> None:
        """Begin to hash the files that stored tensors lie in, whose sha256 is said."""
        for name in _said(checkpoint, keys):
            self._hash(checkpoint, name, memos)

    def wrong(
        self, checkpoint: Checkpoint, keys: Iterable[str], memos: Memos, *, waits: bool
    ) -> dict[str, str]:
        """Return the sha256 of files that are not what they are said to be, by name.

        Args:
            checkpoint: the checkpoint.
            keys: of the stored tensors that are read.
            memos: where what was found is remembered.
            waits: whether to hash what is not hashed yet; else nothing is said of it.

        Raises:
            CheckpointError: one cannot be read.
        """
        wrong = {}
        for name in _said(checkpoint, keys):
            if waits or self._is_hashed(checkpoint, name):
                actual = self._hash(checkpoint, name, memos).result()
                if actual != checkpoint.sha256(name):
                    wrong[name] = actual
        return wrong

    def _is_hashed(self, checkpoint: Checkpoint, name: str) -> bool:
        path = checkpoint.source.path(name)
        return path in self._found and self._found[path].done()

    def _hash(self, checkpoint: Checkpoint, name: str, memos: Memos) -> Future[str]:
        path = checkpoint.source.path(name)
        assert path is not None  # else it is fetched
        with self._asking:
            if not self._found:  # nobody waits for it when all else has ended
                threading.Thread(target=self._work, name="hashing", daemon=True).start()
            if path not in self._found:
                self._found[path] = Future()
                self._queue.put((path, memos))
            return self._found[path]

    def _work(self) -> None:
        while True:
            path, memos = self._queue.get()
            try:
                sha256 = file_digests.of_file(path, file_digests.SHA256, memos)
            except OSError as error:
                self._found[path].set_exception(
                    CheckpointError(f"{path} cannot be read: {error.strerror}.")
                )
            else:
                self._found[path].set_result(sha256)


def _said(checkpoint: Checkpoint, keys: Iterable[str]) -> list[str]:
    """Return the files of this machine that tensors lie in, and whose sha256 is said."""
    if not checkpoint.source.available:
        return []
    files = dict.fromkeys(checkpoint.stored[key].file for key in keys)
    return [n for n in files if checkpoint.sha256(n) and checkpoint.source.path(n)]
