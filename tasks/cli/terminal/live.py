"""live: lines at the bottom of a terminal, drawn anew a few times a second by a thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

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
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._redirected: dict[str, _Lines] = {}
        self._thread: threading.Thread | None = None
        self._console: Console | None = None
        self._shown: list[int] = []  # widths of the lines on the terminal
        self._columns = 0  # of the terminal, when they were drawn

    def start(self) -> None:
        """Put above the lines to come what others print on the terminal.

        Before there are threads: doit's set sys.stdout and sys.stderr for each task, and set them
        back to what they found.
        """
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                self._redirected[name] = _Lines(stream, self.write)
                setattr(sys, name, self._redirected[name])

    def show(self) -> None:
        """Show the lines before long."""
        self._thread = threading.Thread(target=self._show, name="live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the lines away, and leave the terminal as it was."""
        self._over.set()
        if self._thread:
            self._thread.join()
        for name, stream in self._redirected.items():
            setattr(sys, name, stream.instead_of)
            stream.end()

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
        # rich redirects what others print too, but without a lock around what it draws.
        live = rich.live.Live(
            get_renderable=lambda: self._draw(console),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with self._lock:
                live.start(refresh=True)
                self._console = console
            while not self._over.wait(REFRESH_SECONDS):
                with self._lock:
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
        self._shown = [min(line.cell_len, columns) for line in lines]
        return Group(*lines)

    def _unfold(self, console: Console, columns: int) -> None:
        """Erase the rows that lines fold into when the terminal becomes narrower."""
        from rich.control import Control
        from rich.segment import ControlType

        if columns < self._columns:
            for _ in range(sum(-(-width // columns) - 1 for width in self._shown if width)):
                console.control(Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)))
        self._columns = columns


class _Lines:
    """A text stream that is written in whole lines, those of different threads apart."""

    def __init__(self, instead_of: IO[str], write: Callable[[str], None]) -> None:
        self.instead_of = instead_of
        self._write = write
        self._begun: dict[int, str] = {}  # lines, by thread

    def __getattr__(self, name: str) -> Any:
        return getattr(self.instead_of, name)

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        whole, newline, rest = (self._begun.pop(thread, "") + text).rpartition("\n")
        if rest:
            self._begun[thread] = rest
        if newline:
            self._write(whole + newline)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def end(self) -> None:
        """Write the lines that nobody ended."""
        while self._begun:
            self._write(f"{self._begun.popitem()[1]}\n")
