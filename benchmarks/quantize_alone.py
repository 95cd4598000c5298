"""quantize_alone: mx.quantize on all cores, of as many weights as a checkpoint has, and no more.

    python benchmarks/quantize_alone.py model.safetensors     # or how many weights, as 70000000000

Blocks of the weights' size in mlx-make (2 MiB of bfloat16) that lie in memory, 4 bits, affine.
"""

import json
import math
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

SHAPE = (512, 2048)


def weights(path: Path) -> int:
    """How many weights of a safetensors file are quantized: all of its matrices'."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return sum(math.prod(e["shape"]) for e in header.values() if len(e["shape"]) > 1)


def work(blocks: int) -> None:
    """Quantizes that many blocks, in this thread."""
    with mx.stream(mx.new_stream(mx.cpu)):
        block = (mx.random.normal(SHAPE) * 0.02).astype(mx.bfloat16)
        mx.eval(block)
        for _ in range(blocks):
            mx.eval(mx.quantize(block, 64, 4))


def main() -> None:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    of = sys.argv[1]
    count = int(of) if of.isdecimal() else weights(Path(of))
    blocks = count / math.prod(SHAPE)
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(work, [math.ceil(blocks / cores)] * cores))
    os._exit(0)  # MLX at times aborts as it takes down the streams of threads that ended


if __name__ == "__main__":
    main()
