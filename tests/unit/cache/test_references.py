"""Where the bytes of a blob are said to lie."""

from pathlib import Path

from cache.blobs import Blobs, Part
from cache.digest import digest
from cache.files.stamp import Stamp


def test_of_many_places_in_a_file_the_first_is_kept(tmp_path: Path) -> None:
    """Another file's is the last that was seen: the first may be about to go."""
    blobs = Blobs(tmp_path / "blobs")
    name, other = digest(b"x"), tmp_path / "other"
    checkpoint = tmp_path / "checkpoint"
    for path in (checkpoint, other):
        path.write_bytes(b"xxx")
    places = [Part(str(checkpoint), at, 1, Stamp.of(checkpoint)) for at in range(3)]
    for place in places:
        blobs.refer(name, [place])
        assert blobs.locate(name, 1) == places[:1]
    elsewhere = Part(str(other), 2, 1, Stamp.of(other))
    blobs.refer(name, [elsewhere])
    assert blobs.locate(name, 1) == [elsewhere]

    other.write_bytes(b"yyyy")
    written = elsewhere._replace(offset=0, stamp=Stamp.of(other))
    blobs.refer(name, [written])  # under another stamp it is another file
    assert blobs.reference(blobs.reference_path(name)) == [written]

    (container,) = blobs.new_containers(1, 2)
    container.write_bytes(b"xx")
    for at in range(2):  # within the store each may be moved to
        blobs.refer(name, [Part(str(container), at, 1, None)])
        assert blobs.locate(name, 1) == [Part(str(container), at, 1, None)]
