"""No record is believed unread: what is damaged is made again, or, of models.lock, said."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.digest import canonical
from support import projects
from support.projects import FOUR_BIT, outcomes
from support.records import OUTCOMES, Damaged, tasks_in


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged.create(tmp_path_factory.mktemp("damaged"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 99), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_record_never_makes_a_wrong_model(
    damaged: Damaged, number: int, seed: int
) -> None:
    kinds = damaged.kinds()
    outcome = damaged.attempt(seed, kinds[number % len(kinds)])
    assert outcome.outcome in OUTCOMES, outcome.detail


@pytest.mark.parametrize("source", projects.SOURCES)
def test_a_flipped_digit_in_a_memo(source: str, tmp_path: Path) -> None:
    """Of any digit of it: an offset in a header, a token id, an axis."""
    project = projects.create(tmp_path, source, **FOUR_BIT)
    project.doit()
    memos = sorted((project.store / "memos").rglob("*.json"))
    assert {memo.parent.parent.name for memo in memos} >= {"headers", "architectures", "extracts"}
    for memo in memos:
        data = bytearray(memo.read_bytes())
        (*_, last) = [index for index, byte in enumerate(data) if byte in b"0123456789"]
        data[last] = ord("1") if data[last] == ord("0") else ord("0")
        memo.write_bytes(data)
    said = project.doit("cache", "verify", expect=1).stdout
    assert all(str(memo) in said for memo in memos)
    assert not any(memo.exists() for memo in memos)
    for stage in projects.STAGES:
        shutil.rmtree(project.state / "manifests" / "model" / stage)
    project.configure(quantize={"bits": 8})
    project.doit()
    assert project.built() == project.anew()
    assert "none corrupt" in project.doit("cache", "verify").stdout


@pytest.mark.parametrize("name", ["record.json", "files/config.json"])
def test_a_damaged_record_of_a_source_is_found_and_kept_anew(name: str, tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    (record,) = (project.store / "sources").iterdir()
    path = record / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    said = project.doit("cache", "verify", expect=1).stdout
    assert str(record) in said
    assert not record.exists()
    project.doit("lock")
    assert "none corrupt" in project.doit("cache", "verify").stdout
    assert record.exists()


def test_what_an_older_version_left_is_used(tmp_path: Path) -> None:
    """Its references sealed when they are read, its memos worked out again, its database read."""
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    database = project.state / "doit.json"
    for path in project.store.glob("actions/*/*"):
        record = json.loads(path.read_bytes())
        assert record.pop("seal")
        path.write_bytes(canonical(record))
    database.write_bytes(canonical(tasks_in(database)))
    records = [*project.store.glob("blobs/*/*.parts"), *project.store.glob("memos/*/*/*")]
    for path in records:
        sealed = json.loads(path.read_bytes())
        assert sealed.keys() == {"seal", "key", "value"}
        path.write_bytes(canonical(sealed["value"]))
    assert project.doit().entries == []
    assert tasks_in(database)  # written anew
    assert "none corrupt" in project.doit("cache", "verify").stdout
    for stage in projects.STAGES:
        shutil.rmtree(project.state / "manifests" / "model" / stage)
    assert outcomes(project.doit()).keys() == {"reused"}
    project.configure(quantize={"bits": 8})
    assert outcomes(project.doit())["computed"] == project.quantizing()
    assert project.built() == project.anew()
    cast = json.loads(project.manifest("cast", "layers.1").read_bytes())["tensors"]
    for name, *_ in cast:
        if (reference := project.stored("cast", "layers.1", name).reference).exists():
            assert "seal" in json.loads(reference.read_bytes())


def test_an_older_reference_that_is_wrong_is_not_believed(tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", quantize={"bits": 4})
    project.doit()
    for reference in project.store.glob("blobs/*/*.parts"):
        parts = json.loads(reference.read_bytes())["value"]
        if parts[0][1] > 0:
            parts[0][1] -= 1  # the offset
        reference.write_bytes(canonical(parts))
    project.configure(quantize={"bits": 8})
    project.doit()
    assert project.built() == project.anew()


@pytest.mark.parametrize("name", ["lock", "log.jsonl"])
def test_state_that_is_a_link_is_refused(name: str, tmp_path: Path) -> None:
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours\n", encoding="utf-8")
    project.state.mkdir(exist_ok=True)
    os.symlink(elsewhere, project.state / name)
    done = project.doit(expect=None)
    assert done.returncode
    said = done.stdout + done.stderr
    assert f"{project.state / name} is a link" in said
    assert "Traceback" not in said
    assert elsewhere.read_text(encoding="utf-8") == "not ours\n"


@pytest.mark.parametrize("args", [(), ("list",), ("plan",), ("cache", "gc"), ("cache", "verify")])
def test_a_folder_of_ones_own_is_no_cache(args: tuple[str, ...], tmp_path: Path) -> None:
    """`[cache] dir = "."`: nothing of it is removed, not even what is called as ours is."""
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    shutil.rmtree(project.state)
    models = project.folder / "models.toml"
    models.write_text('[cache]\ndir = "."\n' + models.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("corrupt/mine", ".tmp-mine", "notes/.tmp-mine"):
        (project.folder / name).parent.mkdir(exist_ok=True)
        (project.folder / name).touch()
        os.utime(project.folder / name, (0, 0))
    before = {path for path in project.folder.rglob("*") if ".mlx-make" not in path.parts}
    done = project.doit(*args, expect=None)
    said = done.stdout + done.stderr
    assert done.returncode
    assert f"{project.folder} is no cache: it holds" in said
    assert "Set [cache] dir in models.toml to a folder that is new or empty" in said
    assert "Traceback" not in said
    assert {p for p in project.folder.rglob("*") if ".mlx-make" not in p.parts} == before
