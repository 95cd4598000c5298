"""kinds: records that others keep in a cache folder, so that they are looked after with its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class RecordKind(NamedTuple):
    """A kind of record that the cache does not know itself.

    Each is a folder, ``FOLDER/KEY``, which goes as a whole; the key is 64 hexadecimal digits.

    Attributes:
        name: the kind's.
        folder: below the cache's, in which the records lie.
        check: returns what is wrong with a record, given its folder; nothing, if it is whole.
            Raises ``FileNotFoundError`` if the record is not there, or not yet.
    """

    name: str
    folder: str
    check: Callable[[Path], str]
