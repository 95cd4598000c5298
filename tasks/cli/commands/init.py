"""init: ``doit init``: writes a models.toml for the checkpoints that it finds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from doit.exceptions import InvalidCommand

from cache.records.memos import Memos
from tasks.checkpoints import hub_name, loaders, sources, transformers
from tasks.checkpoints.small_files import read_json
from tasks.checkpoints.source import Opening, ReadableSource
from tasks.cli.command import Command
from tasks.cli.doit_adapter import models_file
from tasks.core.errors import CheckpointError
from tasks.core.kinds import Mistakes
from tasks.core.program import COMMAND
from tasks.core.spec import SourceSpec
from tasks.core.text import plural, toml
from tasks.core.workspace import BUILD
from tasks.layouts import asking
from tasks.layouts.libraries import MLX_EMBEDDINGS, MLX_LM
from tasks.layouts.registry import is_read

MAX_DEPTH = 3  # of folders below the current one that are looked into

HEAD = f"""\
# The models that are built from checkpoints, each into build/NAME.
# `{COMMAND}` builds them all, `{COMMAND} NAME` one; `{COMMAND} plan` says what that will do.
"""
SETTINGS = """\
# dtype = "bfloat16"  # Default: the checkpoint's own
"""
LAYOUT = """\
# layout = "mlx-vlm"  # with what it sees and hears with, or another. Default: "mlx-lm"
"""
QUANTIZE = """\
quantize = { bits = 4 }  # or 3, 6, 8, …; without this line nothing is quantized
"""
QUANTIZED = """\
# It is quantized already, and so is built as it is.
"""
VARIANT = """\
# A second model of the same checkpoint, {name}-8bit:
# [models.{key}.variants.8bit]
# quantize = {{ bits = 8 }}
"""


class Init(Command):
    """``doit init``."""

    name = "init"
    doc_purpose = "write a models.toml for the checkpoints here"
    doc_usage = "[SOURCE ...]"
    doc_description = f"""\
SOURCE is a checkpoint's folder, or one on the hub, hf:ORG/NAME. Without it: all that lie in
the current folder, or up to {MAX_DEPTH} folders deep in it. A models.toml that is there is never
changed."""

    def execute(self, _params: Any, args: list[str]) -> int:
        """Write the file.

        Raises:
            InvalidCommand: there is one already, or nothing to build.
        """
        models = models_file().absolute()
        try:
            named = {name: _spec(name) for name in args or _search(Path())}
            checkpoints = {spec: _open(spec, models.parent) for spec in named.values()}
            unfit = [name for name, spec in named.items() if not _is_checkpoint(checkpoints[spec])]
        except CheckpointError as error:  # of a hub
            raise InvalidCommand(str(error)) from error
        if unfit:
            kinds = ", or ".join(loader.HOLDS for loader in loaders.LOADERS.values())
            hub = hub_name.hint(unfit[0])
            raise InvalidCommand(
                f"{unfit[0]} is no folder with a checkpoint{hub}: expected {kinds}."
            )
        if not checkpoints:
            raise InvalidCommand(
                f"there is no checkpoint in {Path.cwd()}. Name its folder, or one on the hub: "
                f"{COMMAND} init FOLDER, {COMMAND} init hf:ORG/NAME"
            )
        tables = _tables(checkpoints, models.parent)
        try:
            with models.open("x", encoding="utf-8") as file:
                file.write("\n".join([HEAD, *tables.values()]))
        except FileExistsError as error:
            raise InvalidCommand(
                f"{models} is there already, and is not changed. Add to it by hand, or write "
                f"another: {COMMAND} models=PATH init"
            ) from error
        except OSError as error:
            raise InvalidCommand(f"{models} cannot be written: {error.strerror}.") from error
        print(f"{models}: {plural(len(tables), 'model')}: {', '.join(tables)}")
        print(f"{COMMAND} plan says what is to be built, {COMMAND} builds it.")
        return 0


def _spec(name: str) -> SourceSpec:
    """Return what a SOURCE on the command line, relative to the current folder, names.

    Raises:
        InvalidCommand: it names nothing.
    """
    try:
        return sources.spec(name, Path.cwd())
    except Mistakes as error:
        (mistake,) = error.mistakes
        raise InvalidCommand(f"{name} {mistake.fact}: {mistake.mend}") from error


def _open(spec: SourceSpec, folder: Path) -> ReadableSource:
    """Open a source for a project in a folder."""
    opening = Opening(is_read, Memos(folder, read_only=True), str(folder))
    return sources.open_source(spec, opening)


def _search(root: Path) -> Iterator[str]:
    """Yield the folders below one that hold checkpoints, and look no further into those."""
    for folder, names, _ in os.walk(root, followlinks=True):
        path = Path(folder)
        if _is_checkpoint(_open(_spec(folder), root)):
            yield folder
            names.clear()
        elif len(path.parts) == MAX_DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if name[0] != "." and name != BUILD)


def _is_checkpoint(source: ReadableSource) -> bool:
    """Tell whether there are weights of a model, and the file beside them."""
    if not source.small_files.is_dir() or transformers.is_adapter(source):
        return False
    return any(
        loader.fits(source) and any(source.names(pattern) for pattern in loader.WEIGHTS)
        for loader in loaders.LOADERS.values()
    )


def _tables(checkpoints: Mapping[SourceSpec, ReadableSource], folder: Path) -> dict[str, str]:
    """Return the table of each model, by the model's name."""
    tables: dict[str, str] = {}
    for spec, opened in checkpoints.items():
        name = _name(Path(opened.location).name, tables)
        key = name if re.fullmatch(r"[\w-]+", name, re.ASCII) else toml(name)
        tables[name] = (
            f"[models.{key}]\nsource = {toml(sources.spelled(spec, folder))}\n"
            + (QUANTIZED if _is_quantized(opened) else QUANTIZE)
            + SETTINGS
            + _layout(opened)
            + VARIANT.format(name=name, key=key)
        )
    return tables


def _name(folder: str, taken: Iterable[str]) -> str:
    """Return a model's name that a folder's gives, unlike those that are taken."""
    plain = re.sub(r"[^\w.+-]", "-", folder).lstrip(".+-").rstrip(".") or "model"
    names = {name.casefold() for name in taken}
    return next(
        name
        for name in (plain, *(f"{plain}-{number}" for number in range(2, len(names) + 3)))
        if name.casefold() not in names
    )


def _is_quantized(source: ReadableSource) -> bool:
    """Tell whether a checkpoint's config.json says that its weights are quantized."""
    return not {"quantization", "quantization_config"}.isdisjoint(_config(source))


def _layout(source: ReadableSource) -> str:
    """Return the line of a layout: a comment, or that of a library where mlx-lm has no such model.

    Or it has, and the files are those of sentence-transformers.
    """
    having = asking.layouts_of(_config(source).get("model_type"))
    if source.has(transformers.MODULES) and MLX_EMBEDDINGS in having:
        having = {MLX_EMBEDDINGS: having[MLX_EMBEDDINGS]}
    if not having or MLX_LM in having:
        return LAYOUT
    (name, install), *others = having.items()
    words = [install, *(f'or "{other}"' for other, _ in others)]
    said = ", ".join(word for word in words if word)
    return f'layout = "{name}"' + (f"  # {said}" if said else "") + "\n"


def _config(source: ReadableSource) -> dict[str, Any]:
    """Return what a checkpoint's config.json says, nothing if there is none."""
    try:
        return read_json(source.small_files / "config.json", "what tells of its weights")
    except CheckpointError:
        return {}
