"""Layout `mlx-embeddings` writes what `mlx_embeddings.convert` writes: compared to the bit.

A few architectures, one call of doit for all of their targets. `benchmarks/vlm.py` compares all
that mlx-embeddings has.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from support import inside
from support.differences import json_differences, read_json, weight_differences

pytestmark = pytest.mark.skipif(
    find_spec("mlx_embeddings") is None, reason="needs pip install 'mlx-make[embeddings]'"
)

ARCHITECTURES = ("bert", "gemma3_text", "qwen3_vl", "siglip")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of which each target is built, and converted by the peer into `references`."""
    from support import embeddings_checkpoints, embeddings_peer

    folder = tmp_path_factory.mktemp("embeddings")
    lines = []
    for arch in ARCHITECTURES:
        source = embeddings_checkpoints.make(arch, folder / "checkpoints" / arch)
        for name, (toml, settings) in embeddings_peer.SETTINGS.items():
            embeddings_peer.convert(source, folder / "references" / f"{arch}-{name}", **settings)
            lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    (folder / "models.toml").write_text(
        '[defaults]\nlayout = "mlx-embeddings"\n' + "\n".join(lines)
    )
    inside.doit(folder)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_build_is_what_mlx_embeddings_writes(built: Path, arch: str) -> None:
    names = ("plain", "bfloat16", "4bit", "mxfp4")
    for name in names:
        build, reference = (built / each / f"{arch}-{name}" for each in ("build", "references"))
        found = [*weight_differences(build, reference)]
        for file in INDEX, "config.json":
            ours, theirs = read_json(build / file), read_json(reference / file)
            if arch == "siglip":  # with which the peer's own loader refuses what it wrote
                theirs.get("vision_config", {}).pop("skip_vision", None)
            found += json_differences(f"{file}: ", ours, theirs)
        assert found == [], name
        beside = {path.name for path in reference.glob("*.json")}
        assert {path.name for path in build.glob("*.json")} >= beside


def test_it_is_loaded_and_says_the_same(built: Path) -> None:
    """A rule for a tower is read, too; SigLIP's size of pictures is in the target's name."""
    from mlx_embeddings.utils import load_model

    (built / "models.toml").write_text(
        '[models.tower-patch16-64]\nsource = "checkpoints/siglip"\nlayout = "mlx-embeddings"\n'
        'quantize = { bits = 4, rules = [{ match = "vision_model.*.fc1", bits = 8 }] }\n'
    )
    inside.doit(built)
    tokens = mx.array([[5, 9, 17, 4]])
    made = []
    for folder in built / "build" / "bert-4bit", built / "references" / "bert-4bit":
        made.append(load_model(folder)(tokens).text_embeds)
    assert mx.isfinite(made[0]).all().item()
    assert mx.array_equal(*made).item()
    name = str(built / "build" / "tower-patch16-64")
    tower = load_model(Path(name), path_to_repo=name).vision_model.vision_model
    assert tower.encoder.layers[0].mlp.fc1.bits == 8
    assert not hasattr(tower.encoder.layers[0].mlp.fc2, "bits")


def test_what_mlx_embeddings_converts_is_verified(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layout is told from its tensors."""
    monkeypatch.chdir(built)
    source = ("--source", "checkpoints/bert")
    status, out, err = inside.run(built, "verify", "--all", *source, "references/bert-4bit")
    assert (status, err) == (0, "")
    assert out.endswith("made anew from checkpoints/bert\n")


def test_parts_in_folders(built: Path) -> None:
    """As sentence-transformers saves EmbeddingGemma's head."""
    from support import embeddings_peer

    source = built / "checkpoints" / "parts"
    shutil.copytree(built / "checkpoints" / "gemma3_text", source)
    arrays = mx.load(str(source / "model.safetensors"))
    mx.eval(arrays)
    for number in range(2):
        (source / f"{number + 2}_Dense").mkdir()
        head = {"linear.weight": arrays.pop(f"dense.{number}.weight")}
        mx.save_safetensors(str(source / f"{number + 2}_Dense" / "model.safetensors"), head)
    mx.save_safetensors(str(source / "model.safetensors"), arrays)
    toml = '[models.a]\nsource = "checkpoints/parts"\nlayout = "mlx-embeddings"\n'
    (built / "models.toml").write_text(toml)
    inside.doit(built)
    assert read_json(built / "models.lock")["sources"]["checkpoints/parts"]["files"].keys() >= {
        "2_Dense/model.safetensors", "3_Dense/model.safetensors",
    }  # fmt: skip
    peer = embeddings_peer.convert(source, built / "references" / "parts")
    assert [*weight_differences(built / "build" / "a", peer)] == []
    (built / "models.toml").write_text(toml.replace("embeddings", "lm"))
    done = inside.doit(built)  # mlx-lm has the model, and not what follows it
    assert "left out, of what follows the model (2_Dense/model.safetensors," in done.stdout
    (source / "deeper").mkdir()
    (source / "2_Dense").rename(source / "deeper" / "2_Dense")
    (built / "models.toml").write_text(toml)
    assert "deeper/2_Dense/model.safetensors as parts" in inside.doit(built, expect=3).stderr
