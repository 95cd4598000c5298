"""Bytes that are read are those of their digests: what decayed or changed is never built of."""

import os
from pathlib import Path

import pytest

from support import checkpoints, projects
from support.inside import doit
from support.projects import Project, Stored


def flip(path: Path, offset: int) -> None:
    """Change one bit in place, and leave the file's size, time and inode as they were."""
    stat = path.stat()
    projects.toggle(path, offset)
    path.chmod(stat.st_mode)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("kind", ["meta", "huggingface"])
@pytest.mark.parametrize("keep", [["cast"], ["unshard", "cast"]])
def test_a_flipped_bit_in_each_kept_blob(kind: str, keep: list[str], tmp_path: Path) -> None:
    """At the next bits: the blob is made again, and the model is that of a build from nothing."""
    project = projects.create(tmp_path, kind, dtype="float16", quantize={"bits": 4})
    project.keep = keep
    project.configure()
    doit(project.folder)
    blobs = [path for path in (project.store / "blobs").glob("??/*") if path.suffix != ".parts"]
    assert len(blobs) > 10
    for blob in blobs:
        flip(blob, blob.stat().st_size // 2)
    project.configure(quantize={"bits": 8})
    done = doit(project.folder)
    assert project.built() == project.anew()
    assert any("its bytes are others" in entry["why"] for entry in done.entries) or any(
        "blob lost" in entry["why"] for entry in done.entries
    )


def refusal(name: str, has_ctime: bool) -> str:
    """What is said of a tensor that is another under the same size, time and inode.

    By its file's ctime it is found before any byte of it is used; without, when it is read.
    """
    return f"tensor {name} has other contents" if has_ctime else "comes out differently now"


def test_what_a_library_computes_is_made_of_the_right_bytes(
    has_ctime: bool, tmp_path: Path
) -> None:
    """mlx-lm's own sanitize reads the checkpoint's tensors in a process of its own."""
    checkpoints.make("deepseek-v3", tmp_path / "checkpoint")
    project = Project(tmp_path, "huggingface")
    project.configure(quantize={"bits": 4})
    doit(project.folder)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    stored = project.stored("extract", "layers.1", name)
    path, offset, length = stored.part
    flip(path, offset + length // 2)
    for stage in ("unshard", "cast", "quantize"):
        for action in project.actions(stage, "layers.1"):
            action.unlink()
        project.manifest(stage, "layers.1").unlink()
    before = project.built()
    done = doit(project.folder, expect=1)  # the checkpoint is another one: never a mix of both
    assert refusal(name, has_ctime) in done.stdout + done.stderr
    assert project.built() == before
    doit(project.folder, "lock")
    doit(project.folder)
    assert project.built() == project.anew()


def test_a_checkpoint_that_changes_under_the_same_stamp(has_ctime: bool, tmp_path: Path) -> None:
    """The next bits are never quantized partly of the old bytes and partly of the new."""
    project = projects.create(tmp_path, "huggingface", quantize={"bits": 4})
    project.keep = []
    project.configure()
    doit(project.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    path, offset, length = Stored(project.blob("extract", "layers.0", name)).part
    flip(path, offset + length // 2)
    before = project.built()
    project.configure(quantize={"bits": 8})
    done = doit(project.folder, expect=1)
    assert refusal(name, has_ctime) in done.stdout + done.stderr
    assert project.built() == before
    doit(project.folder, "lock")
    doit(project.folder)
    assert project.built() == project.anew()
