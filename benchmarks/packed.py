"""packed: quantized checkpoints and adapters at size, beside the same without, and mlx-lm's own.

    python benchmarks/packed.py blocks       # 8 B shape in block FP8 to 4 bits, beside bfloat16
    python benchmarks/packed.py experts      # 60 layers x 64 tiny experts in FP8: mlx_lm.convert
    python benchmarks/packed.py plan         # planning DeepSeek-V3, 90,427 tensors in sparse files
    python benchmarks/packed.py adapter      # a second adapter on 1.1 B: mlx_lm.fuse and convert

Each is run in turn with what it is compared with, ``--repeats`` times, with an empty cache; medians
of wall and processor time, all descendants included, and ratios of these.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from measure import BenchmarkError, Usage, measure

BLOCK = 128
POOL = 3_999_992  # random numbers that all tensors are made of
OCTETS = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "moe_layer_freq": 1, "first_k_dense_replace": 3, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "attention_bias": False, "torch_dtype": "bfloat16",
    "quantization_config": FP8,
}  # fmt: skip
TINY_EXPERTS = {
    "num_hidden_layers": 60, "n_routed_experts": 64, "hidden_size": 128, "intermediate_size": 256,
    "moe_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    "kv_lora_rank": 128, "q_lora_rank": 128, "vocab_size": 512, "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096,
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
Header = tuple[str, tuple[int, ...]]  # safetensors' word for a dtype, and a shape


def deepseek(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is quantized, of each tensor of a DeepSeek-V3."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    rotary, plain, value = (
        config[k] for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )

    def mlp(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        yield f"{path}.gate_proj.weight", (width, hidden), True
        yield f"{path}.up_proj.weight", (width, hidden), True
        yield f"{path}.down_proj.weight", (hidden, width), True

    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), False
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        attention = f"{layer}.self_attn"
        yield f"{attention}.q_a_proj.weight", (query, hidden), True
        yield f"{attention}.q_a_layernorm.weight", (query,), False
        yield f"{attention}.q_b_proj.weight", (heads * (rotary + plain), query), True
        yield f"{attention}.kv_a_proj_with_mqa.weight", (latent + rotary, hidden), True
        yield f"{attention}.kv_a_layernorm.weight", (latent,), False
        yield f"{attention}.kv_b_proj.weight", (heads * (plain + value), latent), True
        yield f"{attention}.o_proj.weight", (hidden, heads * value), True
        yield f"{layer}.input_layernorm.weight", (hidden,), False
        yield f"{layer}.post_attention_layernorm.weight", (hidden,), False
        if number < config["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        width = config["moe_intermediate_size"]
        yield f"{layer}.mlp.gate.weight", (config["n_routed_experts"], hidden), False
        yield f"{layer}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],), False
        for expert in range(config["n_routed_experts"]):
            yield from mlp(f"{layer}.mlp.experts.{expert}", width)
        yield from mlp(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"])
    yield "model.norm.weight", (hidden,), False
    yield "lm_head.weight", (config["vocab_size"], hidden), False


def llama(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is quantized, of each tensor of a Llama."""
    from checkpoint import Shape, tensors

    keys = {"layers": "num_hidden_layers", "hidden": "hidden_size", "vocab": "vocab_size",
            "intermediate": "intermediate_size", "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads"}  # fmt: skip
    for tensor in tensors(Shape(**{name: config[key] for name, key in keys.items()})):
        yield tensor.name, tensor.shape, "_proj" in tensor.name


def headers(
    tensors: Iterable[tuple[str, tuple[int, ...], bool]], *, fp8: bool
) -> dict[str, Header]:
    """What a checkpoint's tensors are, those that are quantized as FP8 if asked for."""
    table: dict[str, Header] = {}
    for name, shape, quantized in tensors:
        if fp8 and quantized:
            table[name] = "F8_E4M3", shape
            table[f"{name}_scale_inv"] = "F32", tuple(-(-n // BLOCK) for n in shape)
        else:
            table[name] = "F32" if name.endswith("_bias") else "BF16", shape
    return table


def write(
    folder: Path,
    config: Mapping[str, Any],
    table: Mapping[str, Header],
    *,
    files: int = 1,
    filled: bool = True,
) -> None:
    """Writes a checkpoint; ``filled``: with random numbers, else headers alone."""
    from checkpoint import write_tokenizer

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    names = list(table)
    weight_map: dict[str, str] = {}
    for number in range(files):
        held = names[number * len(names) // files : (number + 1) * len(names) // files]
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        weight_map |= dict.fromkeys(held, file)
        end, said = 0, {}
        for name in held:
            dtype, shape = table[name]
            size = prod(shape) * OCTETS[dtype]
            said[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(said).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            if not filled:
                out.truncate(8 + len(text) + end)
                continue
            for name in held:
                for piece in _numbers(name, *table[name]):
                    out.write(piece)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@cache
def _pool(dtype: str) -> bytes:
    """Random bytes: normal numbers; those of FP8 with the largest of a block near 448."""
    import mlx.core as mx
    import numpy as np

    floats = np.random.default_rng(0).standard_normal(POOL, np.float32)
    if dtype == "F8_E4M3":
        return np.array(mx.to_fp8(mx.array(floats * np.float32(100)))).tobytes()
    floats *= np.float32(0.02)
    if dtype == "F32":
        return np.abs(floats).tobytes()
    return (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _numbers(name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Yield a tensor's bytes: the pool's, from where its name says."""
    pool, left = memoryview(_pool(dtype)), prod(shape) * OCTETS[dtype]
    at = zlib.crc32(name.encode()) % POOL // 8 * 8 * OCTETS[dtype]
    while left:
        piece = pool[at : at + left]
        yield piece
        left -= len(piece)
        at = 0


class Project:
    """A folder with models.toml, whose cache begins empty."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.say(text)

    def say(self, text: str) -> None:
        """Writes models.toml."""
        (self.folder / "models.toml").write_text(text)

    def run(self, *arguments: str) -> Usage:
        """Runs mlx-make there; status 1 of a plan says that there is something to do."""
        words = [sys.executable, "-P", "-m", "mlx_make", *arguments]
        command = shlex.join([*words, f"models={self.folder}/models.toml"])
        most = int("plan" in arguments)
        return measure(["sh", "-c", f"{command}; test $? -le {most}"])

    def clean(self) -> None:
        """Removes all that was made."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "models.toml":
                path.unlink()


def peer(command: str, output: Path, *arguments: str) -> Usage:
    """Runs a command of mlx-lm's that writes a model into ``output``, which is removed first."""
    shutil.rmtree(output, ignore_errors=True)
    return measure([sys.executable, "-m", "mlx_lm", command, *arguments])


def blocks(work: Path, repeats: int) -> None:
    """8 B shape: block FP8 to 4 bits, and the same from bfloat16."""
    config = {**LLAMA_8B, "num_hidden_layers": 3}
    table = list(llama(config))
    write(work / "wide", config, headers(table, fp8=False))
    write(work / "fp8", {**config, "quantization_config": FP8}, headers(table, fp8=True))
    projects = {}
    for name in ("wide", "fp8"):
        text = f'[models.m]\nsource = "{work / name}"\n'
        text += 'dtype = "bfloat16"\nquantize = { bits = 4 }\n'
        projects[name] = Project(work / f"from-{name}", text)
    runs = in_turn({name: cold(project) for name, project in projects.items()}, repeats)
    show(runs, "wide")


def experts(work: Path, repeats: int) -> None:
    """60 layers of 64 tiny experts in FP8 to 4 bits, beside mlx_lm.convert."""
    config = {**DEEPSEEK, **TINY_EXPERTS}
    source = work / "source"
    write(source, config, headers(deepseek(config), fp8=True))
    project = Project(work, f'[models.m]\nsource = "{source}"\nquantize = {{ bits = 4 }}\n')
    output = work / "theirs"
    convert = ("--hf-path", str(source), "--mlx-path", str(output), "-q", "--q-bits", "4")

    def ours() -> Usage:
        for path in (work / "build", work / ".mlx-make"):
            shutil.rmtree(path, ignore_errors=True)
        return project.run()

    def theirs() -> Usage:
        return peer("convert", output, *convert)

    runs = in_turn({"mlx_lm.convert": theirs, "build": ours}, repeats)
    same(output, work / "build" / "m")
    show(runs, "mlx_lm.convert")


def plan(work: Path, repeats: int) -> None:
    """DeepSeek-V3: what planning takes, by layers, the first time and then."""
    for layers in (10, 20, 61):
        config = {**DEEPSEEK, "num_hidden_layers": layers}
        table = headers(deepseek(config), fp8=True)
        source = work / f"source{layers}"
        write(source, config, table, files=max(1, layers * 163 // 61), filled=False)
        text = f'[models.m]\nsource = "{source}"\nquantize = {{ bits = 4 }}\n'
        project = Project(work / f"plan{layers}", text)

        def first(project: Project = project) -> Usage:
            project.clean()
            return project.run("plan")

        def second(project: Project = project) -> Usage:
            return project.run("plan")

        runs = in_turn({"first": first, "second": second}, repeats)
        print(f"{layers} layers, {len(table):,} tensors")
        show(runs, "first")


def adapter(work: Path, repeats: int) -> None:
    """A second adapter on a built model of 1.1 B, beside mlx_lm.fuse and mlx_lm.convert."""
    from checkpoint import Shape, write_transformers

    source = work / "source"
    write_transformers(source, Shape(), dtype="bfloat16", seed=0)
    adapters = [work / name for name in ("one", "two")]
    for number, folder in enumerate(adapters):
        write_adapter(folder, number)
    one, two = (f'adapter = "{folder}"\n' for folder in adapters)
    model = f'[models.m]\nsource = "{source}"\nquantize = {{ bits = 4 }}\n'
    variants = f"{model}[models.m.variants.one]\n{one}[models.m.variants.two]\n{two}"
    project = Project(work / "ours", "")
    fused, output = work / "fused", work / "theirs"

    def theirs() -> Usage:
        arguments = ("--model", str(source), "--adapter-path", str(adapters[1]))
        first = peer("fuse", fused, *arguments, "--save-path", str(fused))
        convert = ("--hf-path", str(fused), "--mlx-path", str(output), "-q", "--q-bits", "4")
        return first.then(peer("convert", output, *convert))

    def ours() -> Usage:
        project.clean()
        project.say(f"{model}[models.m.variants.one]\n{one}")
        project.run()
        project.say(variants)
        return project.run("m-two")

    runs = in_turn({"mlx_lm.fuse, convert": theirs, "second adapter": ours}, repeats)
    same(output, work / "ours" / "build" / "m-two")
    show(runs, "mlx_lm.fuse, convert")


def write_adapter(folder: Path, seed: int) -> None:
    """Writes what mlx_lm.lora leaves of TinyLlama's shape: rank 8, query and value, 16 layers."""
    import mlx.core as mx

    folder.mkdir()
    mx.random.seed(seed)
    tensors = {}
    for number in range(6, 22):
        for name, width in (("q_proj", 2048), ("v_proj", 256)):
            path = f"model.layers.{number}.self_attn.{name}"
            tensors[f"{path}.lora_a"] = mx.random.normal((2048, 8)) * 0.02
            tensors[f"{path}.lora_b"] = mx.random.normal((8, width)) * 0.02
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0,
                "keys": ["self_attn.q_proj", "self_attn.v_proj"]}  # fmt: skip
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def cold(project: Project) -> Callable[[], Usage]:
    """A build whose cache is empty."""

    def run() -> Usage:
        project.clean()
        return project.run()

    return run


def in_turn(commands: Mapping[str, Callable[[], Usage]], repeats: int) -> dict[str, list[Usage]]:
    """What commands take, one after another, ``repeats`` times; of several, one more warms up."""
    runs: dict[str, list[Usage]] = {name: [] for name in commands}
    warms_up = repeats > 1
    for number in range(repeats + warms_up):
        for name, command in commands.items():
            usage = command()
            if number or not warms_up:
                runs[name].append(usage)
    return runs


def show(runs: Mapping[str, Sequence[Usage]], base: str) -> None:
    """Prints medians, and ratios to those of ``base``."""

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(usage, field) for usage in runs[name]))

    print("| | wall, s | | processor, s | | resident, MB |\n|---|---|---|---|---|---|")
    for name in runs:
        cells = []
        for field in ("seconds", "processor"):
            value = median(name, field)
            cells += [f"{value:.2f}", f"{value / median(base, field):.2f}×"]
        held = max(usage.peak_rss for usage in runs[name]) / 1e6
        print(f"| {name} | {' | '.join(cells)} | {held:.0f} |", flush=True)


def same(theirs: Path, ours: Path) -> None:
    """Compares two models' weights.

    Raises:
        BenchmarkError: they differ.
    """
    import mlx.core as mx

    loaded = []
    for folder in (theirs, ours):
        tensors: dict[str, Any] = {}
        for path in folder.glob("model*.safetensors"):
            tensors |= mx.load(str(path))  # type: ignore[arg-type]
        loaded.append(tensors)
    if loaded[0].keys() != loaded[1].keys():
        raise BenchmarkError(f"other tensors: {sorted(loaded[0].keys() ^ loaded[1].keys())[:5]}")
    for name, tensor in loaded[0].items():
        if not mx.array_equal(tensor.view(mx.uint8), loaded[1][name].view(mx.uint8)):
            raise BenchmarkError(f"{name} differs")


BENCHMARKS: dict[str, Callable[[Path, int], None]] = {
    "blocks": blocks, "experts": experts, "plan": plan, "adapter": adapter,
}  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    for name in asked.names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"## {name}: {BENCHMARKS[name].__doc__}", flush=True)
            BENCHMARKS[name](Path(folder).resolve(), asked.repeats)


if __name__ == "__main__":
    main()
