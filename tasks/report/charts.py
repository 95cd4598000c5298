"""charts: works out the geometry of a report's charts; templates draw them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite, nan
from typing import NamedTuple

from msgspec import Struct, structs

from tasks.core import text as words
from tasks.core.task_names import PACK
from tasks.execution import log
from tasks.execution.log import Entry
from tasks.planning.plan import Plan
from tasks.report import timeline
from tasks.report.figures import KINDS, Error, Figures, Piece, together
from tasks.report.timeline import Timeline
from tasks.stages import registry

COLORS = 9  # of the heat map's scale
STEP_COLORS = 7  # of stages and packing, in their order
OTHERS = "others"
MIN_SPAN_DB = 3.0  # a scale narrower than this would show noise as if it were something
STRIP_LAYERS = 32  # what of a heat map a phone can show side by side
FEWEST_BARS = 12  # that share the width
PLOT_WIDTH, PLOT_HEIGHT = 900, 260  # of size against error on a wide page, CSS pixels
LINE, LETTER = 15, 6.6  # how high a label is, and how wide its letters, CSS pixels
WIDTH = 1000.0  # of drawings, which are stretched to fit


class Scale(NamedTuple):
    """A colour scale over SQNR, even steps from the best to the worst.

    Attributes:
        best: dB.
        worst: dB.
    """

    best: float
    worst: float

    @classmethod
    def of(cls, errors: Iterable[Error]) -> Scale:
        """Return the scale that all errors fit on."""
        values = [e.sqnr for e in errors if isfinite(e.sqnr)]
        if not values:
            return cls(MIN_SPAN_DB, 0.0)
        best, worst = max(values), min(values)
        wide = max(0.0, MIN_SPAN_DB - (best - worst)) / 2
        return cls(best + wide, worst - wide)

    def color(self, value: float) -> str:
        """Return the class of a value's colour; 0 is the best."""
        if value == inf:
            return "h0"
        if not isfinite(value):
            return "hx"
        part = (self.best - value) / (self.best - self.worst)
        return f"h{min(COLORS - 1, max(0, int(COLORS * part)))}"

    @property
    def edges(self) -> list[tuple[float, float]]:
        """Where each colour begins, and the last one ends: dB, and relative error."""
        step = (self.best - self.worst) / COLORS
        values = [self.best - step * index for index in range(COLORS + 1)]
        return [(value, 10 ** (-value / 20)) for value in values]


class Cell(NamedTuple):
    """One weight on a heat map."""

    color: str
    title: str
    text: str


class Strip(NamedTuple):
    """Neighbouring layers of a heat map.

    Attributes:
        heads: what stands above the columns: layer's number, columns that it spans.
        rows: a module and its cells; None where there is nothing that is quantized.
    """

    heads: list[tuple[int, int]]
    rows: list[tuple[str, list[Cell | None]]]


class Heat(NamedTuple):
    """A heat map of one stack of layers."""

    stack: str
    layers: int
    modules: int
    strips: list[Strip]


def cell(scale: Scale, piece: Piece) -> Cell | None:
    """Return a weight's cell, or None if it is not quantized."""
    if piece.error is None:
        return None
    part, value = piece.error.relative, piece.error.sqnr
    title = f"{piece.path}: {words.percent(part)}, {words.decibel(value)}"
    text = f"{100 * part:#.3g}".rstrip(".") if isfinite(part) else "!"
    return Cell(scale.color(value), title, text)


def heats(pieces: Sequence[Piece], scale: Scale) -> list[Heat]:
    """Return the heat maps of all stacks of layers."""
    stacks: dict[str, dict[int, dict[str, Piece]]] = defaultdict(lambda: defaultdict(dict))
    for piece in pieces:
        if piece.block and piece.error:
            stack, number = piece.block
            stacks[stack][number][piece.module] = piece
    return [_heat(stack, layers, scale) for stack, layers in stacks.items()]


def _heat(stack: str, layers: dict[int, dict[str, Piece]], scale: Scale) -> Heat:
    modules = list(dict.fromkeys(module for layer in layers.values() for module in layer))
    numbers = sorted(layers)
    count = -(-len(numbers) // STRIP_LAYERS)
    length = -(-len(numbers) // count)
    strips = []
    for start in range(0, len(numbers), length):
        shown = numbers[start : start + length]
        every = 1 if len(shown) <= 12 else 4
        heads = [(shown[at], min(every, len(shown) - at)) for at in range(0, len(shown), every)]
        rows = [
            (
                module,
                [
                    cell(scale, layers[number][module]) if module in layers[number] else None
                    for number in shown
                ],
            )
            for module in modules
        ]
        strips.append(Strip(heads, rows))
    return Heat(stack, len(numbers), len(modules), strips)


class Kind(NamedTuple):
    """All weights of one kind."""

    name: str
    weights: int
    nbytes: int
    share: float
    bits: float
    error: float | None


def kinds(pieces: Sequence[Piece]) -> list[Kind]:
    """Return sizes by kind, the largest first."""
    total = sum(piece.nbytes for piece in pieces)
    kinds = []
    for name in KINDS:
        members = [piece for piece in pieces if piece.kind == name]
        if not members:
            continue
        weights, nbytes = sum(p.weights for p in members), sum(p.nbytes for p in members)
        errors = [p.error for p in members if p.error]
        kinds.append(
            Kind(name, weights, nbytes, nbytes / total if total else 0,
                 8 * nbytes / weights if weights else nan, together(errors) if errors else None)
        )  # fmt: skip
    return sorted(kinds, key=lambda kind: -kind.nbytes)


class Bar(NamedTuple):
    """A layer: its parts by kind, from the bottom."""

    layer: str
    nbytes: int
    bits: float
    error: float | None
    boxes: list[tuple[str, float, float, float, float, str]]  # kind, x, y, width, height, title


def bars(pieces: Sequence[Piece], height: float) -> list[Bar]:
    """Return a column for each layer, in their order; those of no stack have no boxes."""
    layers: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        layers[piece.layer].append(piece)
    sizes = {layer: sum(p.nbytes for p in members) for layer, members in layers.items()}
    stacked = [layer for layer, members in layers.items() if members[0].block]
    most = max((sizes[layer] for layer in stacked), default=0)
    step = WIDTH / max(FEWEST_BARS, len(stacked))
    bars = []
    for layer, members in layers.items():
        boxes = []
        y = height
        if layer in stacked and most:
            by_kind: dict[str, int] = defaultdict(int)
            for piece in members:
                by_kind[piece.kind] += piece.nbytes
            for kind in KINDS:
                if by_kind[kind]:
                    tall = height * by_kind[kind] / most
                    y -= tall
                    title = f"{layer} {kind}: {words.size(by_kind[kind])}"
                    x = step * stacked.index(layer)
                    boxes.append((kind, x, y, step * 0.86, tall, title))
        weights = sum(p.weights for p in members)
        errors = [p.error for p in members if p.error]
        bits = 8 * sizes[layer] / weights if weights else nan
        bars.append(Bar(layer, sizes[layer], bits, together(errors) if errors else None, boxes))
    return bars


class Point(NamedTuple):
    """A target in a plot, in parts of its width and height.

    Attributes:
        number: its row in the table.
        figures: the target's.
        text: what is plotted of it, in words.
        x: from the left.
        y: from the top.
        left: whether its label goes to the left of it.
        drop: lines by which the label is moved down.
        named: whether there is room for more than its number.
    """

    number: int
    figures: Figures
    text: str
    x: float
    y: float
    left: bool
    drop: int
    named: bool


class Box(NamedTuple):
    """What something covers of the plot as it is on a wide page, CSS pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Tell whether the two have anything in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class Axis(NamedTuple):
    """What is plotted against size.

    Attributes:
        title: what it is.
        short: the same in a word or two.
        value: of a target; None where it is not known.
        tick: a value in words, next to the axis.
        text: a value in words, of a target.
    """

    title: str
    short: str
    value: Callable[[Figures], float | None]
    tick: Callable[[float], str]
    text: Callable[[float], str]


AXES = (
    Axis(
        "relative error of the quantized weights",
        "error",
        lambda one: one.relative,
        lambda value: f"{100 * value:g} %",
        words.percent,
    ),
    Axis(
        "mean KL divergence from the model before quantizing, nats",
        "divergence",
        lambda one: one.quality.mean if one.quality else None,
        lambda value: f"{value:g}",
        lambda value: f"{value:.3g} nats",
    ),
)


class Plot(NamedTuple):
    """Size against something. Ticks are texts by their place."""

    axis: Axis
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def plots(figures: Sequence[Figures]) -> list[Plot]:
    """Return the plots of targets, but those that would have none to compare."""
    return [plot for axis in AXES if (plot := _plot(figures, axis))]


def _plot(figures: Sequence[Figures], axis: Axis) -> Plot | None:
    measured = [
        (number, one, value)
        for number, one in enumerate(figures, 1)
        if (value := axis.value(one)) is not None and isfinite(value)
    ]
    if len(measured) < 2:
        return None
    x_step, x_most = _ticks(max(one.nbytes for _, one, _ in measured))
    y_step, y_most = _ticks(max(part for *_, part in measured) or 1.0)
    places = [
        (number, one, axis.text(part), one.nbytes / x_most, 1 - part / y_most)
        for number, one, part in measured
    ]
    taken = [_box(x, y, -6, 6, 0) for *_, x, y in places]
    return Plot(
        axis,
        [_labelled(taken, *place) for place in places],
        [
            (x_step * i / x_most, words.size(x_step * i) if i else "0")
            for i in range(round(x_most / x_step) + 1)
        ],
        [
            (1 - y_step * i / y_most, axis.tick(y_step * i))
            for i in range(round(y_most / y_step) + 1)
        ],
    )


def _labelled(
    taken: list[Box], number: int, figures: Figures, text: str, x: float, y: float
) -> Point:
    """Return a point with the first place for its label that is free, which is taken then."""
    for named in (True, False):
        length = 18 + LETTER * len(f"{number} {figures.name}" if named else str(number))
        for drop in (0, 1, -1, 2, -2):
            for left in (x > 0.5, x <= 0.5):
                start, stop = (-length, -6.0) if left else (6.0, length)
                box = _box(x, y, start, stop, drop)
                inside = box.left >= 0 and box.right <= PLOT_WIDTH
                if inside and not any(map(box.meets, taken)):
                    taken.append(box)
                    return Point(number, figures, text, x, y, left, drop, named)
    return Point(number, figures, text, x, y, False, 0, False)


def _box(x: float, y: float, start: float, stop: float, drop: int) -> Box:
    across, down = PLOT_WIDTH * x, PLOT_HEIGHT * y + LINE * drop
    return Box(across + start, across + stop, down - LINE / 2, down + LINE / 2)


def _ticks(most: float) -> tuple[float, float]:
    """Return a round step and a multiple of it not below ``most``: four steps at the most."""
    step = 10.0**-12
    while True:
        for round_ in (1, 2, 2.5, 5):
            if 4 * round_ * step >= most * 1.02:
                return round_ * step, round_ * step * -(-most * 1.02 // (round_ * step))
        step *= 10


class _OfStage(Struct, frozen=True):
    stage: str

    @property
    def color(self) -> str:
        """Its class in the style sheet."""
        return _color(self.stage)


class Span(_OfStage, frozen=True):
    """One task, or several that are too short to tell apart, on a thread's lane."""

    hit: bool
    critical: bool
    x: float
    width: float
    title: str
    tasks: int


class Lanes(NamedTuple):
    """A build's threads.

    Attributes:
        lanes: the spans of each.
        ticks: times, by their place in parts of the width.
    """

    lanes: list[list[Span]]
    ticks: list[tuple[float, str]]


def lanes(build: Timeline) -> Lanes:
    """Return the lanes of a build. Whatever else was done meanwhile is stage ``others``."""
    start, seconds = build.start, max(build.seconds, 1e-6)
    by_thread = []
    critical = {id(entry) for entry in build.critical}
    for thread in build.threads:
        spans: list[Span] = []
        for entry in sorted((e for e in build.entries if e.lane == thread), key=lambda e: e.start):
            if timeline.end(entry) < start:
                continue
            span = _span(build, entry, id(entry) in critical, start, seconds)
            before = spans[-1] if spans else None
            if before and _is_one(before, span):
                width = max(before.width, span.x + span.width - before.x)
                count = before.tasks + 1
                title = f"{span.stage}: {count} tasks"
                span = structs.replace(before, width=width, title=title, tasks=count)
                spans.pop()
            spans.append(span)
        if spans:
            by_thread.append(spans)
    step, _ = _ticks(seconds)
    ticks = [
        (step * i / seconds, words.seconds(step * i) if i else "0")
        for i in range(int(seconds / step) + 1)
    ]
    return Lanes(by_thread, ticks)


def _is_one(before: Span, span: Span) -> bool:
    """Tell whether a span is drawn as one with that before it."""
    if (before.stage, before.hit, before.critical) != (span.stage, span.hit, span.critical):
        return False
    gap = span.x - before.x - before.width
    if span.stage == OTHERS:
        return gap < 1
    return gap < 0.5 and span.width < 1 and (before.width < 1 or before.tasks > 1)


def _span(build: Timeline, entry: Entry, critical: bool, start: float, seconds: float) -> Span:
    stop = timeline.end(entry) - start
    begin = max(0.0, entry.start - start)
    x, width = WIDTH * begin / seconds, WIDTH * (stop - begin) / seconds
    stage = entry.group if build.builds(entry) else OTHERS
    where = f" on {entry.machine}" if entry.machine else ""
    title = f"{entry.task}{where}: {entry.outcome}, {words.seconds(entry.seconds)}. {entry.why}"
    return Span(stage, entry.outcome in ("reused", "fetched"), critical, x, width, title, 1)


class Row(_OfStage, frozen=True):
    """The outcomes of a stage's tasks, the seconds they took, and the bytes they moved."""

    counts: dict[str, int]  # by outcome
    seconds: float
    read: int
    written: int


def rows(build: Timeline, plan: Plan) -> list[Row]:
    """Return the outcomes of each stage's tasks in a build of a target."""
    rows = []
    stages = [stage for stage in registry.PIPELINE if plan.nodes(stage.name)]
    tasks = {stage.group: len(plan.nodes(stage.name)) for stage in stages} | {PACK: 1}
    for stage, total in tasks.items():
        entries = [entry for entry in build.mine if entry.group == stage]
        counts = {o: sum(e.outcome == o for e in entries) for o in log.OUTCOMES}
        counts["up to date"] = total - len({entry.task for entry in entries})
        read, written = sum(e.bytes_read for e in entries), sum(e.bytes_written for e in entries)
        seconds = sum(e.seconds for e in entries)
        rows.append(Row(stage, counts, seconds, read, written))
    seen = {outcome for row in rows for outcome, count in row.counts.items() if count}
    return [
        structs.replace(row, counts={o: count for o, count in row.counts.items() if o in seen})
        for row in rows
    ]


def _color(group: str) -> str:
    """Return the style sheet's class of a group of tasks: those that build, by their place."""
    building = registry.building()
    return f"step{building.index(group) % STEP_COLORS}" if group in building else OTHERS
