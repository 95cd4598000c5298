"""rounds: a thread that does the same work once more whenever there may be some."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Rounds:
    """Work in a thread of its own, which begins with the first call for it.

    Args:
        work: what is done; it raises nothing.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._name = name
        self._changed = threading.Condition()
        self._called = self._working = self._over = False
        self._thread: threading.Thread | None = None

    def call(self) -> None:
        """Have a round begin after this, and return at once."""
        with self._changed:
            self._called = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until no round is called for or under way."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._called or self._working))

    def end(self) -> None:
        """Wait until all rounds are done, and end the thread."""
        if self._thread:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._called or self._over)
                if not self._called:
                    return
                self._called, self._working = False, True
            self._work()
