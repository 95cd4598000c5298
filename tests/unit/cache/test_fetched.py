"""Bytes that come from elsewhere: cut off, decayed, and dropped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache import fetched
from cache.blobs import Blobs
from cache.digest import digest
from cache.errors import BlobLost, FileChanged, WrongLength
from cache.fetched import FetchedBlobs

KEY = "0123456789abcdef" * 2
DATA = bytes(range(256)) * 40


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FetchedBlobs:
    monkeypatch.setattr(fetched, "PIECE_BYTES", 1000)
    return FetchedBlobs(Blobs(tmp_path / "blobs"))


class Cut(Exception):
    pass


class Elsewhere:
    """What reads from ``DATA``, and notes from where; it is cut off at a byte."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut = cut
        self.begun: list[int] = []

    def __call__(self, start: int) -> Iterator[bytes]:
        self.begun.append(start)
        end = len(DATA) if self.cut is None else self.cut
        for at in range(start, end, 700):
            yield DATA[at : min(at + 700, end)]
        if self.cut is not None:
            raise Cut


def test_what_was_cut_off_goes_on_at_the_last_whole_piece(blobs: FetchedBlobs) -> None:
    with pytest.raises(Cut):
        blobs.fetch(KEY, len(DATA), Elsewhere(4567))
    elsewhere = Elsewhere()
    found = blobs.fetch(KEY, len(DATA), elsewhere)
    assert found == digest(DATA)
    assert elsewhere.begun == [4000]
    assert b"".join(blobs.blobs.chunks(blobs.blobs.locate(found, len(DATA)))) == DATA
    assert blobs.fetch(KEY, len(DATA), elsewhere) == found  # all of it is there
    assert elsewhere.begun == [4000]


def test_what_decayed_is_read_again(blobs: FetchedBlobs) -> None:
    """As after a power cut: the file is as long as it was, and holds something else."""
    with pytest.raises(Cut):
        blobs.fetch(KEY, len(DATA), Elsewhere(8000))
    path = Path(blobs.part(KEY, 0).path)
    path.write_bytes(path.read_bytes()[:2500] + bytes(5500))
    elsewhere = Elsewhere()
    assert blobs.fetch(KEY, len(DATA), elsewhere) == digest(DATA)
    assert elsewhere.begun == [2000]
    for left in blobs.blobs.container(KEY).parent.iterdir():
        if left.name != KEY:
            left.unlink()
    assert blobs.fetch(KEY, len(DATA), elsewhere) == digest(DATA)  # nobody vouches for it now
    assert elsewhere.begun == [2000, 0]


def test_another_length_than_promised(blobs: FetchedBlobs) -> None:
    for length in (len(DATA) - 1, len(DATA) + 1):
        with pytest.raises(WrongLength, match=f"{len(DATA):,} bytes came, not {length:,}"):
            blobs.fetch(KEY, length, Elsewhere())
    assert blobs.fetch(KEY, len(DATA), Elsewhere()) == digest(DATA)


def test_dropped_bytes_are_lost_unless_they_lie_elsewhere(blobs: FetchedBlobs) -> None:
    found = blobs.fetch(KEY, len(DATA), Elsewhere())
    blobs.drop(KEY, found)
    assert list(blobs.blobs.container(KEY).parent.iterdir()) == []
    with pytest.raises(BlobLost):
        blobs.blobs.locate(found, len(DATA))
    blobs.fetch(KEY, len(DATA), Elsewhere())
    (weights,) = blobs.blobs.new_containers(1, len(DATA))
    weights.write_bytes(b"head" + DATA)
    place = fetched.Part(str(weights), 4, len(DATA), None)
    blobs.blobs.refer(found, [place])
    blobs.drop(KEY, found)
    assert blobs.blobs.locate(found, len(DATA)) == [place]


def test_what_another_process_drops_while_it_is_read(blobs: FetchedBlobs) -> None:
    """It has changed, for who found it before: who reads it looks for it anew."""
    found = blobs.fetch(KEY, len(DATA), Elsewhere())
    parts = blobs.blobs.locate(found, len(DATA))
    blobs.drop(KEY, found)
    with pytest.raises(FileChanged):
        blobs.blobs.read_into(parts, memoryview(bytearray(len(DATA))))
    with pytest.raises(FileChanged):
        [*blobs.blobs.chunks(parts)]
    with pytest.raises(BlobLost):
        blobs.blobs.locate(found, len(DATA))
