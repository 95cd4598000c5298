"""manifests: the small record of what one stage made of one layer.

A manifest is a Merkle node: per tensor its name, dtype, shape and digest, and the action that
made it, which names its inputs by digest in turn. It is what a build tool compares, the
provenance record, and enough to make a lost blob again.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cache.digest import canonical, digest, plain
from cache.errors import CacheError

SCHEMA = 1

DTYPE_BYTES = {
    "bool_": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2,
    "uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "complex64": 8,
}  # fmt: skip


class ManifestError(CacheError):
    """Bytes that are no manifest of a schema this version reads."""


class OtherSchema(ManifestError):
    """A manifest of a schema that this version does not read."""


class TensorSpec(NamedTuple):
    """A tensor of which the content is not known yet.

    Attributes:
        dtype: as MLX spells it.
        shape: whole.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor by content.

    Attributes:
        dtype: as MLX spells it.
        shape: whole, of the tensor as the stage left it.
        digest: of its bytes, row-major, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def read(cls, dtype: Any, shape: Any, digest: Any) -> Tensor:
        """Return a tensor as a record has it: a remote's can say anything.

        Raises:
            ValueError, TypeError: it is none. A digest becomes part of a path.
        """
        sizes = all(type(size) is int and size >= 0 for size in shape)
        if dtype not in DTYPE_BYTES or not sizes or not re.fullmatch(r"[0-9a-f]{32}", digest):
            raise ValueError(f"[{dtype!r}, {shape!r}, {digest!r}] is no tensor")
        return cls(sys.intern(dtype), tuple(shape), digest)

    @property
    def spec(self) -> TensorSpec:
        """The tensor without its content."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def record(self) -> list[Any]:
        """The tensor as JSON."""
        return [self.dtype, list(self.shape), self.digest]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Action:
    """One stage run on one layer: everything that its result depends on, and nothing else.

    Attributes:
        stage: the stage's name.
        version: the stage's own version, raised when its results change.
        params: what it was told, JSON.
        inputs: the tensors it reads, by name: dtype, shape, digest.
    """

    stage: str
    version: int
    params: Any
    inputs: dict[str, list[Any]]

    @cached_property
    def key(self) -> str:
        """The action cache's key."""
        head = canonical([SCHEMA, self.stage, self.version, self.params])
        return digest(b"%s,%s]" % (head[:-1], plain(self.inputs)))


@dataclass(frozen=True)
class Manifest:
    """What an action made.

    Attributes:
        action: the action.
        tensors: by name, in the layer's own order.
        notes: what people should know of the result, e.g. tensors that hold NaN.
    """

    action: Action
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def result(self) -> str:
        """Digest of what was made, whoever made it: equal results stop a rebuild."""
        return digest(self._tensors())

    def _tensors(self) -> bytes:
        return plain([(name, t.dtype, t.shape, t.digest) for name, t in self.tensors.items()])

    def to_bytes(self, *, sealed: bool = True) -> bytes:
        """Return the canonical bytes.

        Args:
            sealed: whether they hold a digest of themselves, its own place left empty. Those of
                older versions do not.
        """
        action = {"params": self.action.params, "stage": self.action.stage}
        made = {"notes": list(self.notes), "result": self.result, "schema": SCHEMA}
        data = b'{"action":{"inputs":%s,%s,"version":%s},%s,%s"tensors":%s}' % (
            plain(self.action.inputs),
            canonical(action)[1:-1],
            canonical(self.action.version),
            canonical(made)[1:-1],
            b'"seal":"",' if sealed else b"",
            self._tensors(),
        )
        if not sealed:
            return data
        at = data.rindex(_SEAL + _BEHIND_IT) + len(_SEAL)  # the last is this record's own
        return data[:at] + digest(data).encode() + data[at:]

    @classmethod
    def at(cls, path: str | Path) -> Manifest | None:
        """Return the manifest in a file, or None if there is none that can be read."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except (FileNotFoundError, ManifestError):
            return None

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest back.

        Raises:
            ManifestError: the bytes are damaged.
            OtherSchema: a newer version wrote them.
        """
        try:
            record = _decode(data)
            schema = record["schema"]
            if schema != SCHEMA:
                raise OtherSchema(
                    f"manifest of schema {schema}, this version reads {SCHEMA}: "
                    "update mlx-make, or use another cache folder"
                )
            manifest = cls(
                Action(**record["action"]),
                {sys.intern(name): Tensor.read(*spec) for name, *spec in record["tensors"]},
                tuple(record["notes"]),
            )
            # To write it again tells of every byte, and takes its time; so does a seal that fits.
            sealed = _is_sealed(data) and record.keys() == _MEMBERS
            if sealed:
                whole = record["result"] == manifest.result
            else:
                whole = manifest.to_bytes(sealed="seal" in record) == data
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ManifestError(f"not a manifest: {error}") from error
        if not whole:
            raise ManifestError("not what a manifest with its contents would be")
        return manifest


_MEMBERS = {"schema", "action", "tensors", "notes", "result", "seal"}
_SEAL, _BEHIND_IT = b'"seal":"', b'","tensors":['  # within strings, quotes are escaped


def _is_sealed(data: bytes) -> bool:
    """Tell whether a record holds the digest of its own bytes."""
    end = data.rfind(_BEHIND_IT)
    at = end - 32
    if at < len(_SEAL) or data[at - len(_SEAL) : at] != _SEAL:
        return False
    return data[at:end] == digest(data[:at] + data[end:]).encode()


def _decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:  # msgspec knows no halves of surrogate pairs
        return json.loads(data)
