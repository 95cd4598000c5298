"""verify: ``doit verify``: whether a built model is what its source makes, to the byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.exceptions import InvalidCommand
from msgspec import to_builtins
from msgspec.structs import replace

from cache.errors import one_line
from cache.records.memos import Memos
from tasks.checkpoints import sources
from tasks.checkpoints.hub_name import HubName
from tasks.checkpoints.small_files import read_bytes
from tasks.cli.command import Command
from tasks.cli.doit_adapter import models_file
from tasks.cli.failures import as_invalid_dodo_file
from tasks.config import reader
from tasks.core.errors import BuildError
from tasks.core.kinds import Mistakes
from tasks.core.program import COMMAND
from tasks.core.spec import SourceSpec
from tasks.core.workspace import Workspace
from tasks.layouts import card
from tasks.planning.lockfile import Lock

if TYPE_CHECKING:
    from tasks.execution.claim import Making

JSON = {
    "name": "as_json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print JSON, for scripts",
}
ALL = {
    "name": "whole",
    "short": "",
    "long": "all",
    "type": bool,
    "default": False,
    "help": "make all layers anew, and not just three",
}
SOURCE = {
    "name": "source",
    "short": "",
    "long": "source",
    "type": str,
    "default": "",
    "help": "the checkpoint that it was made from, a folder or hf:ORG/NAME[@REVISION]; "
    "without it, what models.toml or the model's card says",
}


class Verify(Command):
    """``doit verify``."""

    name = "verify"
    doc_purpose = "make layers of a built model anew, and compare them to the byte"
    doc_usage = "TARGET | FOLDER | hf:ORG/NAME"
    doc_description = """\
The model may be anybody's: its config.json says how it is quantized, its card what it was made
from. Each tensor is equal, equal but for rounding (another kind of device computed it, or another
MLX: each weight is then as near to the original as the one that is made here), or different.
Exit status 0: all is equal, but for rounding at most, 1: something is different, 3: it cannot be
told."""
    cmd_options = (ALL, SOURCE, JSON)
    names_tasks = False

    def execute(self, opt_values: Mapping[str, Any], pos_args: list[str]) -> int:
        """Verify a model, and say what it is found to be."""
        if len(pos_args) != 1:
            raise InvalidCommand(f"name one model: {COMMAND} verify {self.doc_usage}")
        with as_invalid_dodo_file(), tempfile.TemporaryDirectory(prefix="mlx-make-") as name:
            return self._verify(pos_args[0], opt_values, Path(name))

    def _verify(self, text: str, options: Mapping[str, Any], folder: Path) -> int:
        from tasks.cli import verify_tasks
        from tasks.execution import verify
        from tasks.execution.claim import Claim

        model, making = _named(text, options["source"])
        claim = Claim.open(model, text, folder)
        if making is None:
            making = _from_card(text, claim.checkpoint.folder, options["source"], folder)
        said = making.source_name
        verification = verify.Verification.of(claim, making, folder, whole=options["whole"])
        verdicts = []
        for _, group in groupby(verification.verdicts(), lambda verdict: verdict.layer):
            of_layer = list(group)
            verdicts += of_layer
            if not options["as_json"]:
                self.outstream.writelines(f"{line}\n" for line in verify_tasks.lines(of_layer))
                self.outstream.flush()
        worst = verify.worst(verdicts)
        if options["as_json"]:
            layers = {"made": len(verification.layers), "all": verification.all_layers}
            record = {"model": text, "source": said, "verdict": worst, "layers": layers}
            record["tensors"] = to_builtins(verdicts)
            self.outstream.write(json.dumps(record, indent=1) + "\n")
        else:
            line = verify_tasks.summary(text, verification, said, verdicts)
            self.outstream.write(f"{one_line(line)}\n")
        return int(worst == verify.DIFFERENT)


def _spec(text: str) -> SourceSpec:
    """Return what a name on the command line means, relative to the current folder.

    Raises:
        BuildError: it means nothing.
    """
    try:
        return sources.spec(text, Path.cwd())
    except Mistakes as error:
        raise BuildError(f"{text}: {error}") from error


def _named(text: str, source: str) -> tuple[SourceSpec, Making | None]:
    """Return where a model is, and how it is made, if it is a target of models.toml.

    Args:
        text: the model: a target of models.toml, a folder, or the hub's.
        source: what it is made from; "", that is not said.
    """
    from tasks.execution.claim import Making

    model = _spec(text)
    path, folder = models_file(), sources.folder_of(model)
    if folder and not folder.is_dir() and path.exists():
        config = reader.load(path)
        if text in config.targets:
            lock = Lock.load(config.path.with_suffix(".lock"), strict=False)
            making = Making.of(config.targets[text], config.quality, lock)
            if source:
                making = replace(making, source=_spec(source), source_name=source)
            built = Workspace(config.path.parent).built(text)
            if not built.is_dir():
                raise BuildError(
                    f"{text} is not built: there is no {built}. {COMMAND} verify:{text} builds it "
                    "first."
                )
            return _spec(str(built)), making
    return model, None


def _from_card(text: str, folder: Path, source: str, scratch: Path) -> Making:
    """Return how a model was made that is no target of ours.

    Args:
        text: the model's name, for people.
        folder: with its small files.
        source: what it was made from, if that is said.
        scratch: where is remembered what its card says.

    Raises:
        BuildError: its card does not say it.
    """
    from tasks.execution import claim

    path = folder / card.CARD
    said = read_bytes(path).decode(errors="replace") if path.is_file() else ""
    if making := claim.from_card(said, text, source):
        return making
    if not source:
        source = _base_model(text, folder, Memos(scratch / "memos"))
    return claim.Making(source=_spec(source), source_name=source)


def _base_model(text: str, folder: Path, memos: Memos) -> str:
    """Return what the front matter of a model's card says that it was made from.

    Raises:
        BuildError: it says nothing.
    """
    fields, _ = card.front_matter(folder, memos)
    base = fields.get("base_model", "")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    if isinstance(base, str) and base:
        return str(HubName(base))
    raise BuildError(
        f"the card of {text} does not say what it was made from (base_model). Name it: "
        f"{COMMAND} verify --source FOLDER {text}, or hf:ORG/NAME."
    )
