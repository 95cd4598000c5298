"""tests of manifest_files: what is held is what lies there, and not too much."""

from pathlib import Path

import pytest

from cache.records.manifests import Action, Manifest, ManifestError, Tensor
from tasks.execution import manifest_files
from tasks.execution.manifest_files import ManifestFiles


def manifest(digest: str, count: int = 1) -> Manifest:
    tensors = {f"w{number}": Tensor("float16", (2, 3), digest * 32) for number in range(count)}
    inputs = {name: tensor.record for name, tensor in tensors.items()}
    return Manifest(Action("cast", 1, {"dtype": "float16"}, inputs), tensors)


def test_what_is_read_is_what_lies_there(tmp_path: Path) -> None:
    files, path = ManifestFiles(), tmp_path / "norm.json"
    first, other = manifest("a"), manifest("b")
    with pytest.raises(FileNotFoundError):
        files.read(str(path))
    files.write(path, first)
    assert files.read(str(path)) is first  # and not decoded
    ManifestFiles().write(path, other)  # by somebody else
    assert files.read(str(path)) == other
    path.write_bytes(other.to_bytes()[:-1])
    with pytest.raises(ManifestError):
        files.read(str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.read(str(path))


def test_the_oldest_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "MOST_TENSORS", 5)
    files, made = ManifestFiles(), [manifest(digit, 2) for digit in "abc"]
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, each in zip(paths, made, strict=True):
        files.write(path, each)
    files.write(paths[2], made[2])  # is counted once
    held = [files.read(str(path)) is each for path, each in zip(paths, made, strict=True)]
    assert held == [False, True, True]
    assert files.read(str(paths[0])) == made[0]
    files.write(tmp_path / "large.json", manifest("d", 6))
    assert files.read(str(paths[2])) is not made[2]
