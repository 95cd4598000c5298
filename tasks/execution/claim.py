"""claim: a built model, and what is said of how it was made: by itself, its card and models.toml.

config.json says how each module is quantized. That an adapter was fused, or weights were rounded on
a text, no file of a model says but its card.
"""

from __future__ import annotations

import glob
import platform
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct, structs

from cache.errors import printable
from cache.records.memos import Memos
from tasks.checkpoints import loaders, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.hub_name import PREFIX
from tasks.checkpoints.source import Opening
from tasks.core.errors import ArchitectureError, BuildError, ConfigError
from tasks.core.kinds import Dtype, LayoutName, LoaderName, Mistakes, Size, SourceName
from tasks.core.quantization import Method, Mode, Quantize, Rule
from tasks.core.spec import Device, Quality, SourceSpec, Target
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.model import Model
from tasks.layouts.registry import LAYOUTS, is_read
from tasks.planning import card_lines
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Planner
from tasks.planning.source_record import LockedSource
from tasks.stages.rules import holder_of
from tasks.stages.stage import FLOATING
from tasks.tensors import modes

# Whose models say in config.json how each module is quantized; files of all have the same names.
LAYOUT, *OTHERS = map(LayoutName, LIBRARIES)
TARGET = "model"  # in a folder of its own


class Claim(Struct, frozen=True):
    """A built model, which says of itself how it is quantized.

    Attributes:
        name: of the built model, for people.
        checkpoint: the built model, as a checkpoint.
    """

    name: str
    checkpoint: Checkpoint

    @classmethod
    def open(cls, spec: SourceSpec, name: str, folder: Path) -> Claim:
        """Open a built model.

        Args:
            spec: where it is.
            name: for people.
            folder: to work in.

        Raises:
            BuildError: there is none.
        """
        memos = Memos(folder / "memos")
        opened = sources.open_source(spec, Opening(is_read, memos, str(folder)))
        if not opened.names(LAYOUTS[LAYOUT].loaded):
            for other, layout in LAYOUTS.items():
                if opened.names(layout.loaded):
                    raise ConfigError(
                        f"{name} is of layout {other}, which does not say how each module is "
                        f"quantized: only a model of layout {' or '.join((LAYOUT, *OTHERS))} can "
                        "be verified. Build it anew of its source, and compare the files."
                    )
        return cls(name, loaders.read(opened, None, memos, named=name))


class Making(Struct, frozen=True, kw_only=True):
    """What is known of how a built model was made, beside what its config.json says.

    Attributes:
        source: what it was made from.
        source_name: the same, for people.
        loader: what reads that, if it is not told from the files.
        adapter: what was fused with it.
        adapter_name: the same, for people.
        dequantize: whether the source's packed weights went back to floats.
        as_packed: whether nothing was quantized but what the source has packed, if that is known.
        keep: whether that was asked for.
        dtype: what was cast to then, if anything: of packed weights floats may be of several.
        device: what computed it, if that is known and can be had here.
        method: what its weights were rounded by, if not to nearest.
        quality: the text on which, and how much of it.
    """

    source: SourceSpec
    source_name: str
    loader: LoaderName | None = None
    adapter: SourceSpec | None = None
    adapter_name: SourceName | None = None
    dequantize: bool = False
    as_packed: bool = False
    keep: bool = False
    dtype: Dtype | None = None
    device: Device | None = None
    method: Method | None = None
    quality: Quality = Quality()

    @classmethod
    def of(cls, target: Target, quality: Quality, lock: Lock) -> Making:
        """Return it of a target of models.toml, as it is locked."""
        adapter = target.adapter
        return cls(
            source=_pinned(target.source, lock.sources.get(target.source_name)),
            source_name=target.source_name,
            loader=target.loader,
            adapter=adapter and _pinned(adapter, lock.adapters.get(str(adapter))),
            adapter_name=target.adapter_name,
            dequantize=target.dequantize,
            as_packed=not target.quantize,
            keep=target.keep,
            dtype=target.dtype,
            device=target.device,
            method=target.quantize.method if target.quantize else None,
            quality=quality,
        )


def _pinned(spec: SourceSpec, locked: LockedSource | None) -> SourceSpec:
    """Return a source at the commit that it is locked at, if it is on a hub."""
    on_hub = sources.on_hub(spec)
    if spec.prefix != PREFIX or on_hub is None or locked is None or not locked.revision:
        return spec
    pinned = on_hub._replace(revision=locked.revision)
    return SourceSpec(PREFIX, str(pinned).removeprefix(PREFIX))


class _Model(Struct):
    source: str = ""
    loader: str | None = None
    adapter: str | None = None
    dequantize: bool = False
    dtype: Dtype | None = None
    device: str | None = None
    quantize: dict[str, Any] | Literal["keep"] | None = None


class _Lines(Struct):
    """What a card's lines of models.toml may say that is of use."""

    models: dict[str, _Model]
    quality: dict[str, Any] = {}


def from_card(card: str, name: str, source: str = "") -> Making | None:
    """Return what a model's card says of how it was made, if it has lines of models.toml.

    Args:
        card: the text; anybody may have written it.
        name: the model's, for people.
        source: what it was made from, if that is said otherwise.

    Raises:
        BuildError: it was made with something that is on this machine nowhere.
    """
    found = card_lines.of_card(card)
    try:
        lines = msgspec.convert(None if found is None else tomllib.loads(found), _Lines)
        ((_, model),) = lines.models.items()
        texts = lines.quality.pop("text", None)
        quality = msgspec.convert(lines.quality, Quality)
    except (ValueError, RecursionError):  # msgspec's and tomllib's are of these
        return None
    if not source and not model.source.startswith(PREFIX):
        return None
    said = model.quantize.get("method") if isinstance(model.quantize, dict) else None
    method = next((each for each in get_args(Method) if each == said), None)
    if model.adapter and not model.adapter.startswith(PREFIX):
        raise _cannot(name, "an adapter is fused with it that is on no hub")
    if method:
        _check_text(card, name, method, texts)
    return Making(
        source=_spec(source or model.source, name),
        source_name=source or model.source,
        loader=LoaderName(model.loader) if model.loader in loaders.LOADERS else None,
        adapter=_spec(model.adapter, name) if model.adapter else None,
        adapter_name=SourceName(model.adapter) if model.adapter else None,
        dequantize=model.dequantize,
        as_packed=not isinstance(model.quantize, dict),
        keep=model.quantize == "keep",
        dtype=model.dtype,
        device="cpu" if model.device == "cpu" else None,  # a GPU need not be here
        method=method,
        quality=quality,
    )


def _spec(text: str, name: str) -> SourceSpec:
    """Return what a name on the hub, or one that somebody said, means.

    Raises:
        BuildError: it means nothing.
    """
    try:
        return sources.spec(text, Path.cwd())
    except Mistakes as error:
        raise BuildError(f"{name} is said to be made of {text}: {error}") from error


def _check_text(card: str, name: str, method: str, texts: object) -> None:
    """Refuse a model that is rounded on a text that is not here.

    Raises:
        BuildError: it is.
    """
    python, match = platform.python_version(), card_lines.OF_PYTHON.search(card)
    if texts is not None:
        named = texts if isinstance(texts, str) else "texts"
        raise _cannot(
            name, f"its weights are rounded by {method} on {printable(named)} of its maker's"
        )
    if match and match[1] != python:
        raise _cannot(
            name, f"its weights are rounded by {method} on the help of Python {match[1]}, and this "
            f"is Python {python}"
        )  # fmt: skip


def _cannot(name: str, fact: str) -> BuildError:
    return BuildError(
        f"{name} cannot be verified by its card alone: {fact}. Who has that puts the card's lines "
        "into a models.toml, builds, and compares the files."
    )


def target_of(claim: Claim, making: Making, planner: Planner) -> Target:
    """Return the target that makes the model, by what it says of itself and what is known of it.

    Raises:
        BuildError: it says nothing that could be made.
    """
    checkpoint = claim.checkpoint
    said = _settings(claim, checkpoint.config.get("quantization"))
    shard_bytes = Size(LAYOUTS[LAYOUT].default_shard_bytes)
    asked = Target(
        name=TARGET,
        source=making.source,
        source_name=SourceName(making.source_name),
        loader=making.loader,
        adapter=making.adapter,
        adapter_name=making.adapter_name,
        dequantize=making.dequantize,
        max_shard_bytes=shard_bytes,
        dtype=_dtype(checkpoint),
        device=making.device,
        where=claim.name,
    )
    target = structs.replace(asked, layout=_layout(claim, asked, planner))
    if making.as_packed:
        return structs.replace(target, dtype=making.dtype, keep=making.keep)
    if said is None:
        return target
    rules = _rules(planner.share(target).model, checkpoint, said, target.dtype)
    usual = said[""]
    quantize = Quantize(
        usual.bits, usual.group_size, usual.mode, method=making.method, rules=tuple(rules)
    )
    return structs.replace(target, quantize=quantize)


def _layout(claim: Claim, target: Target, planner: Planner) -> LayoutName:
    """Return the layout that has the model's tensors, or the one of which it has the fewest others.

    Raises:
        BuildError: nothing is made of the source in any.
    """
    stored = claim.checkpoint.stored
    names = {name for name in stored if not name.endswith((".scales", ".biases"))}
    unlike: dict[LayoutName, int] = {}
    errors = []
    for layout in (LAYOUT, *OTHERS):
        try:
            model = planner.share(structs.replace(target, layout=layout)).model
        except ArchitectureError as error:
            errors.append(error)
            continue
        unlike[layout] = len(names ^ model.parameters.keys())
        if not unlike[layout]:
            break
    if not unlike:
        raise errors[0]
    return min(unlike, key=lambda layout: unlike[layout])


def _rules(
    model: Model, checkpoint: Checkpoint, said: Mapping[str, _Setting], usual: Dtype | None
) -> Iterator[Rule]:
    """Yield a rule for each module that could be quantized, or is of another dtype than usual."""
    dtypes: dict[str, set[str]] = {m.path: set() for m in model.modules if m.quantized_names}
    can = {*dtypes}
    for parameter in (each for each in model.parameters.values() if each.castable):
        path = holder_of(parameter.name)
        found = (checkpoint.stored.get(name) for name in (parameter.name, f"{path}.scales"))
        dtypes.setdefault(path, set()).update(each.dtype for each in found if each is not None)
    for path, kinds in dtypes.items():
        rule = _rule(path, checkpoint, said) if path in can else None
        floats = [dtype for dtype in get_args(Dtype) if dtype in kinds]
        if len(floats) == 1 and floats != [usual]:
            (dtype,) = floats
            rule = (
                structs.replace(rule, dtype=dtype) if rule else Rule(glob.escape(path), dtype=dtype)
            )
        if rule:
            yield rule


def _rule(path: str, checkpoint: Checkpoint, said: Mapping[str, _Setting]) -> Rule:
    """Return the rule that quantizes a module as the model has it."""
    match = glob.escape(path)
    if f"{path}.scales" not in checkpoint.stored:
        return Rule(match, skip=True)
    setting = said.get(path, said[""])
    return Rule(match, setting.bits, setting.group_size, setting.mode)


class _Setting(Struct):
    """What config.json says of how a module is quantized, or "" all of them."""

    mode: Mode = "affine"
    group_size: int | None = None
    bits: int | None = None


def _settings(claim: Claim, said: Any) -> dict[str, _Setting] | None:
    """Return what a model says of how it is quantized, by the module's path; None, it is not.

    Raises:
        ConfigError: nothing can be quantized so.
    """
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise _none_such(claim, "", said, "it is no table")
    _check_mode(claim, usual := said.get("mode", "affine"))
    tables = {"": said} | {
        path: {"mode": usual, **own} for path, own in said.items() if isinstance(own, Mapping)
    }
    settings = {}
    for path, table in tables.items():
        _check_mode(claim, table.get("mode", usual))
        try:
            setting = msgspec.convert(table, _Setting)
        except ValueError as error:  # msgspec's, or of half a character in a text
            raise _none_such(claim, path, table, str(error)) from error
        for number, valid in zip(
            (setting.group_size, setting.bits), modes.numbers(setting.mode), strict=True
        ):
            if number is not None and number not in valid:
                raise _none_such(claim, path, table, f"{number} is none of {valid}")
        settings[path] = setting
    return settings


def _none_such(claim: Claim, path: str, said: object, cause: str) -> ConfigError:
    of = f" of {path}" if path else ""
    return ConfigError(
        f"{claim.name} cannot be verified: its config.json has quantization{of} = "
        f"{printable(repr(said))}: {cause}."
    )


def _check_mode(claim: Claim, mode: object) -> None:
    if mode not in get_args(Mode):
        raise ConfigError(
            f"{claim.name} is quantized in mode {mode!r}, which is none that mlx-make makes: "
            f"{', '.join(get_args(Mode))}."
        )


def _dtype(checkpoint: Checkpoint) -> Dtype | None:
    """Return what most of a model's tensors that are not quantized were cast to."""
    dtypes = [t.dtype for t in checkpoint.stored.values() if t.dtype in FLOATING]
    if not dtypes:
        return None
    (most, _), *_ = Counter(dtypes).most_common(1)
    return most if most in get_args(Dtype) else None  # type: ignore[return-value]
