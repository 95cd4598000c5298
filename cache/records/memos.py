"""memos: answers worth remembering that are no stage's result: a file's table, a model's plan.

```
memos/KIND/ab/cdef….json
```
A memo can always be worked out again, so one that cannot be read is simply not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cache.digest import digest_record
from cache.files import atomic


class Memos:
    """The memos under ``root``; those that are ``read_only`` are not written."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        self._read_only = read_only

    def get(self, kind: str, question: Any) -> Any | None:
        """Return the answer to ``question`` (JSON), or None."""
        path = self._path(kind, question)
        try:
            answer = json.loads(path.read_bytes())
            if not self._read_only:
                atomic.touch(path, path.stat().st_mtime_ns)
            return answer
        except (FileNotFoundError, ValueError):
            return None

    def put(self, kind: str, question: Any, answer: Any) -> None:
        """Remember the ``answer`` (JSON, None excepted) to ``question``."""
        if self._read_only:
            return
        data = json.dumps(answer, separators=(",", ":")).encode()
        atomic.write(self._path(kind, question), data)

    def _path(self, kind: str, question: Any) -> Path:
        key = digest_record(question)
        return self.root / kind / key[:2] / f"{key[2:]}.json"
