"""quantize_alone: mx.quantize on all cores, of as many weights as a checkpoint has, and no more.

    python benchmarks/quantize_alone.py model.safetensors     # or how many weights, as 70000000000
    python benchmarks/quantize_alone.py 70000000000 --device gpu

Blocks of the weights' size in mlx-make (2 MiB of bfloat16, on a GPU 32) that lie in memory, 4 bits,
affine.
"""

import argparse
import json
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx

SHAPES = {"cpu": (512, 2048), "gpu": (8192, 2048)}


def weights(path: Path) -> int:
    """How many weights of a safetensors file are quantized: all of its matrices'."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return sum(math.prod(e["shape"]) for e in header.values() if len(e["shape"]) > 1)


def work(blocks: int, device: str) -> None:
    """Quantizes that many blocks, in this thread."""
    with mx.stream(mx.new_stream(getattr(mx, device))):
        block = (mx.random.normal(SHAPES[device]) * 0.02).astype(mx.bfloat16)
        mx.eval(block)
        for _ in range(blocks):
            mx.eval(mx.quantize(block, 64, 4))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", help="a safetensors file, or how many weights")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    arguments = parser.parse_args()
    of, device = arguments.weights, arguments.device
    cores = len(os.sched_getaffinity(0))
    count = int(of) if of.isdecimal() else weights(Path(of))
    blocks = math.ceil(count / math.prod(SHAPES[device]) / cores)
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(partial(work, device=device), [blocks] * cores))
    os._exit(0)  # MLX at times aborts as it takes down the streams of threads that ended


if __name__ == "__main__":
    main()
