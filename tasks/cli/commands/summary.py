"""summary: what was built, reused and fetched, and what that saved, in Markdown, from the log."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cache.errors import CacheError
from cache.records.manifests import Manifest
from cache.store import Store
from tasks.cli import table
from tasks.cli.command import Command
from tasks.cli.doit_adapter import models_file
from tasks.config import reader
from tasks.core.errors import BuildError
from tasks.core.text import size
from tasks.core.workspace import STATE, Workspace
from tasks.execution.log import OUTCOMES, Entry, Log
from tasks.quality.divergence import ModelQuality
from tasks.stages import registry
from tasks.stages.forward import Evaluate

NOTHING = "### mlx-make\n\nNo task ran.\n"


class Summary(Command):
    """Prints what the last run did, or all runs since a time."""

    name = "summary"
    doc_purpose = "say in Markdown what was built, reused and fetched"
    doc_usage = "[models=PATH]"
    cmd_options = (
        {
            "name": "since",
            "long": "since",
            "type": float,
            "default": None,
            "help": "of all runs since then, Unix time, and not of the last one",
        },
    )

    def execute(self, opt_values: Mapping[str, Any], pos_args: list[str]) -> int:
        """Print the summary."""
        state = models_file().absolute().parent / STATE
        history = list(Log(state / "log.jsonl").entries())
        since = opt_values["since"]
        if since is None:
            entries = [entry for entry in history if entry.run == history[-1].run]
        else:
            entries = [entry for entry in history if entry.start >= since]
        print(markdown(entries, history, sizes(state / "manifests"), evaluations()), end="")
        return 0


def sizes(manifests: Path) -> dict[str, int]:
    """Return the bytes of each built model, by target.

    Args:
        manifests: the folder with one folder a target.
    """
    by_target = {}
    for path in manifests.glob("*/pack.json"):
        if manifest := Manifest.at(path):  # else the next build makes it again
            tensors = manifest.tensors.values()
            by_target[path.parent.name] = sum(tensor.nbytes for tensor in tensors)
    return by_target


def evaluations() -> dict[str, ModelQuality]:
    """Return how good each built model is that was evaluated, by target."""
    workspace = Workspace(models_file().absolute().parent)
    if not any(workspace.state.glob(f"manifests/*/{Evaluate.name}")):
        return {}
    from tasks.report.figures import evaluated  # only where there is something to tell

    try:
        blobs = Store.at(reader.load(models_file()).cache.dir, read_only=True).blobs
    except (BuildError, CacheError):  # a summary is told whatever models.toml says now
        return {}
    qualities = {}
    for path in workspace.all_packed():
        name = path.parent.name
        if (packed := Manifest.at(path)) and (quality := evaluated(blobs, workspace, name, packed)):
            qualities[name] = quality
    return qualities


def markdown(
    entries: Sequence[Entry],
    history: Iterable[Entry],
    built_bytes: Mapping[str, int],
    qualities: Mapping[str, ModelQuality],
) -> str:
    """Return the summary.

    Args:
        entries: what it is of.
        history: all that the log knows, to tell how long what was not computed would have taken.
        built_bytes: the size of each built model, by target.
        qualities: how good those are that were evaluated, by target.
    """
    if not entries:
        return NOTHING
    targets, stages = defaultdict(list), defaultdict(list)
    for entry in entries:
        stages[entry.group].append(entry)
        if ":" in entry.task:  # report's overview is of all targets
            targets[entry.target].append(entry)
    measured = ("perplexity", "KL", "same top") if targets.keys() & qualities.keys() else ()
    by_target = [
        [
            target,
            size(built_bytes[target]) if target in built_bytes else "",
            *(_words(qualities.get(target)) if measured else ()),
            *_counts(of_target),
        ]
        for target, of_target in sorted(targets.items())
    ]
    by_stage = [
        [
            stage,
            *_counts(stages[stage]),
            f"{sum(entry.seconds for entry in stages[stage]):.1f} s",
            size(sum(entry.bytes_read for entry in stages[stage])),
            size(sum(entry.bytes_written for entry in stages[stage])),
        ]
        for stage in dict.fromkeys([*registry.building(), *registry.groups(), *stages])
        if stage in stages
    ]
    failed = [f"- failed: `{entry.task}`" for entry in entries if entry.outcome == "failed"]
    parts = [
        "### mlx-make",
        table.markdown([["target", "size", *measured, *OUTCOMES], *by_target]),
        table.markdown([["stage", *OUTCOMES, "work", "read", "written"], *by_stage]),
        *(["\n".join(failed)] if failed else []),
        saved(entries, history),
    ]
    return "\n\n".join(parts) + "\n"


def saved(entries: Iterable[Entry], history: Iterable[Entry]) -> str:
    """Say how much work reused and fetched results saved, as far as the log knows.

    Args:
        entries: what was done.
        history: what was ever done: a result that was not computed would have taken the median of
            its stage, less what it did take.
    """
    computed = defaultdict(list)
    for entry in history:
        if entry.outcome == "computed":
            computed[entry.group].append(entry.seconds)
    spared = [entry for entry in entries if entry.outcome in ("reused", "fetched")]
    unknown = Counter(entry.group for entry in spared if not computed[entry.group])
    seconds = sum(
        median(computed[entry.group]) - entry.seconds for entry in spared if computed[entry.group]
    )
    if not spared:
        return "Time saved: none, all was computed."
    if unknown.total() == len(spared):
        return "Time saved: unknown, the log has not seen these stages computed."
    seconds = max(seconds, 0.0)  # a busy machine may reuse tiny results slower than it made them
    line = f"Time saved: {seconds:.1f} s of work (tasks run side by side)"
    if unknown:
        counts = ", ".join(f"{count} × {stage}" for stage, count in sorted(unknown.items()))
        line += f"; not counted, since the log has not seen them computed: {counts}"
    return f"{line}."


def _words(quality: ModelQuality | None) -> list[str]:
    if quality is None:
        return ["", "", ""]
    agreement = f"{100 * quality.agreement:.2f} %"
    return [f"{quality.perplexity:.4g}", f"{quality.mean:.3g}", agreement]


def _counts(entries: Iterable[Entry]) -> list[str]:
    counts = Counter(entry.outcome for entry in entries)
    return [str(counts[outcome] or "") for outcome in OUTCOMES]
