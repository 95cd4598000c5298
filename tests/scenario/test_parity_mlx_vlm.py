"""Layout `mlx-vlm` writes what `mlx_vlm.convert` writes: built by both, compared to the bit.

A few architectures under the hub's names, one call of doit for all of their targets.
`benchmarks/vlm.py` compares all that mlx-vlm has.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from support import inside
from support.differences import json_differences, read_json, weight_differences
from tasks.core.spec import Quality
from tasks.quality import text

pytestmark = pytest.mark.skipif(
    find_spec("mlx_vlm") is None, reason="needs pip install 'mlx-make[vlm]'"
)

# Towers of pictures, of sounds; experts that are split, and those that are stacked.
ARCHITECTURES = ("gemma4", "idefics3", "kimi_vl", "qwen2_5_vl", "qwen3_vl_moe")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of which each target is built, and converted by the peer into `references`."""
    from support import vlm_checkpoints, vlm_peer

    folder = tmp_path_factory.mktemp("vlm")
    lines = []
    for arch in ARCHITECTURES:
        source = vlm_checkpoints.make(arch, folder / "checkpoints" / arch)
        for name, (toml, settings) in vlm_peer.SETTINGS.items():
            vlm_peer.convert(source, folder / "references" / f"{arch}-{name}", **settings)
            lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    (folder / "models.toml").write_text('[defaults]\nlayout = "mlx-vlm"\n' + "\n".join(lines))
    inside.doit(folder)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_build_is_what_mlx_vlm_writes(built: Path, arch: str) -> None:
    references = sorted((built / "references").glob(f"{arch}-*"))
    assert len(references) == 5
    for reference in references:
        build = built / "build" / reference.name
        found = [*weight_differences(build, reference)]
        for name in INDEX, "config.json":
            ours, theirs = read_json(build / name), read_json(reference / name)
            found += json_differences(f"{name}: ", ours, theirs)
        assert found == [], reference.name
        assert (build / "preprocessor_config.json").exists()


def test_nothing_is_built_again(built: Path) -> None:
    assert inside.doit(built).entries == []


def test_towers_are_quantized_by_rules_alone(built: Path) -> None:
    """What mlx-vlm leaves in floats, and what its loader reads of them all the same."""
    from mlx_vlm.utils import load_model

    (built / "models.toml").write_text(
        '[models.tower]\nsource = "checkpoints/qwen2_5_vl"\nlayout = "mlx-vlm"\n'
        'quantize = { bits = 4, rules = [{ match = "vision_tower.blocks.*", bits = 8 }] }\n'
    )
    done = inside.doit(built)
    plain = mx.load(str(built / "references" / "qwen2_5_vl-4bit" / "model.safetensors"))
    found = mx.load(str(built / "build" / "tower" / "model.safetensors"))
    name = "vision_tower.blocks.0.attn.qkv"
    with mx.stream(mx.default_device()):
        expected = mx.quantize(plain[f"{name}.weight"], 64, 8)
    for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(found[f"{name}.{part}"], array)
    assert {task.split(":")[0] for task in done.computed} == {"quantize", "pack"}
    assert all(":vision_tower." in task for task in done.computed if "pack" not in task)
    model = load_model(built / "build" / "tower")
    assert model.vision_tower.blocks[0].attn.qkv.bits == 8
    assert mx.array_equal(model.vision_tower.blocks[0].attn.qkv.weight, expected[0])


def test_what_mlx_vlm_converts_is_verified(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is told from its tensors."""
    monkeypatch.chdir(built)
    source = ("--source", "checkpoints/qwen3_vl_moe")
    status, out, err = inside.run(built, "verify", "--all", *source, "references/qwen3_vl_moe-4bit")
    assert (status, err) == (0, "")
    assert out.endswith("made anew from checkpoints/qwen3_vl_moe\n")


def test_a_picture_is_seen_as_by_the_peer(tmp_path: Path) -> None:
    """`mlx_vlm.load` takes the folder with its processor: the logits are those of the peer's."""
    import mlx_vlm
    from PIL import Image

    from support import vlm_checkpoints, vlm_peer

    ids = {
        name: 270 + i
        for i, name in enumerate(("image_pad", "video_pad", "vision_start", "vision_end"))
    }
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    tokens = {f"{name.replace('_pad', '')}_token_id": number for name, number in ids.items()}
    more = {**tokens, **rope, "text_config": rope, "vision_config": {"fullatt_block_indexes": [1]}}
    source = vlm_checkpoints.make("qwen2_5_vl", tmp_path / "checkpoint", more)
    tokenizer = read_json(source / "tokenizer.json")
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": number, "content": f"<|{name}|>", "special": True, **special}
        for name, number in ids.items()
    ]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    pixels = {"min_pixels": 3136, "max_pixels": 3136, "merge_size": 2, "temporal_patch_size": 2}
    (source / "preprocessor_config.json").write_text(json.dumps(processor | pixels))
    reference = vlm_peer.convert(source, tmp_path / "reference", quantize=True, q_bits=4)
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "checkpoint"\nlayout = "mlx-vlm"\nquantize = { bits = 4 }\n'
    )
    inside.doit(tmp_path)
    logits = []
    for folder in (tmp_path / "build" / "a", reference):
        model, ready = mlx_vlm.load(str(folder))
        given = mlx_vlm.prepare_inputs(
            ready,
            images=[Image.radial_gradient("L").convert("RGB")],
            prompts="<|vision_start|><|image_pad|><|vision_end|>the layer",
            image_token_index=model.config.image_token_id,
        )
        grid = given["image_grid_thw"]
        made = model(given["input_ids"], given["pixel_values"], image_grid_thw=grid)
        logits.append(made.logits)
    assert given["pixel_values"].shape[0] == 16
    assert mx.isfinite(logits[0]).all().item()
    assert mx.array_equal(*logits).item()


def test_what_of_the_author_s_is_left_out_is_said(built: Path) -> None:
    """What the peer copies besides: other JSON, and folders."""
    source = built / "checkpoints" / "kimi_vl"
    (source / "original").mkdir()
    (source / "extra.json").write_text("{}")
    (built / "models.toml").write_text(
        '[models.a]\nsource = "checkpoints/kimi_vl"\nlayout = "mlx-vlm"\n'
    )
    done = inside.doit(built)
    said = "left out, which mlx_vlm.convert copies (extra.json, original/): what the model needs"
    assert said in done.stdout + done.stderr


def test_it_is_run_on_text(built: Path) -> None:
    """Block by block, as mlx-vlm's language model is by itself; GPTQ looks into the same blocks."""
    from mlx_vlm.utils import load_model
    from transformers import PreTrainedTokenizerFast

    (built / "models.toml").write_text(
        "[quality]\nsamples = 2\nsequence_length = 16\n"
        '[models.plain]\nsource = "checkpoints/qwen2_5_vl"\nlayout = "mlx-vlm"\n'
        '[models.a]\nsource = "checkpoints/qwen2_5_vl"\nlayout = "mlx-vlm"\n'
        'quantize = { bits = 4, method = "gptq" }\n'
    )
    done = inside.doit(built, "pack", "evaluate:a")
    said = re.search(r"^a: perplexity ([\d.]+), of the teacher ([\d.]+)", done.stdout, re.M)
    assert said is not None
    assert "runs whole" not in done.stdout
    assert any(":layers.1" in task for task in done.computed if task.startswith("hessians:a"))
    assert not any("vision" in task for task in done.computed if task.startswith("hessians:a"))
    for folder, number in zip(("a", "plain"), said.groups(), strict=True):
        model = load_model(built / "build" / folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(built / "build" / folder)
        documents = text.evaluation(Quality())
        tokens = mx.array(text.windows(documents, tokenizer, samples=2, length=16, seed=0))
        logits = model.language_model(tokens[:, :-1]).logits.astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        assert float(number) == pytest.approx(mx.exp(losses.mean()).item(), rel=1e-3)


def test_the_text_alone(built: Path) -> None:
    """Without a layout, of the same checkpoint: a note says what is left out, and what keeps it."""
    (built / "models.toml").write_text(
        '[models.text]\nsource = "checkpoints/gemma4"\nquantize = { bits = 4 }\n'
    )
    done = inside.doit(built)
    said = done.stdout + done.stderr
    assert 'layout = "mlx-vlm" keeps them (preprocessor_config.json)' in said
    towers = 'as mlx_lm.convert does: layout = "mlx-vlm" keeps them (model.audio_tower.'
    assert towers in said
    assert done.computed == {"pack:text"}  # the layers are those of the other layout
    config = json.loads((built / "build" / "text" / "config.json").read_bytes())
    assert "vision_config" not in config
