"""file_digests: digests of whole files, worked out once: as hubs have them, and as records do."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cache.digest import digest_file
from cache.files.stamp import Stamp, changed_at
from cache.records.memos import Memos

SHA256 = "sha256"
XXH3 = "xxh3"


def of_file(path: Path, kind: str, memos: Memos) -> str:
    """Return a file's digest, which is worked out once, as long as the file stays.

    Args:
        path: the file.
        kind: ``sha256`` or ``xxh3``, of its bytes; ``git``, the id of its blob in git.
        memos: where it is remembered.
    """
    question = [kind, str(path), *Stamp.of(path), changed_at(path)]
    digest = memos.get("hub digests", question, str)
    if digest is None:
        if kind == XXH3:
            digest = digest_file(path)
        elif kind == SHA256:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, SHA256).hexdigest()
        else:
            digest = of_bytes(path.read_bytes(), kind)
        memos.put("hub digests", question, digest)
    return digest


def state(kind: str, nbytes: int) -> hashlib._Hash:
    """Return what makes the same digest of a file of so many bytes as they pass."""
    return hashlib.sha256() if kind == SHA256 else hashlib.sha1(b"blob %d\0" % nbytes)


def of_bytes(data: bytes, kind: str) -> str:
    """Return the same digest of a file that is nowhere yet."""
    whole = state(kind, len(data))
    whole.update(data)
    return whole.hexdigest()
