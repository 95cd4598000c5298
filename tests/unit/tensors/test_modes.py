"""tests of tasks/tensors/modes.py: what the installed MLX takes, and that defaults are its own."""

import mlx.core as mx
import pytest

from tasks.core.quantization import MODES
from tasks.tensors import modes


@pytest.mark.parametrize("mode", MODES)
def test_what_is_known_is_taken(mode: str) -> None:
    """What is never asked, too."""
    for known, taken in zip(MODES[mode], modes.numbers(mode), strict=True):
        assert {*known} <= {*taken}
        assert [*taken] == sorted(taken)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_taken_can_be_quantized_and_nothing_else(mode: str) -> None:
    group_sizes, all_bits = modes.numbers(mode)
    weight = mx.random.normal((2, 1024))
    for group_size in (8, 16, 32, 64, 128, 256, 512, 1024):
        for bits in range(18):
            right = group_size in group_sizes and bits in all_bits
            try:
                mx.eval(mx.quantize(weight, group_size, bits, mode))
            except ValueError:
                assert not right
            else:
                assert right


@pytest.mark.parametrize("mode", MODES)
def test_the_first_numbers_are_mlx_s_defaults(mode: str) -> None:
    weight = mx.random.normal((2, 128))
    (group_size, *_), (bits, *_) = MODES[mode]
    ours, default = mx.quantize(weight, group_size, bits, mode), mx.quantize(weight, mode=mode)
    assert all(mx.array_equal(one, two) for one, two in zip(ours, default, strict=True))
