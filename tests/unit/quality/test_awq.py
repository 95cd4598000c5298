"""What a GPU computes with MLX's arrays, a CPU does with NumPy's: the same choices."""

import mlx.core as mx
import numpy as np
import pytest

from tasks.quality import awq

ROUNDING = awq.Rounding(32, 3, "affine", "bfloat16")


@pytest.mark.usefixtures("by_cpu")  # CUDA multiplies in TF32, and may choose a neighbour
def test_a_gpu_chooses_as_a_cpu() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_t(3, (48, 128)).astype(np.float32)
    given = (random.standard_normal((256, 128)) * random.uniform(0.1, 4, 128)).astype(np.float32)
    hessian = given.T @ given
    made = []
    for array in (np.array, mx.array):
        columns = awq.Columns(array(weight), array(hessian), ROUNDING, np.arange(128))
        scale = awq.best_scale([lambda columns=columns: columns], 128)
        clips = awq.best_clips(
            array(weight), awq.own_blocks(array(hessian), ROUNDING.group_size, None), ROUNDING
        )
        made.append((scale, clips, np.array(awq.clip(array(weight), array(clips)))))
    for of_cpu, of_gpu in zip(*made, strict=True):
        assert len(np.unique(of_cpu)) > 3
        assert of_gpu.dtype == of_cpu.dtype
        assert np.allclose(of_gpu, of_cpu)
