"""live: lines at the bottom of a terminal, drawn anew a few times a second by a thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, Group

DELAY_SECONDS = 0.3  # a run that is shorter is not worth lines, nor importing rich
REFRESH_SECONDS = 0.2

Line = tuple[str, str]  # the text, and rich's style for it


class Live:
    """Lines below all that is written, until it is stopped. Safe in threads.

    While they are shown, what others print on the terminal is put above them.
    """

    def __init__(self, stream: IO[str], lines: Callable[[int, int], list[Line]]) -> None:
        """Show nothing yet.

        Args:
            stream: a terminal.
            lines: what to show, given how many columns and rows there are for it.
        """
        self._stream = stream
        self._lines = lines
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._console: Console | None = None
        self._shown: list[int] = []  # widths of the lines on the terminal
        self._columns = 0  # of the terminal, when they were drawn

    def start(self) -> None:
        """Show the lines before long."""
        self._thread = threading.Thread(target=self._show, name="live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the lines away, and leave the terminal as it was."""
        self._over.set()
        if self._thread:
            self._thread.join()

    def write(self, text: str) -> None:
        """Write whole lines of text as they are, above the lines that are shown."""
        with self._lock:
            if self._console is None:
                self._stream.write(text)
                self._stream.flush()
                return
            from rich.text import Text

            self._console.print(Text(text.removesuffix("\n")), soft_wrap=True)

    def _show(self) -> None:
        if self._over.wait(DELAY_SECONDS):
            return
        import rich.live
        from rich.console import Console

        console = Console(file=self._stream)
        live = rich.live.Live(
            get_renderable=lambda: self._draw(console),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        try:
            with self._lock:
                live.start(refresh=True)
                self._console = console
            while not self._over.wait(REFRESH_SECONDS):
                live.refresh()
        finally:
            with self._lock:
                live.stop()
                self._console = None

    def _draw(self, console: Console) -> Group:
        from rich.console import Group
        from rich.text import Text

        columns, rows = console.size
        self._unfold(console, columns)
        lines = [
            Text(text, style, no_wrap=True, overflow="crop")
            for text, style in self._lines(columns, rows)
        ]
        self._shown = [line.cell_len for line in lines]
        return Group(*lines)

    def _unfold(self, console: Console, columns: int) -> None:
        """Erase the rows that lines fold into when the terminal becomes narrower."""
        from rich.control import Control
        from rich.segment import ControlType

        if columns < self._columns:
            for _ in range(sum(-(-width // columns) - 1 for width in self._shown if width)):
                console.control(Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)))
        self._columns = columns
