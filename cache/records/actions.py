"""actions: the action cache, from an action's key to the manifest of what it made.

It remembers results across a killed run, a lost build database, another checkout.

```
actions/ab/cdef….json
```
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from cache.files import atomic
from cache.records.manifests import Action, Manifest, ManifestError


class Hit(Struct, frozen=True):
    """The action was run before."""

    manifest: Manifest


class Miss(Struct, frozen=True):
    """The action was never run, as far as this cache knows."""


class Corrupt(Struct, frozen=True):
    """There is an entry, but it cannot be used. Running the action again replaces it."""

    path: Path
    cause: str


class Actions:
    """The action cache under ``root``; if ``read_only``, that an entry was used is not noted."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        self._read_only = read_only
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def path(self, key: str) -> Path:
        """Return where the entry of ``key`` lies."""
        return self.root / key[:2] / f"{key[2:]}.json"

    def get(self, action: Action) -> Hit | Miss | Corrupt:
        """Look ``action`` up."""
        path = self.path(action.key)
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return Miss()
        except ManifestError as error:
            return Corrupt(path, str(error))
        if manifest.action != action:
            return Corrupt(path, "it records another action")
        if not self._read_only:
            with suppress(FileNotFoundError):
                atomic.touch(path, path.stat().st_mtime_ns)
        return Hit(manifest)

    def read(self, key: str) -> Manifest | None:
        """Return what is recorded under ``key``, if anything that can be used."""
        manifest = Manifest.at(self.path(key))
        return manifest if manifest and manifest.action.key == key else None

    def put(self, manifest: Manifest) -> None:
        """Record a result. Its blobs must be in place: whoever finds it relies on them."""
        atomic.write(self.path(manifest.action.key), manifest.to_bytes())

    @contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Hold ``key`` in this process, so that two threads never run one action at once."""
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            yield
