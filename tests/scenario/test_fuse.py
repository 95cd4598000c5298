"""Adapters, fused with the models that they were trained on."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from support import adapters, checkpoints, formats, hub_server, inside, packed, peer, projects
from support.differences import weight_differences
from support.hub_server import Flipped


def fused(source: Path, adapter: Path) -> dict[str, mx.array]:
    """What `mlx_lm.fuse` makes."""
    model, _ = load_model(source)
    model = load_adapters(model, str(adapter))
    new = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(new))
    return dict(tree_flatten(model.parameters()))


def weights(folder: Path) -> dict[str, mx.array]:
    return {k: v for p in folder.glob("model*.safetensors") for k, v in mx.load(str(p)).items()}


@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", "lora"), ("llama", "dora"), ("qwen3-moe", "experts")]
)
def test_what_mlx_lm_trained(arch: str, kind: str, tmp_path: Path) -> None:
    """To the bit as mlx_lm.fuse; of another adapter, only what it changes is made."""
    source = checkpoints.make(arch, tmp_path / "checkpoint")
    adapter = adapters.make(source, tmp_path / "first", kind)
    other = adapters.make(source, tmp_path / "second", kind, seed=1)
    toml = tmp_path / "models.toml"
    lines = '[models.model]\nsource = "checkpoint"\nadapter = "first"\n'
    toml.write_text(f"{lines}[quality]\nsamples = 2\nsequence_length = 16\n")
    inside.doit(tmp_path)
    if kind == "dora":  # of which float32 weights come, and so does all that is run with them
        assert "float32" in {
            str(a.dtype)[9:] for a in weights(tmp_path / "build" / "model").values()
        }
        inside.doit(tmp_path, "evaluate")
    expected = fused(source, adapter)
    found = weights(tmp_path / "build" / "model")
    assert found.keys() == expected.keys()
    assert all(
        found[n].dtype == e.dtype and mx.array_equal(found[n], e) for n, e in expected.items()
    )
    toml.write_text(f'{lines}[models.model.variants.other]\nadapter = "{other}"\nquantize = {{}}\n')
    done = inside.doit(tmp_path)
    stages = {task.split(":")[0] for task in done.computed}
    assert stages == {"fuse", "quantize", "pack"}


def test_a_checkpoint_quantized_after_fusing(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "checkpoint")
    adapter = adapters.make(source, tmp_path / "adapter", "lora")
    plain = checkpoints.make("llama", tmp_path / "fused")
    for path in plain.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(plain / "model.safetensors"), fused(source, adapter), {"format": "mlx"})
    reference = peer.convert(plain, tmp_path / "peer", quantize=True, q_bits=4)
    (tmp_path / "models.toml").write_text(
        '[models.model]\nsource = "checkpoint"\nadapter = "adapter"\nquantize = { bits = 4 }\n'
    )
    inside.doit(tmp_path)
    assert [*weight_differences(tmp_path / "build" / "model", reference)] == []


PEFT = {
    "lora": {"r": 4, "lora_alpha": 6},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True,
                 "alpha_pattern": {"layers.1.mlp.up_proj": 5}, "modules_to_save": ["lm_head"]},
    "dora": {"r": 4, "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "k_proj"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # peft's and transformers', of each other
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_trained(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = checkpoints.make("llama", tmp_path / "checkpoint")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "up_proj"], **PEFT[kind]}
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    (tmp_path / "models.toml").write_text(
        '[models.model]\nsource = "checkpoint"\nadapter = "adapter"\ndtype = "float32"\n'
    )
    inside.doit(tmp_path)
    found = weights(tmp_path / "build" / "model")
    plain = weights(source)
    for name, array in found.items():
        expected = mx.array(merged[name].numpy())
        assert mx.allclose(array, expected, rtol=1e-5, atol=1e-6), name
    changed = {n for n in found if not mx.array_equal(found[n], plain[n].astype(mx.float32))}
    assert len(changed) >= 2


def test_experts_that_peft_adapted_together(tmp_path: Path) -> None:
    """As transformers 5 has them: of all experts at once, of which MLX has other stacks."""
    source = checkpoints.make("qwen3-moe", tmp_path / "checkpoint")
    config = json.loads((source / "config.json").read_text())
    experts, hidden, wide = (
        config[key] for key in ("num_experts", "moe_intermediate_size", "hidden_size")
    )
    layer = "model.layers.0.mlp"
    path = f"base_model.model.{layer}.experts"
    shapes = {
        f"{path}.base_layer.lora_A.weight": (experts * 6, wide),
        f"{path}.base_layer.lora_B.weight": (2 * hidden, experts * 6),
        f"{path}.lora_A.weight": (experts * 2, hidden),
        f"{path}.lora_B.weight": (wide, experts * 2),
        f"base_model.model.{layer}.gate.lora_A.weight": (3, wide),
        f"base_model.model.{layer}.gate.lora_B.weight": (experts, 3),
    }
    tensors = {n: checkpoints.random_array(n, s, dtype="float32") for n, s in shapes.items()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors)
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [],
        "target_parameters": ["gate.weight", "gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 6, r".*gate.weight": 3, "gate": 5},
        "alpha_pattern": {r".*\.gate_up_proj": 12},
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    lines = '[models.model]\nsource = "checkpoint"\ndtype = "float32"\n'
    (tmp_path / "models.toml").write_text(
        f'{lines}[models.model.variants.adapted]\nadapter = "adapter"\n'
    )
    inside.doit(tmp_path)
    plain, found = (
        {n: np.array(a) for n, a in weights(tmp_path / "build" / name).items()}
        for name in ("model", "model-adapted")
    )
    a, b, small_a, small_b, gate_a, gate_b = (np.array(each) for each in tensors.values())

    def added(b: np.ndarray, a: np.ndarray) -> np.ndarray:  # PEFT's get_delta_weight
        a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts)
        return np.einsum("ore,eri->eoi", b, a)

    both = 2 * added(b, a)
    expected = plain | {
        f"{layer}.switch_mlp.{part}.weight": plain[f"{layer}.switch_mlp.{part}.weight"] + more
        for part, more in (
            ("gate_proj", both[:, :hidden]),
            ("up_proj", both[:, hidden:]),
            ("down_proj", 3 * added(small_b, small_a)),
        )
    }
    expected[f"{layer}.gate.weight"] = plain[f"{layer}.gate.weight"] + 2 * gate_b @ gate_a
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_base_that_is_packed(tmp_path: Path) -> None:
    """Under other names than its plain weights have, which the adapter was trained on."""
    source = tmp_path / "packed"
    plain = checkpoints.make("qwen3-moe", tmp_path / "checkpoint")
    plain = packed.repack(plain, source, *formats.FORMATS["gptq-4"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {}
    for module in ("self_attn.q_proj", "mlp.experts.1.down_proj"):
        path = f"model.layers.0.{module}"
        rows, columns = weights(plain)[f"{path}.weight"].shape
        for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
            name = f"base_model.model.{path}.lora_{part}.weight"
            tensors[name] = checkpoints.random_array(name, shape, dtype="float32")
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    lines = "".join(
        f'[models.{name}]\nsource = "{folder}"\nadapter = "adapter"\ndtype = "float32"\n'
        for name, folder in (("plain", plain), ("packed", source))
    )
    (tmp_path / "models.toml").write_text(lines)
    inside.doit(tmp_path)
    built = tmp_path / "build"
    assert [*weight_differences(built / "packed", built / "plain")] == []


def test_what_peft_changed_the_base_for(tmp_path: Path) -> None:
    """Factors that stand for a part of the base, which PEFT takes off before it adds them."""
    source = checkpoints.make("llama", tmp_path / "checkpoint")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_{each}.weight": mx.zeros((4, 4)) for each in "AB"}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors)
    (tmp_path / "models.toml").write_text(
        f'[models.model]\nsource = "{source}"\nadapter = "adapter"\n'
    )
    for key, value in (("init_lora_weights", "pissa_niter_4"), ("layer_replication", [[0, 2]])):
        settings = {"peft_type": "LORA", "r": 4, key: value}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        said = " ".join(inside.doit(tmp_path, "plan", expect=3).stderr.split())
        assert f"{key} = " in said
        assert "merge_and_unload" in said


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    source = checkpoints.make("llama", tmp_path / "checkpoint")
    adapter = adapters.make(source, tmp_path / "adapter", "lora")
    name = "model.layers.9.self_attn.q_proj.lora_a"
    path = adapter / "adapters.safetensors"
    mx.save_safetensors(str(path), {**mx.load(str(path)), name: mx.zeros((4, 4))})
    toml = tmp_path / "models.toml"
    toml.write_text('[models.model]\nsource = "checkpoint"\nadapter = "adapter"\n')
    done = inside.doit(tmp_path, "plan", expect=3)
    said = done.stdout + done.stderr
    assert f"1 tensor of it fit nowhere in the model ({name})" in " ".join(said.split())
    toml.write_text('[models.model]\nsource = "adapter"\n')
    done = inside.doit(tmp_path, "plan", expect=3)
    said = " ".join((done.stdout + done.stderr).split())
    assert "is a LoRA adapter (adapters.safetensors) and no model" in said


def but_card(folder: Path) -> dict[str, str]:
    """The digest of each file of a built model, but for the card: it has the source's name."""
    built = projects.contents(folder)
    return {name: digest for name, digest in built.items() if name != "README.md"}


def test_an_adapter_on_the_hub(tmp_path: Path) -> None:
    """At one commit until it is told to move, fetched once, and none but the hub's bytes."""
    source = checkpoints.make("llama", tmp_path / "checkpoint")
    first = adapters.make(source, tmp_path / "first", "lora")
    second = adapters.make(source, tmp_path / "second", "lora", seed=1)
    with hub_server.serve(tmp_path / "uploaded") as hub, hub.inside(tmp_path / "home"):
        hub.repository("org/model").add_folder(source)
        repository = hub.repository("org/lora")
        model = '[models.model]\nsource = "hf:org/model"\nquantize = { bits = 4 }\nadapter = '
        expected = []
        for adapter in (first, second):
            (tmp_path / "models.toml").write_text(f'{model}"{adapter}"\n')
            inside.doit(tmp_path)
            expected.append(but_card(tmp_path / "build/model"))
        assert expected[0] != expected[1]

        project, old = tmp_path / "project", repository.add_folder(first)
        project.mkdir()
        (project / "models.toml").write_text(f'{model}"hf:org/lora"\n')
        (weights,) = (file for file in repository.files.values() if file.large)
        size, sha256 = weights.content.size, weights.content.sha256
        hub.fault = lambda asked: Flipped(2000) if sha256 in asked.path else None
        for command in ("plan", "run"):
            told = inside.doit(project, command, expect=3).stderr
            assert "is not the file that it has at commit" in " ".join(told.split())
        assert not (project / "build").exists()
        hub.fault = lambda asked: None
        del hub.requests[:]
        for command, status in (("plan", 1), ("plan", 1), ("run", 0)):
            inside.doit(project, command, expect=status)
        assert but_card(project / "build/model") == expected[0]
        assert sum(request.sent for request in hub.asked(path=sha256)) == size
        card = (project / "build/model/README.md").read_text()
        assert "\nbase_model_relation: finetune\n" in card
        assert f"[org/lora](https://huggingface.co/org/lora) at commit `{old}` fused" in card
        assert f'\nadapter = "hf:org/lora@{old}"\n' in card
        locked = json.loads((project / "models.lock").read_bytes())["adapters"]["hf:org/lora"]
        assert locked["revision"] == old
        assert locked["hashes"]["adapters.safetensors"] == [size, f"sha256:{sha256}"]

        new = repository.add_folder(second)
        clone = tmp_path / "clone"
        clone.mkdir()
        for name in ("models.toml", "models.lock"):
            (clone / name).write_bytes((project / name).read_bytes())
        inside.doit(clone, "--locked")
        assert but_card(clone / "build/model") == expected[0]
        assert inside.doit(project).computed == set()
        told = inside.doit(project, "lock").stdout
        assert f"adapter hf:org/lora moved from commit {old} to {new}: adapters.saf" in told
        assert "model has other set" in inside.doit(project, "--locked", expect=3).stderr
        done = inside.doit(project)
        stages = {task.split(":")[0] for task in done.computed}
        assert stages == {"extract", "fuse", "quantize", "pack"}
        assert but_card(project / "build/model") == expected[1]
