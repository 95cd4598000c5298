"""memos: answers worth remembering that are no stage's result: a file's table, a model's plan.

```
memos/KIND/ab/cdef….json    sealed under KIND/abcdef…
```
Older versions kept memos that were not sealed, under the question's own digest. The two lie side by
side, so that either version can share the folder with the other.

A memo can always be worked out again, so one that is not what was written is simply absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from cache.digest import digest_record
from cache.files import atomic
from cache.files.own import UNWRITABLE
from cache.records.sealed import Damaged, seal, unseal

_T = TypeVar("_T")
_FORM = "sealed"  # another where the form of memos changes


class Memos:
    """The memos under ``root``; those that are ``read_only`` are not written."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        self._read_only = read_only

    def get(self, kind: str, question: Any, answer: type[_T]) -> _T | None:
        """Return what is remembered of a ``question`` (JSON), or None.

        Args:
            kind: of question.
            question: JSON.
            answer: the answer's type; one of another type is absent.
        """
        key = _key(question)
        path = self._path(kind, key)
        try:
            value = unseal(f"{kind}/{key}", path.read_bytes(), answer)
            if not self._read_only:
                atomic.touch(path, path.stat().st_mtime_ns)
        except (FileNotFoundError, Damaged):
            return None
        return value

    def put(self, kind: str, question: Any, answer: Any) -> None:
        """Remember the ``answer`` (JSON, None excepted) to ``question``, if it can be written."""
        if self._read_only:
            return
        key = _key(question)
        try:
            atomic.write(self._path(kind, key), seal(f"{kind}/{key}", answer))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise

    def forget(self, kind: str, question: Any) -> None:
        """Remember nothing of a question any more."""
        if not self._read_only:
            self._path(kind, _key(question)).unlink(missing_ok=True)

    def _path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key[2:]}.json"


def _key(question: Any) -> str:
    return digest_record([_FORM, question])
