"""What lies beside a checkpoint's weights."""

from pathlib import Path
from types import SimpleNamespace

from tasks.layouts import leftovers


def test_weights_are_found_however_deep(tmp_path: Path) -> None:
    """In folders, in one that is a link, and on a hub; not what a client hides there."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("model.safetensors", "a/model.safetensors", "a/b/model-2.safetensors"):
        (tmp_path / "here" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / name).touch()
    (tmp_path / "here" / ".cache").mkdir()
    (tmp_path / "here" / ".cache" / "model.safetensors").touch()
    (tmp_path / "here" / "a" / "adapters.safetensors").touch()
    (tmp_path / "elsewhere" / "model.safetensors").touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    hashes = dict.fromkeys(("model.safetensors", "c/d/model.safetensors", "c/x.json"))
    checkpoint = SimpleNamespace(folder=tmp_path / "here", source=SimpleNamespace(hashes=hashes))
    assert leftovers.weights_in_folders(checkpoint) == [
        "a/b/model-2.safetensors",
        "a/model.safetensors",
        "c/d/model.safetensors",
        "link/model.safetensors",
    ]
