"""whole_numbers: weights of a few bits each, with a scale and a zero point for groups of columns.

A weight is (number - zero point) · scale, in some formats plus a shift. What differs from one
format to the next is where these lie, so each says no more than that; floats, and MLX's own
packing, are made of them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits
from tasks.unpack.packed import Repacking

GROUP_SIZES = (128, 64, 32)  # that MLX takes in mode affine, the least scales first
BITS = (2, 3, 4, 5, 6, 8)


def repacking(
    width: int, group_size: int, columns: int, scales: str, *, centred: bool, order: bool = False
) -> Repacking | None:
    """Return how MLX holds whole numbers in mode affine; None if it cannot.

    Args:
        width: bits of a number.
        group_size: columns that share a scale; all of a row where it is less than 1.
        columns: of the weight.
        scales: their dtype.
        centred: whether the zero point of each group is known to be half of the range.
        order: whether columns are of groups in an order of their own.
    """
    whole = group_size if 0 < group_size < columns else columns
    fits = [size for size in GROUP_SIZES if whole % size == 0 and columns % size == 0]
    if width not in BITS or order or not fits or columns % whole:
        return None
    return Repacking(fits[0], width, "affine", scales, centred)


class WholeNumbers(Struct, frozen=True, dict=True):
    """A weight of whole numbers, (rows, columns)."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 1

    @property
    def bits(self) -> int:
        """Of a number."""
        return int(self.settings["bits"])

    @property
    def group_size(self) -> int:
        """Columns that share a scale; less than 1, all of a row."""
        return int(self.settings["group_size"])

    @cached_property
    def group_of(self) -> mx.array | None:
        """The group of each column; None, one after another."""
        return None

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows ``start`` to ``stop``, from 0: (rows, columns), uint32."""
        raise NotImplementedError

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows: (rows or 1, groups), float32."""
        return mx.full((1, 1), float(1 << (self.bits - 1)))

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows: (rows or 1, groups), float32."""
        raise NotImplementedError

    def shifts(self, start: int, stop: int) -> mx.array | None:
        """Return what is added to the product, as of scales, float32; None for nothing."""
        return None

    def biases(self, start: int, stop: int) -> mx.array:
        """Return what 0 stands for: (rows or 1, groups), float32."""
        biases = -self.zeros(start, stop) * self.scales(start, stop)
        shifts = self.shifts(start, stop)
        return biases if shifts is None else biases + shifts

    def words(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows as MLX packs them: (rows, columns · bits / 32)."""
        return bits.pack(self.numbers(start, stop), self.bits)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``, as floats."""
        numbers = self.numbers(start, stop).astype(mx.float32)
        numbers = numbers - self._wide(self.zeros(start, stop))
        made = numbers * self._wide(self.scales(start, stop))
        shifts = self.shifts(start, stop)
        return made if shifts is None else made + self._wide(shifts)

    def _wide(self, values: mx.array) -> mx.array:
        """Return values of groups as those of columns."""
        group_of = self.group_of  # looked at in any case
        if values.shape[1] == 1:
            return values
        if group_of is not None:
            return values[:, group_of]
        return bits.grouped(values, self.group_size, self.shape[-1])


class Transposed(WholeNumbers, frozen=True, dict=True):
    """A weight that is stored transposed: its tensors are read at once, and unpacked by rows.

    The first has its words, (…, rows), the third its scales, (groups, rows).
    """

    @cached_property
    def _words(self) -> mx.array:
        return whole(self.sources[0])

    @cached_property
    def _scales(self) -> mx.array:
        return whole(self.sources[2]).astype(mx.float32)

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows."""
        return self._scales[:, start:stop].T


class Affine(Struct, frozen=True):
    """One of the tensors that MLX holds whole numbers in: ``weight``, ``scales`` or ``biases``.

    Attributes:
        source: the numbers.
        part: which.
        group_size: MLX's: that of the source, or a part of it.
        floats: the dtype of scales and biases.
        exact: whether biases that cannot be held in that dtype are an error.
    """

    source: WholeNumbers
    part: str
    group_size: int
    floats: str
    exact: bool
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return "uint32" if self.part == "weight" else self.floats

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        rows, columns = self.source.shape
        packed = columns * self.source.bits // 32
        return rows, packed if self.part == "weight" else columns // self.group_size

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``.

        Raises:
            CheckpointError: they are not what config.json says of them.
        """
        source = self.source
        if self.part == "weight":
            return source.words(start, stop)
        self._check_order()
        if self.part == "scales":
            scales = source.scales(start, stop).astype(getattr(mx, self.floats))
            return self._of_groups(scales, stop - start)
        biases = source.biases(start, stop)
        held = biases.astype(getattr(mx, self.floats))
        if self.exact and not mx.array_equal(held.astype(mx.float32), biases).item():
            raise CheckpointError(
                "config.json says that its numbers are symmetric, and zero points of them are not "
                f"half of their range: MLX cannot hold them in {self.floats} without loss. Set "
                "dequantize = true."
            )
        return self._of_groups(held, stop - start)

    def _of_groups(self, values: mx.array, rows: int) -> mx.array:
        """Return values of the source's groups as those of MLX's: (rows, groups)."""
        groups = self.shape[1]
        values = mx.repeat(values, groups // values.shape[1], axis=1)
        return mx.broadcast_to(values, (rows, groups))

    def _check_order(self) -> None:
        group_of = self.source.group_of
        if group_of is None:
            return
        columns = self.source.shape[1]
        size = self.source.group_size if self.source.group_size > 0 else columns
        if not mx.array_equal(group_of, mx.arange(columns) // size).item():
            raise CheckpointError(
                "config.json says that columns are in groups as they follow each other, and g_idx "
                "has them in another order, which MLX cannot hold. Set dequantize = true."
            )
