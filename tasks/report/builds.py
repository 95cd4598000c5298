"""builds: what was packed once, by content, and what is on record of just these bytes.

A build is its packing's manifest: names, dtypes, shapes and digests. How a tensor was quantized,
how far it is from its original and what that is estimated to cost stand in the records of the
stages that made and measured it, and are found by its digest: so they are told of builds of any
time, as long as the cache has the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cache.errors import CacheError
from cache.records.manifests import Manifest, Tensor
from cache.store import Store
from tasks.core.workspace import Workspace
from tasks.planning import bundle
from tasks.planning.lock_format import Built
from tasks.quality.divergence import ModelQuality
from tasks.report import figures
from tasks.report.figures import Error
from tasks.stages import measure, registry, sensitivity
from tasks.stages.quantize_scheme import Setting

Content = tuple[str, str]  # a tensor's name and digest


class Quantized(NamedTuple):
    """How a weight came to be.

    Attributes:
        setting: how it is quantized.
        method: what rounded it, if not each number to the nearest.
        original: digest of what it was made of.
    """

    setting: Setting
    method: str
    original: str


@dataclass
class Records:
    """What is on record of tensors.

    Attributes:
        quantized: how weights came to be, by name and digest.
        errors: how far they are from their originals, likewise.
        costs: the estimated divergence, in nats, of a weight that is quantized in a way, by its
            original's name and digest, and the setting.
    """

    quantized: dict[Content, Quantized] = field(default_factory=dict)
    errors: dict[Content, Error] = field(default_factory=dict)
    costs: dict[tuple[Content, Setting], float] = field(default_factory=dict)

    def learn(self, store: Store, manifests: Iterable[Manifest]) -> None:
        """Take what manifests of the stages say that quantize and measure."""
        for manifest in manifests:
            kind, params = manifest.action.stage, manifest.action.params
            if kind == registry.roles().quantized:
                self._quantized(manifest)
            elif kind == measure.Measure.name and (read := _contents(store, manifest)):
                for name, norms in measure.figures(manifest, read).items():
                    error = Error(Setting(*params["compared"][name]), *norms)
                    self.errors |= dict.fromkeys(_read(manifest, name), error)
            elif kind == sensitivity.Sensitivity.name and (read := _contents(store, manifest)):
                if params.get("relative"):  # by an importance matrix: no divergence
                    continue
                for name, cost in sensitivity.figures(manifest, read).items():
                    setting = Setting(*params["setting"])
                    self.costs |= {(content, setting): cost for content in _read(manifest, name)}

    def _quantized(self, manifest: Manifest) -> None:
        params = manifest.action.params
        for name, setting in params["settings"].items():
            if name in manifest.tensors and (of := _read(manifest, name)):
                self.quantized[name, manifest.tensors[name].digest] = Quantized(
                    Setting(*setting), params.get("method", ""), of[0][1]
                )


@dataclass(frozen=True)
class Build:
    """A target, as it was packed once.

    Attributes:
        name: what it is called where it is compared.
        tensors: the model's, by name; none, if what was packed is not on record.
        files: those of the folder, by name; likewise.
        weight_files: names of those that hold tensors.
        settings: digest of all that models.toml and the plan said of it, if a lock has that.
        chosen: where a budget chose: the setting of each module, by path, if a lock has that.
        quality: how good it is, if it was evaluated.
    """

    name: str
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Tensor]
    weight_files: frozenset[str] = frozenset()
    settings: str = ""
    chosen: Mapping[str, Setting] | None = None
    quality: ModelQuality | None = None

    @classmethod
    def of(cls, name: str, packed: Manifest, quality: ModelQuality | None = None) -> Build:
        """Return it by its packing's manifest."""
        tensors = {
            name: Tensor.read(*record) for name, record in sorted(packed.action.inputs.items())
        }
        held = frozenset(packed.action.params["weights"])
        return cls(name, tensors, packed.tensors, held, quality=quality)

    @classmethod
    def locked(
        cls, name: str, store: Store, workspace: Workspace, target: str, built: Built
    ) -> Build:
        """Return it as a models.lock has it, whatever is built now."""
        chosen = None
        if built.chosen is not None:
            chosen = {path: Setting(*setting) for path, setting in built.chosen.items()}
        for last in (workspace.packed(target), workspace.packed_before(target)):
            if packed := bundle.recorded(store, last, built.action):
                found = cls.of(
                    name, packed, figures.evaluated(store.blobs, workspace, target, packed)
                )
                break
        else:
            found = cls(name, {}, {})
        return cls(
            name, found.tensors, found.files, found.weight_files, built.settings, chosen,
            found.quality,
        )  # fmt: skip

    @property
    def nbytes(self) -> int | None:
        """Size of all files."""
        return sum(tensor.nbytes for tensor in self.files.values()) if self.files else None


def records(
    store: Store, workspace: Workspace, targets: Iterable[str], wanted: Iterable[Content]
) -> Records:
    """Return what is on record of weights.

    Of what the targets were last built of, their manifests tell; of all else, the action cache.

    Args:
        store: the cache.
        workspace: where the targets' manifests lie.
        targets: their names.
        wanted: the weights that are quantized.
    """
    found = Records()
    names = (registry.roles().quantized, measure.Measure.name, sensitivity.Sensitivity.name)
    for target in dict.fromkeys(targets):
        for stage in names:
            folder = Path(workspace.manifest(target, stage, "")).parent
            found.learn(
                store, (m for path in sorted(folder.glob("*.json")) if (m := Manifest.at(path)))
            )
    if not found.quantized.keys() >= {*wanted}:
        found.learn(store, _all(store, names))
    return found


def _all(store: Store, stages: Iterable[str]) -> Iterator[Manifest]:
    """Yield all manifests of some stages that the action cache has."""
    marks = [f'"stage":"{stage}"'.encode() for stage in stages]
    for path in store.actions.root.glob("*/*.json"):
        data = path.read_bytes()
        if any(mark in data for mark in marks) and (manifest := Manifest.at(path)):
            yield manifest


def _read(manifest: Manifest, name: str) -> list[Content]:
    """Return the tensors of a name that an action read, of whatever stage."""
    return [
        (name, record[-1])
        for key, record in manifest.action.inputs.items()
        if key == name or key.endswith(f":{name}")
    ]


def _contents(store: Store, manifest: Manifest) -> dict[str, bytes]:
    """Return the bytes of what an action made; nothing where some are lost."""
    try:
        return {
            name: b"".join(
                map(bytes, store.blobs.chunks(store.blobs.locate(tensor.digest, tensor.nbytes)))
            )
            for name, tensor in manifest.tensors.items()
        }
    except (CacheError, OSError):
        return {}
