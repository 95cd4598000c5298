"""picture: draws README.md's pictures: docs/run.svg of docs/run.txt, docs/beside.svg of the record.

    python benchmarks/picture.py            # draw them
    python benchmarks/picture.py --record   # run the commands first, and write docs/run.txt anew

The text is that of a real run on a terminal, of the example checkpoint, as it stands in the end.
The record is the table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from measure import ROOT
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

sys.path.insert(0, str(ROOT))

from tasks.checkpoints import example

RECORD, FIGURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "beside.svg"
TEXT, PICTURE = ROOT / "docs" / "run.txt", ROOT / "docs" / "run.svg"
COLUMNS, LINES = 86, 40
# Nothing is fetched to look at it.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
MODELS = """\
[models.llama]
source = "checkpoints/llama"
matrix = { bits = [4, 8] }
"""
COMMANDS = (
    ("cat models.toml", "cat models.toml"),
    ("mlx-make", "exec $PYTHON -m mlx_make"),
    ("mlx-make", "exec $PYTHON -m mlx_make"),
    ("sed -i 's/8/6/' models.toml", "sed -i 's/8/6/' models.toml"),
    ("mlx-make", "exec $PYTHON -m mlx_make"),
)

# The record's scenarios, and what they are called in the figure.
SCENARIOS = {
    "cold, safetensors → 4 bit": "to 4 bits",
    "cold, Meta, 2 shards → float16 → 4 bit": "Meta’s shards to 4 bits",
    "cold, 3, 4, 6 and 8 bit": "to 3, 4, 6 and 8 bits",
    "4 bit is built, 8 bit is asked for": "to 8 bits, after 4",
}
PANELS = (("time, s", 1, "{:.1f}"), ("peak memory, MB", 3, "{:,.0f}"))  # column of the table
WIDTH, HEAD, ROW, BAR, LABEL, PANEL = 860, 34, 46, 15, 190, 250


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="run the commands")
    if parser.parse_args().record:
        TEXT.write_text(record(), encoding="utf-8")
    PICTURE.write_text(drawn(TEXT.read_text("utf-8")), encoding="utf-8")
    FIGURE.write_text(figure(RECORD.read_text("utf-8")), encoding="utf-8")


def record() -> str:
    """Return what the commands show on a terminal, each under its prompt."""
    shown = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        example.make(folder / "checkpoints" / "llama")
        (folder / "models.toml").write_text(MODELS, encoding="utf-8")
        for typed, command in COMMANDS:
            shown += [f"$ {typed}", *_on_a_terminal(command, folder)]
    return "\n".join(shown) + "\n"


def _on_a_terminal(command: str, folder: Path) -> list[str]:
    """Run a command in a folder; return the lines that stand on the terminal in the end."""
    import pyte

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        more = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        os.execve("/bin/sh", ["sh", "-c", command], {**os.environ, **more, **size})
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    try:
        while data := os.read(terminal, 1 << 16):
            stream.feed(data)
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    if status:
        raise SystemExit("\n".join([f"{command} ended with {status}", *lines]))
    return lines


def drawn(text: str) -> str:
    """Return the picture of a text."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        for line in text.splitlines():
            bold = line.startswith("$ ")
            console.print(Text(line, style="bold" if bold else ""), soft_wrap=True)
        return console.export_svg(title="mlx-make", unique_id="run", code_format=FORMAT)


def figure(page: str) -> str:
    """Return the record's bars: mlx_lm.convert's above, mlx-make's below."""
    rows = [_cells(line) for line in page.splitlines() if line.startswith("|")]
    pairs = {row[0]: (row[1:], below[1:]) for row, below in pairwise(rows)}
    height = HEAD + ROW * len(SCENARIOS) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1f2328">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff" stroke="#d0d7de"/>',
    ]
    for number, (title, column, form) in enumerate(PANELS):
        left = LABEL + number * (PANEL + 80)
        parts.append(f'<text x="{left}" y="22" font-weight="600">{title}</text>')
        values = {
            name: [float(side[column].split()[0]) for side in pairs[name]] for name in SCENARIOS
        }
        largest = max(max(both) for both in values.values())
        for row, both in enumerate(values.values()):
            for side, (value, colour) in enumerate(zip(both, ("#b1bac4", "#0969da"), strict=True)):
                top, width = HEAD + row * ROW + side * (BAR + 2), PANEL * value / largest
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{BAR}" '
                    f'fill="{colour}"/><text x="{left + width + 6:.1f}" y="{top + 12}">'
                    f"{form.format(value)}</text>"
                )
    for row, label in enumerate(SCENARIOS.values()):
        y = HEAD + row * ROW + 21
        parts.append(f'<text x="{LABEL - 12}" y="{y}" text-anchor="end">{label}</text>')
    for x, colour, label in ((LABEL, "#b1bac4", "mlx_lm.convert"), (330, "#0969da", "mlx-make")):
        parts.append(
            f'<rect x="{x}" y="{height - 26}" width="12" height="12" fill="{colour}"/>'
            f'<text x="{x + 18}" y="{height - 15}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


if __name__ == "__main__":
    main()
