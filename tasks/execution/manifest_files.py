"""manifest_files: manifests beside models.toml, of which the last are not decoded a second time."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.manifests import Manifest

MOST_TENSORS = 1 << 16  # of the manifests that are held: some 40 MB


@dataclass
class ManifestFiles:
    """Writes and reads manifests: what reads one comes mostly right behind what made it.

    Safe in threads.
    """

    _held: dict[str, tuple[Stamp, Manifest]] = field(default_factory=dict)
    _count: int = 0  # of their tensors
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, path: Path, manifest: Manifest, *, durable: bool = False) -> None:
        """Write a manifest to ``path``, unless it is there; ``durable``: see ``atomic.write``."""
        data = manifest.to_bytes()
        try:
            is_there = path.read_bytes() == data
        except FileNotFoundError:
            is_there = False
        if not is_there:
            atomic.write(path, data, durable=durable)
        self._hold(str(path), Stamp.of(path), manifest)

    def read(self, path: str) -> Manifest:
        """Return the manifest in a file.

        Raises:
            FileNotFoundError: there is none.
            ManifestError: it is damaged.
        """
        stamp = Stamp.of(path)
        with self._lock:
            held = self._held.get(path)
        if held and held[0] == stamp:
            return held[1]
        return Manifest.from_bytes(Path(path).read_bytes())

    def _hold(self, path: str, stamp: Stamp, manifest: Manifest) -> None:
        with self._lock:
            if path in self._held:
                self._drop(path)
            self._held[path] = stamp, manifest
            self._count += len(manifest.tensors)
            while self._count > MOST_TENSORS:
                self._drop(next(iter(self._held)))

    def _drop(self, path: str) -> None:
        self._count -= len(self._held.pop(path)[1].tensors)
