"""Folders as people have them, read as mlx_lm.convert reads them, or better."""

import contextlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from cache.store import Store
from support import checkpoints, inside, peer, projects
from tasks.checkpoints import loaders, record, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.source import Opening
from tasks.core.errors import CheckpointError
from tasks.layouts import mlx_lm
from tasks.layouts.registry import is_read

INDEX = "model.safetensors.index.json"


def read(folder: Path, cache: Path) -> Checkpoint:
    memos = Store.at(cache).memos
    opening = Opening(is_read, memos, str(folder))
    source = sources.open_source(sources.spec(str(folder), folder), opening)
    return loaders.read(source, None, memos)


def edit_map(folder: Path, change: Callable[[dict], dict]) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def stale_index(folder: Path) -> None:
    edit_map(folder, lambda names: {n: f.replace("-of-", "-of-9") for n, f in names.items()})


def whole_with_stale_index(folder: Path) -> None:
    tensors = {
        n: a for path in folder.glob("model*.safetensors") for n, a in mx.load(str(path)).items()
    }
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def empty_map(folder: Path) -> None:
    edit_map(folder, lambda names: {})


def partial_map(folder: Path) -> None:
    edit_map(folder, lambda names: dict([*names.items()][:2]))


def index_cut_off(folder: Path) -> None:
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-20])


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": null}')


def index_of_a_folder(folder: Path) -> None:
    edit_map(folder, lambda names: {name: f"sub/{file}" for name, file in names.items()})


def adapter_beside(folder: Path) -> None:
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), {"lora_A": mx.zeros((2, 2))})
    (folder / "adapter_config.json").write_text("{}")


def metas_file_beside(folder: Path) -> None:
    torch.save({"norm.weight": torch.zeros(2)}, folder / "consolidated.00.pth")


def mtp_beside(folder: Path) -> None:
    mx.save_safetensors(str(folder / "mtp.safetensors"), {"mtp.0.weight": mx.zeros((2, 2))})
    edit_map(folder, lambda names: {**names, "mtp.0.weight": "mtp.safetensors"})


def mtp_not_fetched(folder: Path) -> None:
    edit_map(folder, lambda names: {**names, "mtp.0.weight": "mtp.safetensors"})


def apple_double(folder: Path) -> None:
    for path in [*folder.iterdir()]:
        (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(40))
    (folder / "._vocab.txt").write_bytes(b"\x00\x05\x16\x07")


def two_rows(folder: Path) -> None:
    """Rows of two names and no index, as of the parts of a model that sees."""
    (folder / INDEX).unlink()
    paths = sorted(folder.glob("model-*.safetensors"))
    paths[-1].rename(folder / "model-other-00001-of-00001.safetensors")
    for number, path in enumerate(paths[:-1], 1):
        path.rename(folder / f"model-{number:05}-of-{len(paths) - 1:05}.safetensors")


def two_rows_of_one_name(folder: Path) -> None:
    """Rows of one name that count otherwise: to remove either would lose half of the model."""
    (folder / INDEX).unlink()
    paths = sorted(folder.glob("model-*.safetensors"))
    paths[-1].rename(folder / "model-00001-of-00001.safetensors")
    for number, path in enumerate(paths[:-1], 1):
        path.rename(folder / f"model-{number:05}-of-{len(paths) - 1:05}.safetensors")


def links_within(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "real.json")
    (folder / "tokenizer.json").symlink_to("real.json")


def byte_order_mark(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")


def bytes_behind(folder: Path) -> None:
    for path in folder.glob("model*.safetensors"):
        with path.open("ab") as file:
            file.write(b"behind")


# The change, what is said of it, and whether mlx_lm loads the folder.
SAME: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "as it is": (lambda folder: None, "", True),
    "stale index": (stale_index, f"{INDEX} is not of these files, and left aside", True),
    "one file, stale index": (whole_with_stale_index, "is not of these files", True),
    "empty map": (empty_map, "", True),
    "partial map": (partial_map, "", True),
    "an index cut off": (index_cut_off, f"{INDEX} is no JSON: ", True),
    "an index without a map": (index_without_map, "It is left aside: no weight file is", True),
    "an index of a folder": (index_of_a_folder, f"{INDEX} has no weight_map", True),
    "an adapter beside": (adapter_beside, "adapter_model.safetensors left out: a LoRA", True),
    "Meta's file beside": (metas_file_beside, "", True),
    "mtp beside": (mtp_beside, "mtp.safetensors left out: model*.safetensors alone is read", True),
    "mtp not fetched": (mtp_not_fetched, "mtp.safetensors left out", True),
    "macOS's files": (apple_double, "", True),
    "two rows": (two_rows, "", True),
    "two rows of one name": (two_rows_of_one_name, "", True),
    "links within": (links_within, "", True),
    "a byte order mark": (byte_order_mark, "", False),
    "bytes behind": (bytes_behind, "", True),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    checkpoints.make("llama", folder)
    assert (folder / INDEX).exists()
    return folder


def test_what_builds_the_same_model(plain: Path, tmp_path: Path) -> None:
    project = projects.Project(tmp_path, "huggingface")
    for number, (change, _, _) in enumerate(SAME.values()):
        shutil.copytree(plain, tmp_path / f"c{number}")
        change(tmp_path / f"c{number}")
        project.configure(f"t{number}", source=f"c{number}", quantize={"bits": 4, "group_size": 32})
    inside.doit(tmp_path)
    built = [project.built(f"t{number}") for number in range(len(SAME))]
    assert [files == built[0] for files in built] == [True] * len(SAME)


@pytest.mark.parametrize("case", SAME)
def test_what_the_peer_loads(case: str, plain: Path, tmp_path: Path) -> None:
    change, words, loads = SAME[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder)
    change(folder)
    checkpoint = read(folder, tmp_path / "cache")
    assert words in " ".join(checkpoint.notes)
    assert bool(words) == bool(checkpoint.notes)
    if not loads:
        with pytest.raises(ValueError, match="BOM"):
            load_model(folder, lazy=True)
        return
    model, _ = load_model(folder, lazy=True)
    assert {name for name, _ in tree_flatten(model.parameters())} == {
        name for name in checkpoint.tensors if "rotary_emb" not in name
    }


def test_a_tensor_in_two_files(plain: Path, tmp_path: Path) -> None:
    """The index decides; mlx_lm takes the one that the file system names last."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder)
    weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
    name, file = next((n, f) for n, f in weight_map.items() if n.endswith("norm.weight"))
    for path in folder.glob("model*.safetensors"):
        tensors = mx.load(str(path))
        wrong = {**tensors, name: mx.zeros_like(mx.load(str(folder / file))[name])}
        if path.name != file:
            mx.save_safetensors(str(path), wrong)
    assert read(folder, tmp_path / "cache").stored[name].file == file
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is both in"):
        read(folder, tmp_path / "cache")


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module."]
)
def test_a_model_that_was_saved_in_a_wrapper(wrapper: str, plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wrapped"
    shutil.copytree(plain, folder)
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(path))
        path.unlink()
    (folder / INDEX).unlink()
    inner = {"0": "_fsdp_wrapped_module.", "1": "_checkpoint_wrapped_module."}
    wrapped = {
        wrapper + re.sub(r"(?<=layers\.)([01])\.", lambda m: f"{m[1]}.{inner[m[1]]}", name): array
        for name, array in tensors.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), wrapped)
    with pytest.raises(ValueError, match="not in model"):
        load_model(folder, lazy=True)
    checkpoint = read(folder, tmp_path / "cache")
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.stored.keys() == wrapped.keys()


def test_a_folder_of_the_hubs_cache(plain: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    shutil.copytree(plain, root / "snapshots" / ("a" * 40))
    checkpoint = read(root, tmp_path / "cache")
    assert checkpoint.folder == root / "snapshots" / ("a" * 40)
    assert checkpoint.source.revision == "a" * 40
    shutil.copytree(plain, root / "snapshots" / ("b" * 40))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read(root, tmp_path / "cache")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("b" * 40)
    assert read(root, tmp_path / "cache").source.revision == "b" * 40


def test_metas_one_file_without_a_number(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "meta")
    shards = [torch.load(path) for path in sorted(project.checkpoint.glob("*.pth"))]
    params = json.loads((project.checkpoint / "params.json").read_bytes())
    for path in project.checkpoint.glob("*.pth"):
        path.unlink()
    folder = project.checkpoint
    whole = {}
    for name, part in shards[0].items():
        others = [shard[name] for shard in shards]
        axis = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
        same = part.ndim == 1
        whole[name] = part if same else torch.cat(others, dim=axis)
    torch.save(whole, folder / "consolidated.pth")
    checkpoint = read(folder, tmp_path / "cache")
    assert checkpoint.stamps.keys() == {"consolidated.pth"}
    assert checkpoint.tensors["layers.0.attention.wq.weight"].shape == (params["dim"],) * 2


def test_what_is_no_model(plain: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"lora_a": mx.zeros((2, 2))})
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter .*Name org/base as source"):
        read(adapter, tmp_path / "cache")
    shutil.copy(plain / "config.json", adapter)  # as trainers save it
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter .*Name org/base as source"):
        read(adapter, tmp_path / "cache")
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    mx.save_safetensors(str(mistral / "consolidated.safetensors"), {"a": mx.zeros((2, 2))})
    (mistral / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has Mistral's own format"):
        read(mistral, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"config\.json is a file\. Name the folder"):
        read(plain / "config.json", tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .*There is one in checkpoint:"):
        read(plain.parent, tmp_path / "cache")
    shutil.copytree(plain, tmp_path / "parts")
    (tmp_path / "parts" / "sub").mkdir()
    for path in (tmp_path / "parts").glob("model*.safetensors"):
        path.rename(path.parent / "sub" / path.name)
    with pytest.raises(CheckpointError, match=r"no pytorch_model\*\.bin\. Its folder sub has some"):
        read(tmp_path / "parts", tmp_path / "cache")


TOKENIZERS = {  # what the peer's tokenizer refuses with a traceback, or without a word of the file
    "tokenizer.json": (b'{"version": "1.0", "mod', "is damaged or incomplete"),
    "tokenizer_config.json": (b"[]", "it is no JSON object"),
    "special_tokens_map.json": (b"\xef\xbb\xbf{}", "it begins with a byte order mark"),
    "added_tokens.json": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "chat_template.jinja": (b"caf\xe9", "it cannot be read"),
}


def test_a_damaged_tokenizer(plain: Path, tmp_path: Path) -> None:
    project = projects.Project(tmp_path, "huggingface")
    for name, (data, _) in TOKENIZERS.items():
        stem = name.partition(".")[0]
        folder = shutil.copytree(plain, tmp_path / stem)
        (folder / name).write_bytes(data)
        with pytest.raises((ValueError, AttributeError)):
            load_tokenizer(folder)
        project.configure(stem, source=stem)
    done = inside.doit(tmp_path, expect=None)
    said = done.stdout + done.stderr
    for name, (_, words) in TOKENIZERS.items():
        stem = name.partition(".")[0]
        assert re.search(rf"{stem}: .*{re.escape(name)} .*{words}", said), name
    assert not done.computed


def test_more_layers_than_tensors(plain: Path, tmp_path: Path) -> None:
    """mlx_lm would make a billion layers first."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers = 1,000,000,000, the weight"):
        read(folder, tmp_path / "cache")


def a_link(folder: Path) -> None:
    (folder.parent / "id_ed25519").write_text("private")
    (folder / "added_tokens.json").symlink_to("../id_ed25519")


def a_link_to_nowhere(folder: Path) -> None:
    (folder / "added_tokens.json").symlink_to("nowhere")


def a_configuration(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "merges.txt")


def a_device(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("/dev/zero")


def a_folder_of_templates(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "tool_use.jinja").write_text("private")
    (folder / "additional_chat_templates").symlink_to("../elsewhere")


OUTSIDE = {
    a_link: r"added_tokens\.json is a link to .*id_ed25519, outside of ",
    a_link_to_nowhere: r"added_tokens\.json cannot be read: No such file",
    a_configuration: r"config\.json is a link to .*elsewhere\.json, outside",
    a_folder_of_templates: r"tool_use\.jinja is a link to .*elsewhere.*, outside",
    a_pipe: r"merges\.txt is no file but a pipe",
    a_device: r"chat_template\.jinja is no file but a device",
}


@pytest.mark.parametrize("change", OUTSIDE, ids=lambda change: change.__name__)
def test_what_must_not_be_copied(
    change: Callable[[Path], None], plain: Path, tmp_path: Path
) -> None:
    """It is told before any work, and nothing of it is in build/ or in the cache."""
    project = projects.Project(tmp_path, "huggingface")
    shutil.copytree(plain, project.checkpoint)
    change(project.checkpoint)
    project.configure()
    done = inside.doit(tmp_path, expect=None)
    assert done.returncode != 0
    assert re.search(OUTSIDE[change], re.sub(r"\s+", " ", done.stdout + done.stderr))
    assert not done.computed
    assert not any((tmp_path / "build").rglob("*"))
    files = [path for path in project.state.rglob("*") if path.is_file()]
    assert not any(b"private" in path.read_bytes() for path in files)


def test_links_into_the_hubs_cache(plain: Path, tmp_path: Path) -> None:
    """A snapshot's, and those that older versions made where a folder was to be downloaded to."""
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    local = tmp_path / "local"
    for folder in (blobs, snapshot, local):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        (local / path.name).symlink_to(blobs / str(number))
    names = {path.name for path in mlx_lm.sources(read(plain, tmp_path / "cache"))}
    for folder in (snapshot, local):
        checkpoint = read(folder, tmp_path / "cache")
        assert {path.name for path in mlx_lm.sources(checkpoint)} == names


def test_what_a_cast_to_float16_loses(tmp_path: Path) -> None:
    """It is counted and named where the peer is silent; the bytes are the same."""
    project = projects.Project(tmp_path, "huggingface")
    folder = checkpoints.make("llama", project.checkpoint, files=1)
    path = folder / "model.safetensors"
    tensors = {name: a.astype(mx.float32) for name, a in mx.load(str(path)).items()}
    large, small = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tiny = "model.layers.2.self_attn.q_proj.weight"
    tensors[large][0, :3] = mx.array([1e5, -1e9, 65504.0])
    tensors[large][1, :2] = mx.array([float("inf"), float("nan")])
    tensors[small] *= -1e-9
    tensors[tiny][0, 0] = 1e-20  # one of so many is no news
    mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})
    project.configure("half", dtype="float16")
    project.configure("wide", dtype="bfloat16")
    said = inside.doit(tmp_path).stdout
    notes = [line for line in said.splitlines() if "too large" in line or "too small" in line]
    size = tensors[large].size
    assert [note.partition("note: ")[2] for note in notes] == [
        f"half: {large}: 2 of {size:,} values are too large for float16, and infinite in it; "
        'dtype = "bfloat16" holds them',
        f"half: {small}: {size:,} of {size:,} values are too small for float16, and zero in it; "
        'dtype = "bfloat16" holds them',
    ]
    reference = peer.convert(folder, tmp_path / "peer", dtype="float16")
    theirs = mx.load(str(reference / "model.safetensors"))
    ours = mx.load(str(tmp_path / "build" / "half" / "model.safetensors"))
    for name in (large, small, tiny):
        assert mx.array_equal(ours[name], theirs[name], equal_nan=True)


def test_nvfp4_of_small_weights(tmp_path: Path) -> None:
    """Its scales have 8 bits: the peer writes zeros without a word."""
    project = projects.Project(tmp_path, "huggingface")
    folder = checkpoints.make("llama", project.checkpoint, files=1)
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] *= 1e-3
    mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})
    project.configure("small", quantize={"mode": "nvfp4"})
    said = inside.doit(tmp_path).stdout
    assert said.count("is zero in nvfp4") == 1
    assert f"note: small: {name}.weight is zero in nvfp4: all of its scales are" in said
    built = mx.load(str(tmp_path / "build" / "small" / "model.safetensors"))
    assert not mx.any(built[f"{name}.scales"]).item()


def test_additional_chat_templates(plain: Path, tmp_path: Path) -> None:
    """As the peer, which has transformers load and save them; also where the record is all."""
    project = projects.Project(tmp_path, "huggingface")
    shutil.copytree(plain, project.checkpoint)
    templates = project.checkpoint / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "._tool_use.jinja").write_bytes(b"\x00\x05\x16\x07")
    project.configure(quantize={"bits": 4})
    inside.doit(tmp_path)
    built = tmp_path / "build" / "model" / "additional_chat_templates"
    assert [path.name for path in built.iterdir()] == ["tool_use.jinja"]
    tokenizer = load_tokenizer(tmp_path / "build" / "model")
    assert tokenizer.chat_template["tool_use"] == "{{ tools }}"
    locked = json.loads((tmp_path / "models.lock").read_bytes())
    (source,) = locked["sources"].values()
    assert "additional_chat_templates/tool_use.jinja" in source["files"]
    shutil.rmtree(tmp_path / "build")
    shutil.rmtree(project.checkpoint)
    inside.doit(tmp_path)
    assert (built / "tool_use.jinja").read_text() == "{{ tools }}"


@pytest.mark.parametrize("name", ["..", "../b", "/etc", "a/b", "/", "", "."])
def test_names_that_lead_out_of_a_record(name: str) -> None:
    assert not record._is_below(name)
    assert not record._is_below(f"additional_chat_templates/{name}")
    assert record._is_below("additional_chat_templates/a.jinja")


def test_layers_of_multi_token_prediction(tmp_path: Path) -> None:
    """DeepSeek's class drops layer 61, whatever the depth: the peer fails on any other."""
    project = projects.Project(tmp_path, "huggingface")
    folder = checkpoints.make("deepseek-v3", project.checkpoint, files=1)
    path = folder / "model.safetensors"
    tensors = {n.replace("layers.61.", "layers.3."): a for n, a in mx.load(str(path)).items()}
    extra = [name for name in tensors if "layers.3." in name]
    assert extra
    mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"Received {len(extra)} parameters not in model"):
        load_model(folder, lazy=True)
    shutil.copytree(folder, tmp_path / "without")
    fewer = {name: array for name, array in tensors.items() if name not in extra}
    whole = tmp_path / "without" / "model.safetensors"
    mx.save_safetensors(str(whole), fewer, metadata={"format": "pt"})
    load_model(tmp_path / "without", lazy=True)
    settings = {"quantize": {"bits": 4, "group_size": 32}}
    project.configure("with", **settings)
    project.configure("without", source="without", **settings)
    said = inside.doit(tmp_path).stdout
    assert f"note: with: {len(extra)} tensors of multi-token prediction left out: " in said
    assert 'layout = "mlx-vlm-mtp" makes a drafter of such tensors' in said
    assert project.built("with") == project.built("without")
    assert inside.doit(tmp_path).entries == []


SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "rotary_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "num_shared_experts": 1, "n_shared_experts": 1, "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "norm_head": False, "norm_softmax": False,
    "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "rope_scaling": None, "attention_bias": False, "partial_rotary_factor": 0.5,
    "rope_parameters": {
        "rope_theta": 1e4, "rope_type": "default", "type": "default", "factor": 1.0,
        "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip
# A class, where its checkpoints have these layers, how config.json says so, and whether mlx-lm
# takes them.
PREDICTORS = {
    "bailing": ("bailing_moe", "model.layers.2", {"num_nextn_predict_layers": 1}, False),
    "minimax": ("minimax", "model.layers.2", {"use_mtp": True, "num_mtp_modules": 1}, False),
    "mistral": ("mistral4", "mtp.layers.0", {}, False),
    "qwen": ("qwen3_5", "mtp.layers.0", {}, True),
    "glm": ("glm4_moe", "model.layers.2", {"num_nextn_predict_layers": 1}, True),
    "unsaid": ("qwen3", "model.layers.2", {}, None),  # a config.json of too few layers, perhaps
}


def test_layers_of_multi_token_prediction_of_other_classes(tmp_path: Path) -> None:
    project = projects.Project(tmp_path, "huggingface")
    settings = {"quantize": {"bits": 4, "group_size": 32}}
    for name, (kind, prefix, said, taken) in PREDICTORS.items():
        module = importlib.import_module(f"mlx_lm.models.{kind}")
        config = {**SMALL, "model_type": kind}
        model = module.Model(module.ModelArgs.from_dict(config))
        tensors = {n: a.astype(mx.bfloat16) for n, a in tree_flatten(model.parameters())}
        layer = {n.split("layers.1.")[1]: a for n, a in tensors.items() if "layers.1." in n}
        layer["eh_proj.weight"] = mx.ones((64, 128), mx.bfloat16)
        extra = {f"{prefix}.{n}": array for n, array in layer.items()}
        for folder, held in ((f"{name}-without", tensors), (name, tensors | extra)):
            (tmp_path / folder).mkdir()
            path = tmp_path / folder / "model.safetensors"
            mx.save_safetensors(str(path), held, metadata={"format": "pt"})
            (tmp_path / folder / "config.json").write_text(json.dumps(config | said))
            checkpoints.write_tokenizer(tmp_path / folder)
            project.configure(folder, source=folder, **settings)
        with contextlib.nullcontext() if taken else pytest.raises(ValueError, match="not in model"):
            load_model(tmp_path / name, lazy=True)
    done = inside.doit(tmp_path, expect=1)
    for name, (*_, taken) in PREDICTORS.items():
        noted = re.search(
            rf"^note: {name}: \d+ tensors of multi-token prediction", done.stdout, re.M
        )
        assert bool(noted) == (taken is not None), name
        if taken is not None:
            assert project.built(name) == project.built(f"{name}-without"), name
    assert not (tmp_path / "build" / "unsaid").exists()
    assert "Received 12 parameters not in model" in done.stdout
