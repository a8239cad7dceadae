"""`compress_2to4_many` and `repack_2to4_many` prepared once and replayed: what a step under 2:4 calls again and again.

A call for the 48 projections of a model checks 48 matrices and allocates up to 144 results, which takes the host longer
than a GPU needs for the work. A plan does both once. A replay reads the matrices as they are then, compares their
addresses with those it was made for, and writes into the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvit_kernels import _native
from nvit_kernels.sparse24.compress import Sparse24, compress_2to4_many, named_error, repack_2to4_many


class _Plan:
    """Matrices and what goes with them, at fixed addresses.

    Attributes:
        table: the compiled code's own, pointers inside; None where plain torch does the work.
    """

    op = ""

    def __init__(self, dense: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        if not dense:
            raise ValueError(f"{self.op}: a plan needs at least one matrix.")
        self.dense, self.others = list(dense), list(others)
        # Views keep the memory alive even if a parameter is given other data, so that no address can be used again.
        self._views = [t.detach() for t in (*self.dense, *self.others)]
        self._addresses = [t.data_ptr() for t in self._views]
        native = _native.load()
        self.compiled = native.cuda if self.dense[0].is_cuda else native.cpu
        self.table: Tensor | None = None

    def _prepare(self, dtype: torch.dtype | None) -> tuple:
        n = len(self.dense)
        with named_error(self.op):
            prepare = getattr(torch.ops.nvit, f"_plan_{self.op}")
            self.table, *results = prepare(self._views[:n], self._views[n:], dtype)
        self._replay = getattr(torch.ops.nvit, f"_replay_{self.op}").default
        return tuple(results)

    def _run(self, check: bool) -> None:
        with named_error(self.op):
            self._replay(self.table, self._views[0], check)

    def _require_places(self) -> None:
        now = [t.data_ptr() for t in self.dense]
        now += [t.data_ptr() for t in self.others]
        if now != self._addresses:
            i = next(i for i, (a, b) in enumerate(zip(now, self._addresses, strict=True)) if a != b)
            what = "matrix" if i < len(self.dense) else "mask or metadata"
            raise ValueError(
                f"{self.op}: {what} {i % len(self.dense)} lies elsewhere than when the plan was made (its data were "
                "replaced, or it was moved). Change it in place, or make a new plan."
            )


class CompressPlan(_Plan):
    """`compress_2to4_many` for matrices that change in place.

    Args:
        dense, mask, dtype: as for `compress_2to4_many`; all on one device, where they lie so that nothing has to be
            copied: rows of neighbouring elements, on a GPU at multiples of 16 bytes.

    Attributes:
        packed: a `Sparse24` for each matrix; every call writes into these.

    Raises:
        ValueError: as `compress_2to4_many`, or a matrix that would have to be copied.
    """

    op = "compress_2to4"

    def __init__(
        self, dense: Sequence[Tensor], mask: Sequence[Tensor] | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dense, mask or ())
        self.dtype = dtype
        # The first call checks everything, and is all there is without compiled code.
        self.packed = self._once(check=True)
        if self.compiled:
            self.packed = [Sparse24(*each) for each in zip(*self._prepare(dtype), strict=True)]
            self._run(check=False)

    def _once(self, check: bool) -> list[Sparse24]:
        return compress_2to4_many(self.dense, self.others or None, dtype=self.dtype, check=check)

    def __call__(self, *, check: bool = False) -> list[Sparse24]:
        """Compress the matrices as they are now.

        Args:
            check: refuse NaN and a mask that is not 2:4; on a GPU that waits for the result.

        Raises:
            ValueError: a matrix or mask that was moved; with `check`, what it refuses.
        """
        self._require_places()
        if self.table is not None:
            self._run(check)
        else:
            for mine, new in zip(self.packed, self._once(check), strict=True):
                for to, t in zip(mine, new, strict=True):
                    to.copy_(t)
        return self.packed


class RepackPlan(_Plan):
    """`repack_2to4_many` for matrices that change in place under fixed masks.

    Args:
        dense, meta, dtype: as for `repack_2to4_many`; placed as for `CompressPlan`.

    Attributes:
        values: of each matrix; every call writes into these.
    """

    op = "repack_2to4"

    def __init__(self, dense: Sequence[Tensor], meta: Sequence[Tensor], *, dtype: torch.dtype | None = None) -> None:
        super().__init__(dense, meta)
        self.dtype = dtype
        self.values = self._once(check=True)
        if self.compiled:
            (self.values,) = self._prepare(dtype)
            self._run(check=False)

    def _once(self, check: bool) -> list[Tensor]:
        return repack_2to4_many(self.dense, self.others, dtype=self.dtype, check=check)

    def __call__(self, *, check: bool = False) -> list[Tensor]:
        """Values of the matrices as they are now; see `CompressPlan.__call__`."""
        self._require_places()
        if self.table is not None:
            self._run(check)
        else:
            for mine, new in zip(self.values, self._once(check), strict=True):
                mine.copy_(new)
        return self.values
