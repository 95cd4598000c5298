"""pages: a report's files, from a target's manifests, models.lock and the build log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.records.manifests import Manifest
from tasks.core import text as words
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.task_names import REPORT, task_name
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Plan
from tasks.report import INDEX, charts, figures, page_name, timeline, trace_name
from tasks.report.figures import Figures, Piece, Reader
from tasks.stages.measure import Measure
from tasks.stages.stage import FLOATING

if TYPE_CHECKING:  # imported where a page is written
    from jinja2 import Environment

WORST = 10
COMPARED = 50  # of the variants, on a target's page
LAYERS_HEIGHT = 160.0  # of the chart of layers, in CSS pixels


@dataclass(frozen=True)
class Report:
    """A target's report.

    Attributes:
        page: HTML.
        trace: for Chrome and Perfetto, JSON; None if the log does not have the build.
    """

    page: str
    trace: str | None


def target(
    reader: Reader,
    plan: Plan,
    packed: Manifest,
    lock: Lock,
    family: Sequence[Plan],
    sha256: Mapping[str, str],
) -> Report:
    """Return a target's report.

    Args:
        reader: of figures.
        plan: the target.
        packed: its manifest.
        lock: models.lock.
        family: all targets of the same source.
        sha256: of its files, by name.

    Raises:
        BuildError: its errors are not of what is packed.
    """
    built, errors = reader.read(plan), reader.errors(plan, packed)
    if built is None or errors is None:
        raise BuildError(
            f"{plan.target.name}: what was measured is not what was packed. Run {COMMAND} forget "
            f"{task_name(Measure.group, plan.target.name)}, then {COMMAND} "
            f"{task_name(REPORT, plan.target.name)}."
        )
    pieces = figures.pieces(plan, packed, errors)
    scale = charts.Scale.of(errors.values())
    build = timeline.read(reader.builder.log.path, plan)
    measured = _worst_first(pieces)
    rows = charts.rows(build, plan) if build else []
    page = _environment().get_template("target.html").render(
        target=plan.target,
        built=built,
        pieces=pieces,
        measured=measured,
        worst=measured[:WORST],
        scale=scale,
        heats=charts.heats(pieces, scale),
        # What no stack holds, e.g. the embeddings.
        singles=[(p, charts.cell(scale, p)) for p in pieces if p.error and not p.block],
        kinds=charts.kinds(pieces),
        bars=charts.bars(pieces, LAYERS_HEIGHT),
        layers_height=LAYERS_HEIGHT,
        **_beside([one for each in family if (one := reader.read(each))], built),
        timeline=build,
        lanes=charts.lanes(build) if build else None,
        rows=rows,
        outcomes=list(rows[0].counts) if rows else [],
        trace_name=trace_name(plan.target.name),
        parameters=parameters(plan, packed),
        source=lock.sources.get(plan.target.source_name),
        packed=packed,
        sha256=sha256,
    )  # fmt: skip
    return Report(page, json.dumps(timeline.trace(build), separators=(",", ":")) if build else None)


def overview(reader: Reader, plans: Iterable[Plan]) -> str:
    """Return the page on all targets."""
    families: dict[str, list[Figures]] = {}
    for plan in plans:
        if figures_of_target := reader.read(plan):
            families.setdefault(plan.target.source_name, []).append(figures_of_target)
    return _environment().get_template("overview.html").render(
        families=[(source, family, charts.plots(family)) for source, family in families.items()]
    )  # fmt: skip


def parameters(plan: Plan, packed: Manifest) -> list[tuple[str, str]]:
    """Return the settings that a target was built with, in words."""
    target = plan.target
    quantize = target.quantize
    dtypes = {dtype for dtype, *_ in packed.action.inputs.values() if dtype in FLOATING}
    settings = {"source": target.source_name, "layout": target.layout}
    settings["dtype"] = ", ".join(sorted(dtypes)) + ("" if target.dtype else " (default)")
    if not quantize:
        settings["quantize"] = "not quantized"
    else:
        options: dict[str, object] = {
            "mode": quantize.mode,
            "bits": quantize.bits,
            "group_size": quantize.group_size,
            "recipe": quantize.recipe,
        }
        settings["quantize"] = ", ".join(f"{k} = {v}" for k, v in options.items() if v is not None)
        for number, rule in enumerate(quantize.rules, 1):
            of_rule: dict[str, object] = {
                "skip": rule.skip or None,
                "mode": rule.mode,
                "bits": rule.bits,
                "group_size": rule.group_size,
                "dtype": rule.dtype,
            }
            said = [k if v is True else f"{k} = {v}" for k, v in of_rule.items() if v is not None]
            settings[f"rule {number}"] = f"{rule.match}: {', '.join(said)}"
    settings["max_shard_size"] = f"{target.max_shard_bytes:,} bytes"
    library = plan.model.model.library
    settings |= {
        {"mlx": "MLX", "sanitize": f"{library}'s sanitize"}.get(key, key): value
        for key, value in (plan.computer or {}).items()
    }
    return list(settings.items())


def _beside(variants: Sequence[Figures], built: Figures) -> dict[str, Any]:
    """Return the variants that a target's page compares it with, those of about its size.

    Pages of a thousand targets that each had a thousand rows would have a million.
    """
    by_size = sorted(variants, key=lambda one: abs(one.weight_bytes - built.weight_bytes))
    near = {one.name for one in by_size[:COMPARED]} | {built.name}
    shown = [one for one in variants if one.name in near]
    left_out = len(variants) - len(shown)
    return {"variants": shown, "left_out": left_out, "plots": charts.plots(shown)}


def _worst_first(pieces: Iterable[Piece]) -> list[Piece]:
    """Return those that were measured; an error that is no number is the worst of all."""
    measured = [piece for piece in pieces if piece.error]
    return sorted(measured, key=lambda piece: (not isnan(_relative(piece)), -_relative(piece)))


def _relative(piece: Piece) -> float:
    return piece.error.relative if piece.error else 0.0


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        command=COMMAND, page_name=page_name, index=INDEX, plot_height=charts.PLOT_HEIGHT
    )
    environment.filters.update(
        size=words.size,
        number=words.count,
        percent=words.percent,
        decibel=words.decibel,
        plural=words.plural,
        seconds=words.seconds,
        sqnr=figures.sqnr,
        scheme=figures.scheme,
        breakable=_breakable,
        when=lambda value: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value)),
        px=lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
    )
    return environment


def _breakable(name: str) -> Any:
    """Return a dotted name that a narrow page may break after its dots."""
    from markupsafe import Markup, escape

    text = str(escape(name))
    return Markup(text.replace(".", ".<wbr>"))
