"""models.lock: what was built of what; what differs from it is refused until it is accepted."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from cache.digest import digest
from cache.files.stamp import Stamp
from cache.records.actions import Actions
from cache.records.manifests import Action, Manifest
from support import checkpoints
from support.front_door import doit
from support.projects import FOUR_BIT, Project, alter, contents, create, outcomes, restore

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def lock(project: Project) -> dict:
    return json.loads((project.folder / "models.lock").read_bytes())


def rewrite(project: Project, change: Callable[[dict], object]) -> None:
    """Edit models.lock, as a merge or a hand would."""
    record = lock(project)
    change(record)
    (project.folder / "models.lock").write_text(json.dumps(record))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A 4-bit model of a checkpoint from Hugging Face, built."""
    made = create(tmp_path, "huggingface", **FOUR_BIT)
    made.doit()
    return made


def refused(project: Project, *args: str, status: int = 1) -> str:
    """What doit says of a difference; it leaves the model and the lock as they are."""
    before = contents(project.folder / "build"), (project.folder / "models.lock").read_bytes()
    done = project.doit(*args, expect=status)
    after = contents(project.folder / "build"), (project.folder / "models.lock").read_bytes()
    assert after == before
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


# What is written.


@pytest.mark.parametrize("kind", ["meta", "huggingface"])
def test_the_same_bytes_anywhere(kind: str, tmp_path: Path) -> None:
    """Whatever the folder, the order, the cache and the machine's history."""
    locks = []
    for name, built in (("one", ["pack:model", "pack:other"]), ("other", ["pack:other", "pack"])):
        project = create(tmp_path / name, kind, **FOUR_BIT)
        project.configure("other", dtype="float32")
        for task in built:
            project.doit(task)
        locks.append((project.folder / "models.lock").read_bytes())
    assert locks[0] == locks[1]
    assert str(tmp_path).encode() not in locks[0]
    record = json.loads(locks[0])
    assert record["sources"].keys() == {"checkpoint"}
    assert record["targets"].keys() == {"model", "other"}


def test_files_sizes_and_revision(project: Project) -> None:
    (source,) = lock(project)["sources"].values()
    for name, (size, _) in source["files"].items():
        assert (project.checkpoint / name).stat().st_size == size
    unread = {"model.safetensors.index.json"}  # told by the weight files' own headers
    assert source["files"].keys() == {p.name for p in project.checkpoint.iterdir()} - unread
    assert source["revision"] is None

    notes = project.checkpoint / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{'5' * 40}\nsome-etag\n1700000000.0\n")
    project.configure(dtype="float32")
    project.doit()
    assert lock(project)["sources"]["checkpoint"]["revision"] == "5" * 40


def test_revision_of_a_snapshot(tmp_path: Path) -> None:
    """As huggingface_hub lays out its own cache: links in a folder named for the commit."""
    project = create(tmp_path, "huggingface")
    snapshot = tmp_path / "hub" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    for number, path in enumerate(sorted(project.checkpoint.iterdir())):
        path.rename(tmp_path / "hub" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    project.configure(source=str(snapshot.relative_to(tmp_path)))
    project.doit()
    (source,) = lock(project)["sources"].values()
    assert source["revision"] == "c" * 40


def test_untouched_when_nothing_changes(project: Project) -> None:
    path = project.folder / "models.lock"
    before = Stamp.of(path)
    assert project.doit().entries == []
    shutil.rmtree(project.state / "manifests")
    shutil.rmtree(project.folder / "build")
    project.doit()
    project.accept()
    assert Stamp.of(path) == before


def test_sha256_of_each_file_once_a_report_has_it(project: Project) -> None:
    """It stays as long as the output does, and costs no look at what was built."""
    path = project.folder / "models.lock"
    without = path.read_bytes()
    project.doit("report")
    with_sha256 = path.read_bytes()
    record = lock(project)
    files = sorted((project.folder / "build" / "model").iterdir())
    assert record["targets"]["model"].pop("sha256") == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert record == json.loads(without)
    assert project.doit().entries == []
    shutil.rmtree(project.state / "manifests")
    shutil.rmtree(project.folder / "build")
    project.doit("--locked")
    assert path.read_bytes() == with_sha256

    rewrite(project, lambda record: record["targets"]["model"]["sha256"].update(x="0" * 64))
    (project.folder / "reports" / "model.html").unlink()
    assert "model: x has another SHA-256 than in models.lock" in refused(project, "report")
    project.configure(quantize={"bits": 8})
    project.doit()
    assert "sha256" not in lock(project)["targets"]["model"]


def test_pruned(project: Project) -> None:
    checkpoints.make("llama-tied", project.folder / "spare")
    project.configure("added", source="spare")
    project.doit()
    assert lock(project)["sources"].keys() == {"checkpoint", "spare"}
    renamed = {"renamed": project.models.pop("added")}
    project.models.update(renamed)
    project.configure("renamed")
    project.doit()
    assert lock(project)["targets"].keys() == {"model", "renamed"}
    del project.models["renamed"]
    project.configure()
    project.accept()
    assert lock(project)["targets"].keys() == {"model"}
    assert lock(project)["sources"].keys() == {"checkpoint"}


def test_two_layouts_of_one_source(project: Project) -> None:
    """A target that is added or removed does not make the checkpoint another."""
    before = lock(project)["sources"]
    project.configure("examples", layout="mlx-examples")
    project.doit()
    project.doit("--locked")
    assert lock(project)["sources"] == before
    del project.models["model"]
    project.configure("examples")
    assert project.doit().entries == []


def test_removed_and_written_again(project: Project) -> None:
    path = project.folder / "models.lock"
    before = path.read_bytes()
    path.unlink()
    assert outcomes(project.doit()) == {"reused": {"pack:model"}}
    assert path.read_bytes() == before


# A checkpoint that is another.


def edit(project: Project, name: str, **keys: object) -> None:
    path = project.checkpoint / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | keys))


def grow(project: Project) -> None:
    """One more tensor, which no target uses."""
    (path,) = project.checkpoint.glob("model-00001-*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors.popitem()[1][:1] * 0
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Project], object], str]] = {
    "a tensor": (lambda p: alter(p.checkpoint, WEIGHT), f"tensor {WEIGHT} has other contents"),
    "a config": (lambda p: edit(p, "config.json", rope_theta=5e5), "config.json is another"),
    "a key that is nobody's": (
        lambda p: edit(p, "config.json", somebody=1),
        "config.json is another",
    ),
}
SMALL: dict[str, tuple[Callable[[Project], object], str]] = {
    "a tokenizer": (
        lambda p: edit(p, "tokenizer_config.json", somebody=1),
        "tokenizer_config.json is another",
    ),
    "a file more": (
        lambda p: (p.checkpoint / "chat_template.jinja").write_text("{{ x }}"),
        "chat_template.jinja is new",
    ),
    "a file less": (
        lambda p: (p.checkpoint / "generation_config.json").unlink(),
        "generation_config.json is gone",
    ),
}


@pytest.mark.parametrize("change", SMALL)
def test_a_changed_small_file(project: Project, change: str) -> None:
    """It is built, said once and locked; with --locked it is an error like any other."""
    if change == "a file less":
        (project.checkpoint / "generation_config.json").write_text("{}")
        project.doit()
    act, fact = SMALL[change]
    act(project)
    said = refused(project, "--locked", status=3 if "another" in fact else 1)
    assert fact.replace(" is another", " of source checkpoint is another") in said
    before = lock(project)
    done = project.doit()
    assert done.computed == {"pack:model"}
    note = f"source checkpoint is not what models.lock had: {fact}. It is locked as it is now"
    assert done.stdout.count(note) == 1
    assert project.built() == project.anew()
    assert project.doit().entries == []
    now, old = (record["sources"]["checkpoint"] for record in (lock(project), before))
    assert now["record"] != old["record"]
    (name,) = [
        name for name in now["files"].keys() | old["files"].keys()
        if now["files"].get(name) != old["files"].get(name)
    ]  # fmt: skip
    assert fact.startswith(name)
    if name in now["files"]:
        data = (project.checkpoint / name).read_bytes()
        assert now["files"][name] == [len(data), digest(data)]
    project.doit("--locked")


def test_a_changed_small_file_beside_changed_weights(project: Project) -> None:
    """Then it is the weights' error, and nothing is locked."""
    edit(project, "tokenizer_config.json", somebody=1)
    project.doit("extract")
    edit(project, "config.json", somebody=1)
    said = refused(project)
    assert "config.json is another; tokenizer_config.json is another" in said
    project.accept()
    alter(project.checkpoint, WEIGHT)
    (project.checkpoint / "chat_template.jinja").write_text("{{ x }}")
    assert f"tensor {WEIGHT} has other contents" in refused(project)


def test_a_changed_small_file_of_two_targets(project: Project) -> None:
    project.configure("other", quantize={"bits": 8})
    project.doit()
    edit(project, "tokenizer_config.json", somebody=1)
    assert "error" not in project.doit("plan", expect=1).stdout.lower()
    assert "is not what models.lock had" in project.doit("model").stdout
    done = project.doit()
    assert done.computed == {"pack:other"}
    assert "is not what" not in done.stdout  # it is what is locked now
    records = [target["source"] for target in lock(project)["targets"].values()]
    assert records == [lock(project)["sources"]["checkpoint"]["record"]] * 2
    project.doit("--locked")


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_checkpoint(project: Project, change: str) -> None:
    """It is refused whoever asks, until it is accepted; then it is built as from nothing."""
    act, fact = CHANGES[change]
    act(project)
    for _ in range(2):
        said = refused(project)
        assert f"source checkpoint is not what models.lock has: {fact}" in said
        assert "accept it: doit lock, then doit" in said
    early = fact == "config.json is another"
    refused(project, "--locked", status=3 if early else 1)
    before = lock(project)
    project.accept()
    assert lock(project)["targets"] == before["targets"]
    assert lock(project)["sources"] != before["sources"]
    said = refused(project, "--locked", status=3)  # it is not built yet
    assert "is not of this models.toml and its sources: target model " in said
    project.doit()
    assert project.built() == project.anew()
    assert project.doit().entries == []


def test_a_weight_file_of_another_size(project: Project) -> None:
    path, before = alter(project.checkpoint, WEIGHT)
    restore(path, before)
    (project.checkpoint / "generation_config.json").unlink(missing_ok=True)
    tensors = load_file_raw(path)
    header = json.dumps(tensors[0] | {"__metadata__": {"format": "pt", "more": "words"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + tensors[1])
    assert f"{path.name} has {path.stat().st_size:,} bytes, locked are" in refused(project)
    project.accept()
    project.doit()
    assert project.built() == project.anew()


def load_file_raw(path: Path) -> tuple[dict, bytes]:
    """A safetensors file's header, and the rest."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_a_change_that_comes_back(project: Project) -> None:
    """What was refused leaves nothing behind."""
    path, before = alter(project.checkpoint, WEIGHT)
    refused(project)
    restore(path, before)
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == project.anew()


def test_without_a_record_of_the_old_one(project: Project) -> None:
    """Another cache does not know the tensors of old: then the file is named."""
    path, _ = alter(project.checkpoint, WEIGHT)
    shutil.rmtree(project.state)
    assert f"{path.name} is another" in refused(project)


def test_a_lock_from_elsewhere(project: Project) -> None:
    """Pulled from version control: noticed by a run that has nothing to do otherwise."""
    assert project.doit().entries == []

    def change(record: dict) -> None:
        source = record["sources"]["checkpoint"]
        source["record"] = "5" * 64
        source["files"]["config.json"][1] = "5" * 32

    rewrite(project, change)
    assert "config.json is another" in refused(project)


# doit --locked


def test_locked(project: Project) -> None:
    before = Stamp.of(project.folder / "models.lock")
    project.doit("--locked")
    shutil.rmtree(project.state)
    shutil.rmtree(project.folder / "build")
    project.doit("--locked")
    assert project.doit("--locked").entries == []
    assert project.built() == project.anew()
    assert Stamp.of(project.folder / "models.lock") == before


def unlocked(project: Project, *expected: str, status: int = 1) -> None:
    """`doit --locked` refuses, and neither writes the lock nor touches the model."""
    path = project.folder / "models.lock"
    before = path.read_bytes() if path.exists() else None
    built = contents(project.folder / "build")
    done = project.doit("--locked", expect=status)
    for words in expected:
        assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (path.read_bytes() if path.exists() else None) == before
    assert contents(project.folder / "build") == built


def test_locked_without_a_lock(project: Project) -> None:
    (project.folder / "models.lock").unlink()
    unlocked(project, "models.lock does not exist", "Run doit without --locked", status=3)


def test_locked_and_other_models(project: Project) -> None:
    project.configure(quantize={"bits": 8})
    unlocked(project, "target model has other settings", status=3)
    project.configure(max_shard_size="100kB", **FOUR_BIT)
    unlocked(project, "target model has other settings", status=3)
    project.configure(max_shard_size=None)
    project.configure("added", quantize={"bits": 4})
    unlocked(project, "target added is not in it", status=3)
    del project.models["added"]
    shutil.copytree(project.checkpoint, project.folder / "copy")
    project.configure(source="copy")
    unlocked(project, "source copy is not in it", "it has a source checkpoint", status=3)
    project.configure("renamed", source="checkpoint", **FOUR_BIT)
    del project.models["model"]
    project.configure("renamed")
    unlocked(project, "target renamed is not in it", "it has a target model", status=3)


def test_locked_never_accepts(project: Project) -> None:
    alter(project.checkpoint, WEIGHT)
    done = project.doit("--locked", "lock", expect=1)
    assert "--locked never writes models.lock" in done.stdout


def other_output(project: Project) -> list[str]:
    """Lock what another computer would have made: two tensors differ. Their names."""
    names = []
    for layer in ("layers.0", "layers.2"):
        path = project.manifest("quantize", layer)
        manifest = json.loads(path.read_bytes())
        names.append(f"model.{layer}.mlp.up_proj.scales")
        assert names[-1] in {tensor[0] for tensor in manifest["tensors"]}
    (path,) = (
        p
        for p in (project.store / "actions").rglob("*.json")
        if b'"stage":"pack"' in p.read_bytes()
    )
    manifest = Manifest.from_bytes(path.read_bytes())
    inputs = dict(manifest.action.inputs)
    for name in names:
        inputs[name] = [*inputs[name][:2], "0" * 32]
    action = Action("pack", manifest.action.version, manifest.action.params, inputs)
    Actions(project.store / "actions").put(Manifest(action, manifest.tensors))

    def change(record: dict) -> None:
        target = record["targets"]["model"]
        target.update(action=action.key, output="1" * 32, computer={"mlx": "0.1"})

    rewrite(project, change)
    return names


def test_an_output_that_differs(project: Project) -> None:
    """Reported tensor by tensor, and an error where nothing may differ."""
    names = other_output(project)
    said = f"although nothing it is built from does: 2 of {count(project)} tensors: "
    unlocked(project, said + ", ".join(names), "locked was computed by mlx 0.1, this by mlx ")
    done = project.doit()
    assert said + ", ".join(names) in done.stdout
    assert project.built() == project.anew()
    project.doit("--locked")  # for what was built is locked now


def count(project: Project) -> int:
    index = json.loads((project.folder / "build/model/model.safetensors.index.json").read_bytes())
    return len(index["weight_map"])


@pytest.mark.parametrize("args", [[], ["--locked"]])
def test_an_output_digest_that_differs(args: list[str], project: Project) -> None:
    """The same tensors and files make one output: another one in the lock is an error always."""
    rewrite(project, lambda it: it["targets"]["model"].update(output="1" * 32))
    said = refused(project, *args)
    assert "was built as" in said
    assert f"and is {'1' * 32} in models.lock, of the same tensors and files" in said
    (project.folder / "models.lock").unlink()
    project.doit()
    project.doit("--locked")


@pytest.mark.parametrize("args", [[], ["--locked"]])
def test_another_output_of_the_same_digest(args: list[str], project: Project) -> None:
    """As if somebody had made it: xxh3 does not tell, and whoever asks is told."""
    rewrite(project, lambda it: it["targets"]["model"].update(blake3="1" * 64))
    for gone in ("nothing", "build", ".mlx-make/manifests"):
        shutil.rmtree(project.folder / gone, ignore_errors=True)
        said = refused(project, *args)
        assert re.search(
            f"built with BLAKE3 [0-9a-f]{{64}}, and is {'1' * 64} in models.lock", said
        )
    assert not (project.folder / "build" / "model").exists()


def test_blake3_of_an_output(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked by whoever packs beside a remote store, checked and kept up by all from then on."""

    def packed(*args: str) -> str | None:
        shutil.rmtree(project.folder / "build")
        assert outcomes(project.doit(*args)) == {"reused": {"pack:model"}}
        found: str | None = lock(project)["targets"]["model"]["blake3"]
        return found

    assert packed() is None
    with monkeypatch.context() as patch:
        patch.setenv("MLX_MAKE_CACHE_REMOTE", (project.folder / "remote").as_uri())
        assert packed("--locked") is None
        locked = packed()
        assert locked
    assert packed() == locked
    project.configure(**FOUR_BIT, max_shard_size="100kB")
    project.doit()
    assert lock(project)["targets"]["model"]["blake3"] not in (None, locked)


# A damaged lock.


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (None, "holds a merge's conflict. Take either side of the whole file"),
        ("", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `version`"),
        ('{"version": 2, "sources": {}, "targets": {}}', "is of version 2, this mlx-make reads 1"),
        ('{"version": 1, "targets": {}}', "missing required field `sources`"),
        (
            '{"version": 1, "sources": {"a": {}}, "targets": {}}',
            "missing required field `files` - at `$.sources[...]`",
        ),
        (
            '{"version": 1, "sources": {}, "targets": {"a": {"source": ""}}}',
            "- at `$.targets[...].source`",
        ),
        (
            '{"version": 1, "sources": [], "targets": {}}',
            "Expected `object`, got `array` - at `$.sources`",
        ),
        (
            '{"version": 1, "sources": {"a": {"record": "../../x", "files": {}, "nbytes": 1}},'
            ' "targets": {}}',
            "`$.sources[...].record`",
        ),
        ("[" * 100_000, "is no lock file"),
        ('{"version": 1, "a": ' + "[" * 100_000, "is no lock file"),
    ],
)
def test_a_damaged_lock(text: str | None, fact: str, project: Project) -> None:
    path = project.folder / "models.lock"
    whole = path.read_text()
    ours, theirs = whole, whole.replace('"version": 1', '"version": 1 ')
    path.write_text(text if text is not None else f"<<<<<<<\n{ours}=======\n{theirs}>>>>>>>\n")
    before = path.read_bytes()
    for args in ((), ("--locked",), ("lock",), ("list",)):
        done = project.doit(*args, expect=3)
        assert fact in done.stderr
        assert "Traceback" not in done.stderr
    assert path.read_bytes() == before


# A checkpoint that goes away.


@pytest.mark.parametrize("kind", ["meta", "huggingface"])
def test_away_and_back(kind: str, tmp_path: Path) -> None:
    """What is built stays; a shard size and bits need no checkpoint, as cast is kept."""
    project = create(tmp_path, kind, **FOUR_BIT)
    project.doit()
    before, locked = project.built(), lock(project)
    away = project.checkpoint.rename(tmp_path / "away")
    assert not outcomes(project.doit()).get("computed")
    assert project.doit("--locked").entries == []
    project.configure(quantize={"bits": 8})
    assert outcomes(project.doit())["computed"] == project.quantizing()
    project.configure(**FOUR_BIT)
    assert not outcomes(project.doit()).get("computed")
    assert (project.built(), lock(project)) == (before, locked)

    away.rename(project.checkpoint)
    computed = outcomes(project.doit()).get("computed", set())
    assert {task.split(":")[0] for task in computed} <= {"extract"}
    assert (project.built(), lock(project)) == (before, locked)
    assert project.doit().entries == []


def test_away_and_wanted(tmp_path: Path) -> None:
    """What cast did not change was only ever a range of the checkpoint."""
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    project.doit()
    before = project.built()
    shutil.rmtree(project.checkpoint)
    project.configure(quantize={"bits": 8})
    said = refused(project)
    assert "is not here whole, and" in said
    assert "Get the checkpoint" in said
    project.configure(quantize={"bits": 4})
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == before


def test_small_files_without_weights(project: Project) -> None:
    """As in a repository that holds all but the weights: those files count."""
    for path in project.checkpoint.glob("*.safetensors"):
        path.unlink()
    assert not outcomes(project.doit()).get("computed")
    edit(project, "config.json", rope_theta=5e5)
    done = project.doit(expect=3)
    assert "has no weights, and config.json there is not what models.lock has" in done.stderr


def test_pointers_are_no_weights(project: Project) -> None:
    """As in a checkout without Git LFS: what stands for a weight file is not to be read."""
    for path in project.checkpoint.glob("*.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n")
    before = project.built()
    shutil.rmtree(project.folder / "build")
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == before
    shutil.rmtree(project.store / "sources")
    assert "has Git LFS pointers for weights (git lfs pull" in project.doit(expect=3).stderr


def test_away_and_not_on_record(project: Project) -> None:
    shutil.rmtree(project.checkpoint)
    shutil.rmtree(project.store / "sources")
    done = project.doit(expect=3)
    assert "does not exist, and what models.lock says of it" in done.stderr
    assert "[cache] remote" in done.stderr


def test_clean_and_forget_without_the_checkpoint(project: Project) -> None:
    before = project.built()
    shutil.rmtree(project.checkpoint)
    project.doit("clean")
    assert not (project.folder / "build" / "model").exists()
    project.doit("forget", "-a")
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == before
    assert os.listdir(project.folder / "build") == ["model"]
    assert doit(project.folder, "list").returncode == 0
