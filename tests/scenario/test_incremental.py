"""What a change makes doit compute again: exactly that, by the build log, and the right bytes.

Each test builds a project, changes one thing, builds again, and compares what came out with a
build from nothing of the same.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.files.stamp import Stamp, changed_at
from support import checkpoints
from support.projects import (
    FOUR_BIT,
    LAYERS,
    SOURCES,
    STAGES,
    STORED,
    Project,
    alter,
    contents,
    create,
    flip,
    outcomes,
    restore,
    stored_layers,
    touch,
    weight_files,
)
from support.records import tasks_in
from tasks.checkpoints import safetensors_file

HEAVY = {"torch", "transformers", "mlx_lm", "numpy"}
ALL_BUT_EXTRACT = ("unshard", "cast", "quantize")


# Where both would go the same way.
meta_only = pytest.mark.parametrize("source", ["meta"], indirect=True)
huggingface_only = pytest.mark.parametrize("source", ["huggingface"], indirect=True)


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def project(source: str, tmp_path: Path) -> Project:
    """A 4-bit model in float16, built. Its checkpoint is bfloat16."""
    return built(tmp_path, source, **FOUR_BIT)


def built(folder: Path, source: str, **keys) -> Project:
    made = create(folder, source, **keys)
    assert outcomes(made.doit()) == {"computed": made.tasks()}
    return made


# Nothing changed.


def test_a_second_build_does_nothing(project: Project, tmp_path: Path) -> None:
    before = project.built()
    record = tmp_path / "record.json"
    database = Stamp.of(project.state / "doit.json")
    done = project.doit(hook={"record": str(record)})
    assert done.entries == []
    assert Stamp.of(project.state / "doit.json") == database
    assert "nothing to do" in done.stdout
    assert project.built() == before == project.anew()
    witness = json.loads(record.read_bytes())
    assert not HEAVY & {*witness["modules"]}
    assert not {*map(str, weight_files(project.checkpoint))} & {*witness["opened"]}


def test_touched_files_compute_nothing(project: Project) -> None:
    before = project.built()
    extract = project.tasks(["extract"], pack=False)
    weights = weight_files(project.checkpoint)
    others = [path for path in project.checkpoint.iterdir() if path not in weights]
    built_files = [*(project.folder / "build" / "model").iterdir()]
    manifests = [path for path in project.state.rglob("manifests/**/*") if path.is_file()]
    for what, paths, looked_into in (
        ("models.toml", [project.folder / "models.toml"], {}),
        ("config, tokenizer", others, {}),
        ("weights", weights, {"reused": extract}),
        ("built files", built_files, {"reused": {"pack:model"}}),
        ("manifests", manifests, {}),
    ):
        touch(*paths)
        assert outcomes(project.doit()) == looked_into, what
    assert project.doit().entries == []
    assert project.built() == before


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("meta", FOUR_BIT),
        ("meta", {"quantize": {"bits": 4}}),
        ("huggingface", {"quantize": {"bits": 4}}),
    ],
    ids=["cast", "joined", "as it is"],
    indirect=["source"],
)
def test_a_clone_beside_the_same_cache_computes_nothing(
    source: str, keys: dict, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = create(tmp_path / "first", source, cache=cache, **keys)
    first.doit()
    clone = create(tmp_path / "clone", source, cache=cache, **keys)
    assert outcomes(clone.doit()) == {"reused": clone.tasks()}
    assert clone.built() == first.built() == clone.anew()
    assert clone.doit().entries == []

    # The clone needs nothing of the first from now on but what is in the cache.
    shutil.rmtree(first.folder)
    clone.configure(quantize={"bits": 8})
    computed = outcomes(clone.doit())["computed"]
    if keys == FOUR_BIT:
        assert computed == clone.quantizing()
    else:  # joined weights lay in the first one's checkpoint and are joined again
        joined = clone.tasks(["unshard", "cast"], pack=False)
        assert computed - joined == clone.quantizing()
    assert clone.built() == clone.anew()


# A setting changed.


@pytest.mark.parametrize(
    ("source", "quantize"),
    [
        ("meta", {"bits": 8}),
        ("huggingface", {"bits": 8}),
        ("meta", {"bits": 4, "group_size": 32}),
        ("huggingface", {"mode": "mxfp4"}),
    ],
    indirect=["source"],
)
def test_other_quantization(project: Project, quantize: dict, tmp_path: Path) -> None:
    project.configure(quantize=quantize)
    expected = project.anew()
    # Other bytes in the checkpoint, by the same stamp: whoever reads them builds something else.
    changed = {str(path): changed_at(path) for path in weight_files(project.checkpoint)}
    for path in weight_files(project.checkpoint):
        spoil(path)
    record = tmp_path / "record.json"
    done = project.doit(hook={"record": str(record), "ctimes": changed})
    assert outcomes(done) == {"computed": project.quantizing()}
    assert project.built() == expected
    witness = json.loads(record.read_bytes())
    assert not HEAVY & {*witness["modules"]}
    assert not {*map(str, weight_files(project.checkpoint))} & {*witness["opened"]}


def spoil(path: Path) -> None:
    """Overwrite a file in place with zeros: its size, time and inode stay, its ctime does not."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@meta_only
def test_quantization_dropped_and_taken_up_again(project: Project) -> None:
    project.configure(quantize=None)
    assert outcomes(project.doit()) == {"computed": project.quantizing()}
    assert project.built() == project.anew()
    project.configure(**FOUR_BIT)
    assert outcomes(project.doit()) == {"reused": project.quantizing()}
    assert project.built() == project.anew()


@huggingface_only
def test_a_rule_that_concerns_one_layer(project: Project) -> None:
    rule = {"match": "*layers.1.mlp.down_proj", "bits": 8}
    project.configure(quantize={"bits": 4, "rules": [rule]})
    done = project.doit()
    assert outcomes(done) == {"computed": {"quantize:model:layers.1", "pack:model"}}
    assert project.built() == project.anew()


@meta_only
def test_max_shard_size(project: Project) -> None:
    one_file = project.built()
    project.configure(max_shard_size="200 kB")
    assert outcomes(project.doit()) == {"computed": {"pack:model"}}
    files = project.built()
    assert files == project.anew()
    assert "model.safetensors" not in files
    assert "model-00003-of-" in " ".join(files)
    project.configure(max_shard_size=None)
    assert outcomes(project.doit()) == {"reused": {"pack:model"}}
    assert project.built() == one_file  # and not one of the shards that there were


def test_layout(project: Project) -> None:
    project.configure(layout="mlx-examples")
    computed = outcomes(project.doit())["computed"]
    layers = ("tok_embeddings", *LAYERS[project.kind][1:-1], "output")
    assert computed - {f"{stage}:model:norm" for stage in ALL_BUT_EXTRACT} == {
        "pack:model",
        *(
            f"{stage}:model:{name}"
            for stage in ALL_BUT_EXTRACT
            for name in layers
            if name != "norm"
        ),
    }
    files = project.built()
    assert files == project.anew()
    assert files.keys() == {"config.json", "tokenizer.model", "weights.npz"}
    project.configure(layout=None)
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == project.anew()


def test_dtype(project: Project) -> None:
    project.configure(dtype="float32")
    assert outcomes(project.doit()) == {"computed": project.tasks(["cast", "quantize"])}
    assert project.built() == project.anew()


@huggingface_only
def test_a_name_that_was_another(project: Project) -> None:
    project.models["other"] = project.models.pop("model")
    project.configure("other")
    assert outcomes(project.doit()) == {"reused": project.tasks(target="other")}
    assert project.built("other") == project.anew("other")


# The checkpoint changed.


def test_one_tensor(project: Project) -> None:
    before = project.built()
    names = {"meta": "layers.1.feed_forward.w2.weight"}
    name = names.get(project.kind, "model.layers.1.mlp.down_proj.weight")
    path, data = alter(project.checkpoint, name)
    looked = {*STORED["meta"]}
    if project.kind == "huggingface":
        looked = stored_layers(project.checkpoint, path.name)
        assert "layers.3" not in looked
    chain = {f"{stage}:model:layers.1" for stage in ("extract", *ALL_BUT_EXTRACT)} | {"pack:model"}
    others = {f"extract:model:{layer}" for layer in looked if layer != "layers.1"}
    project.accept()
    assert outcomes(project.doit()) == {"computed": chain, "reused": others}
    after = project.built()
    assert after == project.anew()
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {"README.md", "model.safetensors"}  # it has the digests of the source

    restore(path, data)
    project.accept()
    assert outcomes(project.doit()) == {"reused": chain | others}
    assert project.built() == before


def test_what_the_cast_rounds_away_stops_there(tmp_path: Path) -> None:
    """From float32 to float16: a weight's last bit concerns nothing behind cast."""
    project = create(tmp_path, "huggingface")
    shutil.rmtree(project.checkpoint)
    checkpoints.make("olmo2", project.checkpoint)
    project.configure(**FOUR_BIT)
    project.doit()
    before = project.built()
    weights = project.checkpoint / "model.safetensors"
    tensors = {stored.name: stored for stored in safetensors_file.read(weights)}
    flip(weights, tensors["model.layers.1.mlp.up_proj.weight"].offset)
    project.accept()
    done = outcomes(project.doit())
    assert done["computed"] == {
        f"{stage}:model:layers.1" for stage in ("extract", "unshard", "cast")
    }
    extracts = {f"extract:model:{layer}" for layer in STORED["huggingface"]}
    assert done["reused"] <= extracts | {"pack:model"}  # for models.lock
    assert project.built() == before == project.anew()


@pytest.mark.parametrize(
    ("kind", "file", "key", "value", "changed"),
    [
        ("meta", "params.json", "norm_eps", 1e-6, {"config.json"}),
        (
            "huggingface",
            "tokenizer_config.json",
            "model_max_length",
            1024,
            {"tokenizer_config.json"},
        ),
        ("huggingface", "chat_template.json", "chat_template", "", {"chat_template.json"}),
    ],
)
def test_a_small_file(
    kind: str, file: str, key: str, value: object, changed: set[str], tmp_path: Path
) -> None:
    project = built(tmp_path, kind, **FOUR_BIT)
    before = project.built()
    path = project.checkpoint / file
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(content | {key: value}))
    project.accept()
    assert outcomes(project.doit()) == {"computed": {"pack:model"}}
    after = project.built()
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert after == project.anew()


# Targets were added.


@meta_only
def test_a_model_is_added(project: Project) -> None:
    before = project.built()
    checkpoints.make("llama-tied", project.folder / "other")
    project.configure("added", source="other", quantize={"bits": 4})
    done = project.doit()
    assert {entry["task"].split(":")[1] for entry in done.entries} == {"added"}
    assert outcomes(done).keys() == {"computed"}
    assert project.built() == before


def test_targets_that_share_a_checkpoint_share_its_stages(project: Project) -> None:
    project.configure("model-8bit", **FOUR_BIT | {"quantize": {"bits": 8}})
    tasks = project.tasks(target="model-8bit")
    computed = project.quantizing("model-8bit")
    assert outcomes(project.doit()) == {"computed": computed, "reused": tasks - computed}
    assert project.built("model-8bit") == project.anew("model-8bit")

    project.configure("model-examples", **FOUR_BIT | {"layout": "mlx-examples"})
    done = outcomes(project.doit())
    assert project.tasks(["extract"], target="model-examples", pack=False) <= done["reused"]
    assert project.built("model-examples") == project.anew("model-examples")


@meta_only
def test_targets_built_together_share_their_stages(source: str, tmp_path: Path) -> None:
    project = create(tmp_path, source, **FOUR_BIT)
    project.configure("twin", **FOUR_BIT | {"quantize": {"bits": 8}})
    done = outcomes(project.doit())
    for stage in ("extract", "unshard", "cast"):
        for task in project.tasks([stage], pack=False):
            twin = task.replace(":model:", ":twin:")
            assert len({task, twin} & done["computed"]) == 1, task
            assert len({task, twin} & done["reused"]) == 1, task
    assert project.quantizing() | project.quantizing("twin") <= done["computed"]
    for target in ("model", "twin"):
        assert project.built(target) == project.anew(target)


@huggingface_only
def test_two_threads_that_meet_at_one_layer_extract_it_once(source: str, tmp_path: Path) -> None:
    project = create(tmp_path, source, **FOUR_BIT)
    project.configure("twin", **FOUR_BIT)
    pair = ["extract:model:layers.1", "extract:twin:layers.1"]
    done = project.doit("-n", "2", *pair, hook={"meet": ["/actions/", 1, 1]})
    assert {entry["outcome"] for entry in done.entries} == {"computed", "reused"}


# The built model, or the record of it, was damaged.


@meta_only
def test_a_damaged_build_is_made_again(project: Project) -> None:
    before = project.built()
    folder = project.folder / "build" / "model"
    weights = folder / "model.safetensors"

    def cut(path: Path) -> None:
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size - 1000)

    for what, damage in (
        ("weights deleted", weights.unlink),
        ("weights altered", lambda: flip(weights, 50_000)),
        ("weights cut", lambda: cut(weights)),
        ("config.json altered", lambda: flip(folder / "config.json", 30)),
        ("folder deleted", lambda: shutil.rmtree(folder)),
    ):
        is_the_caches = weights.exists() and weights.stat().st_nlink > 1
        damage()
        done = outcomes(project.doit())
        assert done["reused"] == {"pack:model"}, what
        # What is altered in the cache's own file is made again, in a file of its own, and packing
        # copies from then on.
        again = what == "weights altered" and is_the_caches
        assert len(done.get("computed", ())) == again, what
        assert project.built() == before, what
    assert project.doit().entries == []


@huggingface_only
def test_a_damaged_shard_of_many_is_made_again(source: str, tmp_path: Path) -> None:
    project = built(tmp_path, source, **FOUR_BIT, max_shard_size="200kB")
    before = project.built()
    second = next((project.folder / "build" / "model").glob("model-00002-of-*"))
    for what, damage in (("deleted", second.unlink), ("altered", lambda: flip(second, 1000))):
        damage()
        assert outcomes(project.doit()) == {"reused": {"pack:model"}}, what
        assert project.built() == before, what


@meta_only
def test_a_lost_manifest_is_made_again(project: Project) -> None:
    before = project.built()
    for stage in ("extract", *ALL_BUT_EXTRACT):
        project.manifest(stage, "layers.1").unlink()
        assert outcomes(project.doit()) == {"reused": {f"{stage}:model:layers.1"}}
    (project.state / "manifests" / "model" / "pack.json").unlink()
    assert outcomes(project.doit()) == {"reused": {"pack:model"}}
    shutil.rmtree(project.state / "manifests")
    assert outcomes(project.doit()) == {"reused": project.tasks()}
    assert project.doit().entries == []
    assert project.built() == before


@meta_only
def test_a_damaged_manifest_is_made_again(project: Project) -> None:
    before = project.built()
    for stage, data in (
        ("extract", b""),
        ("unshard", b"\0" * 100),
        ("cast", b'{"schema": 1}'),
        ("quantize", b"{"),
    ):
        project.manifest(stage, "layers.1").write_bytes(data)
        done = outcomes(project.doit())
        assert f"{stage}:model:layers.1" in done["reused"], stage
        assert not done.get("computed"), stage
    assert project.doit().entries == []
    assert project.built() == before


@meta_only
def test_the_database_is_lost(project: Project) -> None:
    before = project.built()
    database = project.state / "doit.json"
    database.unlink()
    assert outcomes(project.doit()) == {"reused": project.tasks()}
    whole = database.read_bytes()
    for data in (b"\x00\xff garbage", whole[: len(whole) // 2]):
        database.write_bytes(data)
        assert outcomes(project.doit()) == {"reused": project.tasks()}, data[:20]
    assert project.doit().entries == []
    assert project.built() == before


def test_a_database_of_another_shape_is_as_good_as_none(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    database = project.state / "doit.json"
    for damaged in ([], dict.fromkeys(tasks_in(database), 3)):
        database.write_text(json.dumps(damaged))
        done = project.doit()
        assert outcomes(done) == {"reused": project.tasks()}
        assert "Traceback" not in done.stderr
    assert project.doit().entries == []


@huggingface_only
def test_all_state_is_lost_but_the_cache(project: Project) -> None:
    before = project.built()
    for path in project.state.iterdir():
        if path.is_dir() and path != project.store:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    shutil.rmtree(project.folder / "build")
    assert outcomes(project.doit()) == {"reused": project.tasks()}
    assert project.built() == before


# The cache was damaged.


@meta_only
def test_a_lost_quantized_blob(project: Project) -> None:
    before = project.built()
    names = ("lm_head.weight", "lm_head.scales", "lm_head.biases")
    stored = [project.stored("quantize", "lm_head", name) for name in names]
    last = max(stored, key=lambda each: each.part[1])  # nothing comes after it in its file
    for what, damage in (
        ("deleted", last.lose),
        ("cut", lambda: last.cut(last.length - 1)),
        ("emptied", lambda: last.cut(0)),
    ):
        if what != "deleted":  # the built file may be the same
            shutil.rmtree(project.folder / "build")
        damage()
        if what == "deleted":
            assert project.doit().entries == []  # nothing needs it yet
            project.lose_packed()
            shutil.rmtree(project.folder / "build")
        assert outcomes(project.doit()) == {
            "computed": {"quantize:model:lm_head"},
            "reused": {"pack:model"},
        }, what
        assert project.built() == before, what
    assert project.doit().entries == []


@huggingface_only
def test_lost_quantized_blobs_of_all_layers(project: Project) -> None:
    before = project.built()
    names = {
        layer: [
            tensor[0]
            for tensor in json.loads(project.manifest("quantize", layer).read_bytes())["tensors"]
            if tensor[0].endswith((".scales", ".biases"))
        ]
        for layer in LAYERS[project.kind]
    }
    for layer, found in names.items():
        for name in found:
            project.stored("quantize", layer, name).lose()
    project.lose_packed()
    shutil.rmtree(project.folder / "build")
    assert outcomes(project.doit()) == {
        "computed": project.quantizing() - {"pack:model"},
        "reused": {"pack:model"},
    }
    assert project.built() == before


def test_a_lost_cast_blob(project: Project) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    blob = project.blob("cast", "layers.1", name)
    for what, damage, bits in (
        ("deleted", blob.unlink, 8),
        ("cut", lambda: blob.write_bytes(blob.read_bytes()[:-1]), 6),
    ):
        damage()
        assert project.doit().entries == [], what
        project.configure(quantize={"bits": bits})
        computed = outcomes(project.doit())["computed"]
        assert computed == project.quantizing() | {"cast:model:layers.1"}, what
        assert blob.stat().st_size > 1, what
        assert project.built() == project.anew(), what


@meta_only
def test_a_lost_blob_that_is_packed_as_it_was_cast(project: Project) -> None:
    before = project.built()
    project.blob("cast", "norm", "model.norm.weight").unlink()
    project.lose_packed()
    shutil.rmtree(project.folder / "build")
    done = outcomes(project.doit())
    assert done == {"computed": {"cast:model:norm"}, "reused": {"pack:model"}}
    assert project.built() == before


@pytest.mark.parametrize(
    ("source", "damage"),
    [
        ("meta", "deleted"),
        ("huggingface", "deleted"),
        ("huggingface", "garbage"),
        ("huggingface", "hidden"),
    ],
    indirect=["source"],
)
def test_a_lost_reference_into_the_checkpoint(source: str, damage: str, tmp_path: Path) -> None:
    """Without a cast, what is quantized lies where the checkpoint has it."""
    project = built(tmp_path, source, quantize={"bits": 4})
    # In Meta's checkpoint joined from the rows of two shards.
    name = "model.layers.1.mlp.up_proj.weight"
    blob = project.blob("cast", "layers.1", name)
    reference = blob.with_name(f"{blob.name}.parts")
    assert not blob.exists()
    if damage == "deleted":
        reference.unlink()
    elif damage == "garbage":
        reference.write_bytes(b"\xff{")
    else:  # by a blob of the same digest, made of another checkpoint, that a power cut left short
        blob.write_bytes(b"short")
    assert project.doit().entries == []
    project.configure(quantize={"bits": 8})
    computed = outcomes(project.doit())["computed"]
    again = {f"{stage}:model:layers.1" for stage in ("extract", "unshard", "cast")}
    assert computed - again == project.quantizing()
    assert project.built() == project.anew()
    assert blob.exists() or json.loads(reference.read_bytes())


def test_a_reference_to_a_file_that_moved(tmp_path: Path) -> None:
    """Two equal checkpoints: the store may know a tensor's place in the one that goes away."""
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    project.doit()
    shutil.copytree(project.checkpoint, project.folder / "copy")
    project.configure("twin", source="copy", quantize={"bits": 4})
    project.doit()
    shutil.rmtree(project.folder / "copy")
    del project.models["twin"]
    project.configure(quantize={"bits": 8})
    computed = outcomes(project.doit())["computed"]
    again = project.tasks(["extract", "unshard", "cast"], pack=False)
    assert computed - again == project.quantizing()
    assert project.built() == project.anew()


@pytest.mark.parametrize(
    ("vocabulary", "first"), [(2048, ["embed_tokens", "lm_head"]), (64, ["embed_tokens"])]
)
@huggingface_only
def test_large_layers_are_made_first(
    source: str, vocabulary: int, first: list[str], tmp_path: Path
) -> None:
    """A head that is larger than the layers would else be made last, by one thread alone."""
    project = create(tmp_path, source, quantize={"bits": 4})
    checkpoints.make("llama", project.checkpoint, vocab_size=vocabulary)
    made = [entry["task"].split(":") for entry in project.doit("-n", "0").entries]
    layers = [f"layers.{i}" for i in range(4)]
    rest = ["norm"] if "lm_head" in first else ["norm", "lm_head"]
    assert [task[2] for task in made if task[0] == "quantize"] == first + layers + rest


def test_a_lost_blob_that_mlx_lm_computed(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface")
    shutil.rmtree(project.checkpoint)
    checkpoints.make("deepseek-v3", project.checkpoint)
    project.configure(quantize={"bits": 4})
    project.doit()
    name = "model.layers.1.self_attn.embed_q.weight"
    project.blob("unshard", "layers.1", name).unlink()
    assert project.doit().entries == []
    project.configure(quantize={"bits": 8})
    done = outcomes(project.doit())
    computed = {task for task in done["computed"] if not task.startswith("quantize:")}
    assert computed - {"cast:model:layers.1"} == {"unshard:model:layers.1", "pack:model"}
    assert project.built() == project.anew()


def test_a_lost_blob_that_torch_extracted(tmp_path: Path) -> None:
    """A `.bin` of the old format holds no plain bytes: they are copied into the store."""
    import torch

    project, plain = (create(tmp_path / name, "huggingface") for name in ("old", "plain"))
    for each, form in ((project, "bin"), (plain, "safetensors")):
        shutil.rmtree(each.checkpoint)
        checkpoints.make("qwen2", each.checkpoint, form=form)
        each.configure(quantize={"bits": 4})
    weights = project.checkpoint / "pytorch_model.bin"
    tensors = torch.load(weights, weights_only=True)
    torch.save(tensors, weights, _use_new_zipfile_serialization=False)
    project.doit("-n", "1")  # one layer after the other
    plain.doit()
    assert project.built() == plain.built()

    project.blob("cast", "layers.1", "model.layers.1.mlp.up_proj.weight").unlink()
    assert project.doit().entries == []
    for each in (project, plain):
        each.configure(quantize={"bits": 8})
    computed = outcomes(project.doit())["computed"]
    again = {"extract:model:layers.1", "cast:model:layers.1", "pack:model"}
    assert {task for task in computed if not task.startswith("quantize:")} <= again
    plain.doit()
    assert project.built() == plain.built()


@pytest.mark.parametrize(
    ("harm", "has_ctime"),
    [(Path.unlink, True), (spoil, True), (spoil, False)],
    ids=["removed", "seen", "unseen"],
    indirect=["has_ctime"],
)
def test_a_lost_blob_whose_checkpoint_is_gone(
    harm: Callable[[Path], None], has_ctime: bool, tmp_path: Path
) -> None:
    project = built(tmp_path, "meta", **FOUR_BIT)
    before = project.built()
    project.blob("cast", "layers.1", "model.layers.1.mlp.down_proj.weight").unlink()
    weights = weight_files(project.checkpoint)
    for path in weights:
        harm(path)
    project.configure(quantize={"bits": 8})
    seen = harm is spoil and has_ctime  # before anything is planned
    done = project.doit(expect=3 if seen else 1)
    fact = f"{weights[0]} is damaged or incomplete" if seen else "layers.1"
    assert fact in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert project.built() == before


@meta_only
def test_a_damaged_action_entry(project: Project) -> None:
    before = project.built()
    for stage, damage in (
        ("extract", lambda entry: b""),
        ("unshard", lambda entry: entry.read_bytes()[:-30]),
        ("cast", lambda entry: b"\xff\x00"),
        ("quantize", lambda entry: project.actions("quantize", "layers.2")[0].read_bytes()),
    ):
        (entry,) = project.actions(stage, "layers.1")
        entry.write_bytes(damage(entry))
        project.manifest(stage, "layers.1").unlink()
        assert outcomes(project.doit()) == {"computed": {f"{stage}:model:layers.1"}}, stage
    assert project.built() == before


def test_a_damaged_action_entry_of_pack(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    before = project.built()
    pack = project.state / "manifests" / "model" / "pack.json"
    for entry in (project.store / "actions").rglob("*.json"):
        if entry.read_bytes() == pack.read_bytes():
            entry.write_bytes(b"{}")
    pack.unlink()
    assert outcomes(project.doit()) == {"computed": {"pack:model"}}
    assert project.built() == before


@meta_only
def test_a_lost_cache(project: Project) -> None:
    """Nothing needs it until something changes; then what is needed is made again."""
    before = project.built()
    shutil.rmtree(project.store / "blobs")
    shutil.rmtree(project.store / "actions")
    assert project.doit().entries == []
    assert project.built() == before
    project.configure(quantize={"bits": 8})
    assert project.quantizing() <= outcomes(project.doit())["computed"]
    assert project.built() == project.anew()


# Equal inputs give equal files.


def test_builds_are_equal_in_any_number_of_threads(source: str, tmp_path: Path) -> None:
    for threads in ("0", "4"):
        project = create(tmp_path / threads, source, **FOUR_BIT, max_shard_size="500kB")
        project.doit("-n", threads)
        assert project.built() == project.anew(), threads
        assert len(project.built()) > 6


# Commands.


@meta_only
def test_one_stage_of_one_target(source: str, tmp_path: Path) -> None:
    project = create(tmp_path, source, **FOUR_BIT)
    project.configure("other", **FOUR_BIT)
    assert outcomes(project.doit("cast:model:layers.0")) == {
        "computed": {f"{stage}:model:layers.0" for stage in ("extract", "unshard", "cast")}
    }
    assert outcomes(project.doit("unshard:model")) == {
        "computed": project.tasks(["extract", "unshard"], pack=False)
        - {f"{stage}:model:layers.0" for stage in ("extract", "unshard")}
    }
    assert outcomes(project.doit("quantize:model:layers.0")) == {
        "computed": {"quantize:model:layers.0"}
    }
    project.doit("quantize:model")
    assert not (project.folder / "build").exists()
    assert outcomes(project.doit("pack:model")) == {"computed": {"pack:model"}}
    assert {path.name for path in (project.folder / "build").iterdir()} == {"model"}
    assert {entry["task"].split(":")[1] for entry in project.doit().entries} == {"other"}


def test_list_and_info(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    before = contents(project.folder)
    listed = [line.split()[0] for line in project.doit("list").stdout.splitlines()]
    by_target = [f"{stage}:model" for stage in [*STAGES, "pack", "measure", "report"]]
    assert listed == [
        *by_target,
        "report",
        "lock",
        "lint",
        "test",
        "bench",
        "evaluate",
        "activations",
        "sensitivity",
    ]
    listed = {line.split()[0] for line in project.doit("list", "--all").stdout.splitlines()}
    assert project.tasks() <= listed
    info = project.doit("info", "pack:model").stdout
    assert "up-to-date" in info
    assert "quantize:model:layers.3" in info
    assert "is not" not in project.doit("info", "cast:model:layers.0").stdout
    assert contents(project.folder) == before


def test_clean(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("other", **FOUR_BIT)
    project.doit()
    before, all_files = project.built(), contents(project.folder)
    project.doit("clean", "pack:model")
    gone = all_files.keys() - contents(project.folder).keys()
    pack = ".mlx-make/manifests/model/pack.json"
    assert gone == {f"build/model/{file}" for file in before} | {pack}
    assert not (project.folder / "build" / "model").exists()
    assert outcomes(project.doit()) == {"reused": {"pack:model"}}

    project.doit("clean", "quantize:model:layers.0")
    gone = all_files.keys() - contents(project.folder).keys()
    assert gone == {".mlx-make/manifests/model/quantize/layers.0.json"}
    assert outcomes(project.doit()) == {"reused": {"quantize:model:layers.0"}}

    project.doit("clean")
    left = contents(project.folder).keys()
    assert not any(name.startswith(("build/", ".mlx-make/manifests/")) for name in left)
    assert {name for name in all_files if "/cache/" in name} <= left
    assert project.checkpoint.exists()
    done = outcomes(project.doit())
    assert done == {"reused": project.tasks() | project.tasks(target="other")}
    assert project.built() == before


def test_clean_of_one_stage(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    before = contents(project.folder)
    project.doit("clean", "quantize:model")
    gone = before.keys() - contents(project.folder).keys()
    assert gone == {
        f".mlx-make/manifests/model/quantize/{layer}.json" for layer in LAYERS["huggingface"]
    }
    assert outcomes(project.doit()) == {"reused": project.tasks(["quantize"], pack=False)}


def test_forget(tmp_path: Path) -> None:
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    for names, forgotten in (
        (["pack:model"], {"pack:model"}),
        (["cast:model"], project.tasks(["cast"], pack=False)),
        (["quantize"], project.tasks(["quantize"], pack=False)),
        (["--all"], project.tasks()),
    ):
        before = contents(project.folder / "build")
        project.doit("forget", *names)
        assert contents(project.folder / "build") == before
        assert outcomes(project.doit()) == {"reused": forgotten}, names
    assert project.doit().entries == []


def test_a_weight_file_that_is_not_of_the_build(tmp_path: Path) -> None:
    """mlx_lm.load would read it: it takes every model*.safetensors."""
    project = built(tmp_path, "huggingface", **FOUR_BIT)
    before = project.built()
    shutil.copy(
        project.folder / "build" / "model" / "model.safetensors",
        project.folder / "build" / "model" / "model-00001-of-00002.safetensors",
    )
    assert outcomes(project.doit()) == {"reused": {"pack:model"}}
    assert project.built() == before
    assert project.doit().entries == []


def test_corrupt_blob_that_several_targets_pack_at_once(tmp_path: Path) -> None:
    """One of them drops it and makes it again while others read it."""
    project = create(tmp_path / "p", "huggingface", **FOUR_BIT)
    names = ["model", *(f"same-{i}" for i in range(5))]
    for name in names:
        project.configure(name, **FOUR_BIT)
    project.doit()
    blob = project.stored("quantize", "layers.3", "model.layers.3.mlp.down_proj.weight")
    for size in ("200kB", "250kB"):
        blob.flip()
        for name in names:
            project.configure(name, max_shard_size=size)
        done = project.doit()
        assert {f"pack:{name}" for name in names} <= {entry["task"] for entry in done.entries}
        for name in names:
            assert project.built(name) == project.anew(name)


@huggingface_only
def test_layers_that_are_up_to_date_are_no_tasks(project: Project) -> None:
    console = ("-r", "console")
    assert project.doit(*console).stdout.splitlines() == []  # nor is packing one
    shutil.rmtree(project.folder / "build")
    assert project.doit(*console).stdout.splitlines() == [".  pack:model"]
    project.configure("other", dtype="float16", quantize={"bits": 8})
    lines = project.doit(*console).stdout.splitlines()
    assert ".  quantize:other:layers.0" in lines
    assert not [line for line in lines if ":model" in line]  # it is untouched: nor is packing one


@huggingface_only
def test_what_is_up_to_date_runs_if_that_is_asked_for(project: Project) -> None:
    assert outcomes(project.doit()) == {}
    assert outcomes(project.doit("-a")) == {"reused": project.tasks()}


@huggingface_only
def test_an_ignored_layer_is_not_up_to_date(project: Project) -> None:
    assert "1 target is up to date" in project.doit().stdout
    project.doit("ignore", "cast:model:layers.0")
    ignored = project.doit()
    assert outcomes(ignored) == {}
    assert "up to date" not in ignored.stdout


@huggingface_only
def test_a_target_is_named_that_was_packed_beside_others(project: Project) -> None:
    for name in ("other", "third"):
        project.configure(name, **FOUR_BIT)
    project.doit()
    shutil.rmtree(project.folder / "build" / "model")
    told = project.doit().stdout
    assert " h\n" not in told
    assert "1 target built in " in told
    assert "2 targets are up to date" in told
