"""Layout `mlx-audio` writes what `mlx_audio.convert` writes: compared to the bit.

A few architectures, one call of doit for all of their targets. `benchmarks/vlm.py` compares all
that mlx-audio has.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from support import inside
from support.differences import json_differences, read_json, weight_differences

pytestmark = pytest.mark.skipif(
    find_spec("mlx_audio") is None, reason="needs pip install 'mlx-make[audio]'"
)

# Of the hub's names; of an encoder that is asked for by alias; a language model that speaks; of
# rope_parameters; of a codec and a tokenizer that its class makes itself; of files that it copies.
ARCHITECTURES = (
    "stt-whisper", "stt-parakeet", "tts-llama", "tts-qwen3_tts", "tts-fish_drama3", "tts-sesame",
    "tts-lingv3_tts",
)  # fmt: skip
RECIPES = ("tts-llama", "tts-sesame")  # to which the peer's recipes fit
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of which each target is built, and converted by the peer into `references`."""
    from support import audio_checkpoints, audio_peer

    folder = tmp_path_factory.mktemp("audio")
    lines = []
    for arch in ARCHITECTURES:
        source = audio_checkpoints.make(arch, folder / "checkpoints" / arch)
        for name, (toml, settings) in audio_peer.SETTINGS.items():
            if name == "mixed_4_6" and arch not in RECIPES:
                continue
            audio_peer.convert(source, folder / "references" / f"{arch}-{name}", **settings)
            lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    (folder / "models.toml").write_text('[defaults]\nlayout = "mlx-audio"\n' + "\n".join(lines))
    done = inside.doit(folder)
    note = "tts-lingv3_tts-plain: what mlx_audio.convert copies for this model beside"
    assert note in done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_build_is_what_mlx_audio_writes(built: Path, arch: str) -> None:
    references = sorted((built / "references").glob(f"{arch}-*"))
    assert len(references) == (5 if arch in RECIPES else 4)
    for reference in references:
        build = built / "build" / reference.name
        found = [*weight_differences(build, reference)]
        for file in INDEX, "config.json":
            ours, theirs = read_json(build / file), read_json(reference / file)
            found += json_differences(f"{file}: ", ours, theirs)
        assert found == [], reference.name
        assert (build / "preprocessor_config.json").exists()


def test_it_is_loaded(built: Path) -> None:
    from mlx_audio.stt.utils import load_model

    folders = (built / each / "stt-whisper-4bit" for each in ("build", "references"))
    encoded = [load_model(folder).encoder(mx.ones((1, 128, 80))) for folder in folders]
    assert mx.isfinite(encoded[0]).all().item()
    assert mx.array_equal(*encoded).item()


def test_what_is_not_filled_is_refused(built: Path) -> None:
    """Of DeepFilterNet mlx-audio loads what it finds, and leaves the rest random."""
    from support import audio_checkpoints

    source = audio_checkpoints.make("sts-deepfilternet", built / "checkpoints" / "deepfilternet")
    toml = f'[models.a]\nsource = "{source}"\nlayout = "mlx-audio"\n'
    (built / "models.toml").write_text(toml)
    done = inside.doit(built, expect=3)
    assert "parameters, which would stay random: model.enc." in done.stdout + done.stderr


def test_of_two_kinds_of_weights_mistral_s_own_are_taken(built: Path) -> None:
    """As Voxtral's repositories hold the model twice, by names that differ."""
    from support import audio_peer

    source = built / "checkpoints" / "both"
    shutil.copytree(built / "checkpoints" / "tts-llama", source)
    arrays = mx.load(str(source / "model.safetensors"))
    mistral = {name: array * 2 for name, array in arrays.items()}
    mx.save_safetensors(str(source / "consolidated.safetensors"), mistral)
    toml = f'[models.a]\nsource = "{source}"\nlayout = "mlx-audio"\n'
    (built / "models.toml").write_text(toml)
    assert 'Read as it does: loader = "mistral"' in inside.doit(built, expect=3).stderr
    (built / "models.toml").write_text(toml + 'loader = "mistral"\n')
    done = inside.doit(built)
    assert "model.safetensors left out: consolidated*.safetensors alone is read" in done.stdout
    assert "reads or copies" not in done.stdout
    peer = audio_peer.convert(source, built / "references" / "both")
    (peer / "consolidated.safetensors").unlink()  # copied, and then its loader reads both
    assert [*weight_differences(built / "build" / "a", peer)] == []
