"""process: how a command ends when it is interrupted, or when nobody reads what it prints."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NoReturn

INTERRUPTED = 130  # as shells report SIGINT
UNREAD = 128 + signal.SIGPIPE  # as shells report it


@contextmanager
def piped() -> Iterator[None]:
    """End without a word, as other tools do, when nobody reads any more what is printed.

    The same when interrupted; with a word, when it cannot be written.
    """
    _reopen()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # arrows, where the locale has none
    try:
        yield
        sys.stdout.flush()  # what is left to Python's own end is complained of
    except BrokenPipeError:
        os._exit(UNREAD)
    except KeyboardInterrupt:  # of what does nothing that has to be said, or not yet
        os._exit(INTERRUPTED)
    except OSError as error:
        if printable():
            raise
        print(f"ERROR: what is to be printed cannot be: {error}", file=sys.stderr, flush=True)
        os._exit(UNREAD)


def _reopen() -> None:
    """Put something in place of streams that were closed before the start (``>&-``).

    Else the next file to be opened would have the number that C libraries and other processes
    print to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def printable() -> bool:
    """Tell whether anything can be printed, by an empty line."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """End the process at once, and without a traceback, when it is interrupted.

    Args:
        kept: what is not lost, for people.
    """
    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    # It may be ignored, as by nohup.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}", file=sys.stderr, flush=True)
        # Threads may still be deep in a computation, or in an upload: do not wait for them.
        os._exit(INTERRUPTED)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> NoReturn:
    # Once is enough: what follows is short, and leaves the terminal and the database in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
