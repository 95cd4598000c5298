"""lock_format: models.lock as a file. For version control, beside models.toml.

```json
{
  "version": 1,
  "sources": {"checkpoints/llama-7b": {"files": {"config.json": [654, "ab…"], …}, "record": …}},
  "adapters": {"hf:ORG/NAME": {"revision": "9c…", "hashes": {"adapter_config.json": [612, …], …}}},
  "targets": {"llama-7b": {"source": …, "settings": …, "action": …, "output": …, "blake3": …, …}}
}
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from cache.digest import digest_record
from cache.files import atomic
from tasks.core.errors import ConfigError
from tasks.core.program import COMMAND
from tasks.planning.source_record import LockedSource

VERSION = 1
# What to do about the project's own file, once it is damaged.
RESTORE = "Take it from version control again, or remove it: the next build writes it anew."

_256_BITS = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_RECORD = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
_DIGEST = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_COUNT = Annotated[int, msgspec.Meta(ge=0)]


class _Version(msgspec.Struct, frozen=True):
    version: int


class _Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``LockedSource`` as the file has it."""

    files: dict[str, tuple[_COUNT, _DIGEST]]
    record: _RECORD
    nbytes: _COUNT
    revision: str | None = None
    hashes: dict[str, tuple[_COUNT, str]] | None = None
    unverified: tuple[str, ...] | None = None
    written_by: Literal["mlx", ""] | None = None

    def locked(self) -> LockedSource:
        files: dict[str, list[Any]] = {name: list(of) for name, of in self.files.items()}
        hashes: dict[str, list[Any]] = {n: list(of) for n, of in (self.hashes or {}).items()}
        return LockedSource(
            files,
            self.record,
            self.nbytes,
            self.revision,
            hashes or None,
            self.unverified,
            self.written_by,
        )


class Built(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A target as models.lock has it.

    Attributes:
        source: its source's record.
        settings: digest of all that models.toml and the plan say of it.
        computer: what computed it, if anything was: MLX's version, device, machine.
        action: key of the action that packed it.
        output: digest of the packed files' names and digests.
        blake3: the same, by BLAKE3: the one that nobody can make other files for. None if no remote
            store was set when it was locked.
        sha256: of each packed file, by name, for who downloads it. None before a report or a
            publishing worked it out.
        chosen: where a budget chose how modules are quantized: group size, bits and mode, by path.
        chosen_for: the budget, and what else of models.toml and the model that is a choice for.
        choice: digest of ``chosen`` and ``chosen_for``: a digit of it that is another may be a
            choice as well.
    """

    source: _256_BITS
    settings: _DIGEST
    computer: dict[str, str] | None
    action: _DIGEST
    output: _DIGEST
    blake3: _256_BITS | None = None
    sha256: dict[str, _256_BITS] | None = None
    chosen: dict[str, tuple[int, int, str]] | None = None
    chosen_for: dict[str, Any] | None = None
    choice: _DIGEST | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether what is chosen is what was; of older files nothing tells."""
        return self.choice is None or self.choice == self.sealed.choice

    @property
    def sealed(self) -> Built:
        """It with the digest of what is chosen, if anything is."""
        if self.chosen is None:
            return msgspec.structs.replace(self, choice=None)
        choice = digest_record([msgspec.to_builtins(self.chosen), self.chosen_for])
        return msgspec.structs.replace(self, choice=choice)

    @property
    def json(self) -> dict[str, Any]:
        """It as the file has it."""
        record = msgspec.structs.asdict(self)
        for name in ("sha256", "chosen", "chosen_for", "choice"):
            if record[name] is None:
                del record[name]
        return record

    @property
    def without_sha256(self) -> Built:
        """It as it was before the SHA-256 of its files was known."""
        return msgspec.structs.replace(self, sha256=None)


class _Adapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter on a hub, as the file has it."""

    revision: str
    hashes: dict[str, tuple[_COUNT, str]]

    def locked(self) -> LockedSource:
        hashes: dict[str, list[Any]] = {name: list(of) for name, of in self.hashes.items()}
        return LockedSource({}, "", 0, self.revision, hashes)


class _LockFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    sources: dict[str, _Source]
    targets: dict[str, Built]
    adapters: dict[str, _Adapter] = {}


class Locked(NamedTuple):
    """What the file says.

    Attributes:
        sources: by their names in models.toml.
        targets: by name.
        adapters: those on a hub, by their names in models.toml.
    """

    sources: dict[str, LockedSource]
    targets: dict[str, Built]
    adapters: dict[str, LockedSource]


def read(path: Path) -> Locked:
    """Return what the file says.

    Raises:
        ConfigError: the file is damaged, or a newer version wrote it.
        FileNotFoundError: there is none.
    """
    return parse(path.read_bytes(), path)


def parse(data: bytes, path: Path, mend: str = RESTORE) -> Locked:
    """Return what the bytes of such a file say.

    Args:
        data: the bytes.
        path: what the file is called.
        mend: what to do about a file that is none.

    Raises:
        ConfigError: the file is damaged, or a newer version wrote it.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise ConfigError(
                f"{path} is of version {version}, this mlx-make reads {VERSION}: update mlx-make."
            )
        lock = msgspec.json.decode(data, type=_LockFile)
    except (msgspec.DecodeError, RecursionError) as error:
        if b"<<<<<<<" in data:
            raise ConfigError(
                f"{path} holds a merge's conflict. Take either side of the whole file (git "
                f"checkout --ours {path.name}), then {COMMAND} lock and {COMMAND}: they "
                "write it anew."
            ) from error
        raise ConfigError(f"{path} is no lock file: {error}. {mend}") from error
    sources = {name: source.locked() for name, source in lock.sources.items()}
    adapters = {name: adapter.locked() for name, adapter in lock.adapters.items()}
    return Locked(sources, lock.targets, adapters)


def write(path: Path, locked: Locked) -> None:
    """Write the file, unless it says just that."""
    record = {
        "version": VERSION,
        "sources": {name: source.json for name, source in locked.sources.items()},
        "targets": {name: built.json for name, built in locked.targets.items()},
    }
    if locked.adapters:
        record["adapters"] = {
            name: {"revision": adapter.revision, "hashes": adapter.hashes}
            for name, adapter in locked.adapters.items()
        }
    data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        atomic.write(path, data, durable=True)  # it is the user's, and nothing else has it
