"""retrying: requests to a remote are repeated for a while; then it is given up, said once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from cache.remote import address, connect
from cache.remote.faults import Absent, Fault, NoRanges, WrongSize
from cache.remote.transport import FIRST_SECONDS, Transport

BACKOFF_SECONDS = (0.1, 5.0)

_T = TypeVar("_T")


class GivenUp(Exception):
    """The remote is not to be used any more, in this direction."""


class Retrying:
    """Makes requests to the remote at a URL. Safe in threads; opened with the first.

    Attributes:
        name: of the remote, for people.
    """

    def __init__(
        self,
        url: str,
        warn: Callable[[str], None],
        *,
        read_only: bool,
        timeout: float,
        patience: float,
    ) -> None:
        """Ask nothing yet; the arguments are those of ``Remote``.

        Raises:
            BadRemote: the URL can never work.
        """
        address.check(url)
        self.name = address.shown(url)
        self._url = url
        self._warn = warn
        self._timeout = timeout
        self._patience = patience
        self._no_reads = threading.Event()
        self._no_writes = threading.Event()
        if read_only:
            self._no_writes.set()
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._answered = False

    @property
    def readable(self) -> bool:
        """Whether anything can be had from it."""
        return not self._no_reads.is_set()

    @property
    def writable(self) -> bool:
        """Whether anything can be put there."""
        return not self._no_writes.is_set()

    def stop(self) -> None:
        """Make no more requests: what is under way ends at its next one."""
        self._no_reads.set()
        self._no_writes.set()

    def _opened(self) -> Transport:
        with self._lock:
            if self._transport is None:
                self._transport = connect.connect(
                    self._url,
                    timeout=self._timeout,
                    create=self.writable,
                )
            return self._transport

    def attempt(
        self,
        what: str,
        call: Callable[[Transport], _T],
        *,
        writes: bool = False,
        asks: bool = True,
    ) -> _T:
        """Return what ``call`` does, repeated while it fails for a reason that may pass.

        Args:
            what: it does, for people.
            call: does it.
            writes: whether it writes.
            asks: whether the server has answered if it succeeds.

        Raises:
            GivenUp: it went on failing, or something else did before.
        """
        failing_since = 0.0
        delay, longest = BACKOFF_SECONDS
        over = self._no_writes if writes else self._no_reads
        while not over.is_set():
            try:
                result = call(self._opened())
            except (Absent, WrongSize, NoRanges):
                self._note_answer(asks)
                raise
            except Fault as fault:
                now = time.monotonic()
                failing_since = failing_since or now - fault.waited
                self._note_answer(fault.answered)
                patience = self._patience if self._answered else min(self._patience, FIRST_SECONDS)
                if not fault.transient or now + delay - failing_since > patience:
                    self._give_up(fault, what, now - failing_since, writes=writes)
            else:
                self._note_answer(asks)
                return result
            # Jitter, so that machines that failed together do not come back together.
            over.wait(random.uniform(delay / 2, delay))
            delay = min(2 * delay, longest)
        raise GivenUp

    def _note_answer(self, answered: bool) -> None:
        if answered and self._transport:
            self._answered = self._transport.answered = True

    def _give_up(self, fault: Fault, what: str, seconds: float, *, writes: bool) -> NoReturn:
        """Report ``fault``, unless that was done. A write that is refused leaves reading as it is.

        Raises:
            GivenUp: always.
        """
        only_writing = writes and not fault.transient
        with self._lock:
            first = not (self._no_writes if only_writing else self._no_reads).is_set()
            self._no_writes.set()
            if not only_writing:
                self._no_reads.set()
        if first:
            given_up = "is only read from now on" if only_writing else "is not used from now on"
            tried = f", for {seconds:.0f} s" if seconds >= 1 else ""
            self._warn(f"remote {self.name} {given_up}: {what}: {fault.cause}{tried}. {fault.mend}")
        raise GivenUp
