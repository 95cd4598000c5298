"""difference: how two builds differ: settings, sizes, errors and estimated divergence, by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import fsum, isfinite
from typing import Any

from cache.records.manifests import Tensor
from tasks.layouts.model import layer_names
from tasks.report.builds import Build, Records
from tasks.report.figures import Error, together
from tasks.stages import quantize_scheme
from tasks.stages.quantize_scheme import Setting

UNKNOWN = "not on record"


@dataclass(frozen=True)
class Weight:
    """A weight that is quantized, in one build.

    Attributes:
        setting: how.
        method: what rounded it, if not each number to the nearest.
        error: how far it is from its original, if that was measured.
        cost: the estimated divergence, nats, if that was.
    """

    setting: Setting
    method: str = ""
    error: Error | None = None
    cost: float | None = None

    @property
    def words(self) -> str:
        """The setting, for people."""
        mode = "" if self.setting.mode == "affine" else f" {self.setting.mode}"
        by = f" {self.method}" if self.method else ""
        return f"{self.setting.bits} bits{mode}/{self.setting.group_size}{by}"


@dataclass(frozen=True)
class Side:
    """Some tensors of one build: of a layer, or all.

    Attributes:
        nbytes: their size; None, if it is not on record.
        numbers: how many the model has for them.
        settings: how many weights are quantized in each way; None, if that is not known.
        error: relative error of what is quantized; None, if it was not measured.
        cost: sum of the estimated divergences, nats; None likewise.
    """

    nbytes: int | None
    numbers: int | None
    settings: dict[str, int] | None
    error: float | None
    cost: float | None

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], weights: Mapping[str, Weight], *, known: bool
    ) -> Side:
        """Sum them up.

        Args:
            tensors: by name.
            weights: those that are quantized, by name.
            known: whether all that are quantized are among them.
        """
        measured = [weight.error for weight in weights.values() if weight.error]
        told = [weight.cost for weight in weights.values() if weight.cost is not None]
        all_measured, all_told = (
            known and 0 < len(each) == len(weights) for each in (measured, told)
        )
        nbytes = numbers = None
        if tensors:
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            numbers = _numbers(tensors, weights) if known else None
        return cls(
            nbytes,
            numbers,
            dict(Counter(weight.words for weight in weights.values())) if known else None,
            together(measured) if all_measured else None,
            fsum(told) if all_told else None,
        )

    @property
    def bits(self) -> float | None:
        """Bits per weight, scales and biases included."""
        return 8 * self.nbytes / self.numbers if self.nbytes and self.numbers else None

    @property
    def json(self) -> dict[str, Any]:
        """It, for scripts."""
        return {
            "bytes": self.nbytes,
            "bits_per_weight": self.bits,
            "settings": self.settings,
            "relative_error": _finite(self.error),
            "estimated_divergence": _finite(self.cost),
        }


@dataclass(frozen=True)
class Difference:
    """How two builds differ.

    Attributes:
        builds: the two.
        sides: all of each.
        layers: of the layers that differ, each's, by name.
        modules: the settings of modules that differ, in words, by path; None where it is not
            quantized.
        tensors: names of those that both have, with other contents.
        come: names of those that only the second has.
        gone: names of those that only the first has.
        files: names of the files that are not the same, but for those with tensors.
    """

    builds: tuple[Build, Build]
    sides: tuple[Side, Side]
    layers: dict[str, tuple[Side, Side]]
    modules: dict[str, tuple[str | None, str | None]]
    tensors: list[str]
    come: list[str]
    gone: list[str]
    files: list[str]

    @property
    def is_known(self) -> bool:
        """Whether the tensors of both are on record."""
        return all(build.tensors for build in self.builds)

    @property
    def is_something(self) -> bool:
        """Whether they differ, as far as is known."""
        other = self.tensors or self.come or self.gone or self.files or self.modules
        settings = {build.settings for build in self.builds if build.settings}
        return bool(other) or (not self.is_known and len(settings) > 1)

    @property
    def json(self) -> dict[str, Any]:
        """It, for scripts."""
        first, second = (
            {
                "name": build.name,
                "on_record": bool(build.tensors),
                "all_bytes": build.nbytes,
                **side.json,
                "quality": build.quality._asdict() if build.quality else None,
            }
            for build, side in zip(self.builds, self.sides, strict=True)
        )
        return {
            "differs": self.is_something,
            "a": first,
            "b": second,
            "layers": {name: {"a": a.json, "b": b.json} for name, (a, b) in self.layers.items()},
            "modules": {path: {"a": a, "b": b} for path, (a, b) in self.modules.items()},
            "tensors": {"changed": self.tensors, "only_a": self.gone, "only_b": self.come},
            "files": self.files,
        }


def between(first: Build, second: Build, records: Records) -> Difference:
    """Compare two builds."""
    a, b = first.tensors, second.tensors
    weights = _weights(first, records), _weights(second, records)
    changed = [name for name in a if name in b and a[name] != b[name]]
    come = [name for name in b if name not in a] if a else []
    gone = [name for name in a if name not in b] if b else []
    names = [
        {**dict.fromkeys(quantized(build), UNKNOWN), **{w: each.words for w, each in of.items()}}
        for build, of in zip((first, second), weights, strict=True)
    ]
    modules = {
        quantize_scheme.module_path(w): (names[0].get(w), names[1].get(w))
        for w in dict.fromkeys([*names[0], *names[1]])
        if names[0].get(w) != names[1].get(w) and not (a and b and a.get(w) == b.get(w))
    }
    layer_of = layer_names(sorted({*a, *b, *weights[0], *weights[1]}))
    differing = {layer_of[name] for name in (*changed, *come, *gone)}
    differing |= {layer_of[w] for w in layer_of if quantize_scheme.module_path(w) in modules}

    def side(build: Build, of: Mapping[str, Weight], layer: str | None = None) -> Side:
        tensors = {n: t for n, t in build.tensors.items() if layer in (None, layer_of[n])}
        known = {w: each for w, each in of.items() if layer in (None, layer_of[w])}
        return Side.of(tensors, known, known=_all_known(build, of))

    both = [*zip((first, second), weights, strict=True)]
    layers = {}
    for layer in sorted(differing, key=_in_order):
        one, other = (side(*each, layer) for each in both)
        layers[layer] = one, other
    whole, other = (side(*each) for each in both)
    files = (
        {
            name
            for name in {*first.files, *second.files}
            if first.files.get(name) != second.files.get(name)
        }
        if first.files and second.files
        else set()
    )
    files -= first.weight_files | second.weight_files
    return Difference(
        (first, second), (whole, other), layers, modules, changed, come, gone, sorted(files)
    )


def quantized(build: Build) -> dict[str, str]:
    """Return the digests of the weights that a build has quantized, by name."""
    return {
        name: tensor.digest
        for name, tensor in build.tensors.items()
        if name.endswith("weight") and f"{name.removesuffix('weight')}scales" in build.tensors
    }


def _weights(build: Build, records: Records) -> dict[str, Weight]:
    """Return what is known of the weights that a build has quantized, by name."""
    chosen = build.chosen or {}
    found = {quantize_scheme.weight_name(path): Weight(s) for path, s in chosen.items()}
    for content in quantized(build).items():
        if made := records.quantized.get(content):
            cost = records.costs.get(((content[0], made.original), made.setting))
            error = records.errors.get(content)
            found[content[0]] = Weight(made.setting, made.method, error, cost)
    return found


def _all_known(build: Build, weights: Mapping[str, Weight]) -> bool:
    return quantized(build).keys() <= weights.keys() if build.tensors else bool(build.chosen)


def _numbers(tensors: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> int:
    """Return how many numbers tensors are, once what is quantized is back as it was."""
    count = 0
    for name, tensor in tensors.items():
        size = 1
        for length in tensor.shape:
            size *= length
        if weight := weights.get(name):
            count += size * 32 // weight.setting.bits
        elif not _is_of(name, weights):
            count += size
    return count


def _is_of(name: str, weights: Iterable[str]) -> bool:
    """Tell whether a tensor is a quantized weight's scales or biases."""
    path, _, part = name.rpartition(".")
    return part in quantize_scheme.PARTS[1:] and quantize_scheme.weight_name(path) in weights


def _in_order(layer: str) -> tuple[str, int]:
    begin, _, number = layer.rpartition(".")
    return (begin, int(number)) if number.isdigit() else (layer, 0)


def _finite(number: float | None) -> float | None:
    return number if number is not None and isfinite(number) else None
