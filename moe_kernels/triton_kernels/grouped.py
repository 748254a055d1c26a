"""Grouped SwiGLU experts by Triton, forward and backward; the reference is `moe_kernels.experts.swiglu_loop`.

The up-projection makes both products from one read of the rows and applies SiLU in its epilogue; given an index it
reads the rows straight from the token states, so no gathered copy of them is made or kept. The backward pass recomputes
the hidden states instead of keeping them. No counts travel to the host.

Tile sizes follow the habits of Hopper chips (128 x 128 x 64 for two-byte types); they have not been tuned on a device.

Shapes: E experts, N rows, T tokens, D model width, F feed-forward width.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from moe_kernels.errors import MoeError
from moe_kernels.triton_kernels.permute import sum_copies
from moe_kernels.triton_kernels.runtime import is_interpreted, kernels, launch, next_power_of_2
from moe_kernels.types import TokenOrder

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the blocks that one program works on."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    def meta(self, dtype: torch.dtype) -> dict[str, object]:
        """Parameters of the kernels for operands of a dtype."""
        allows_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return {
            "IS_DOUBLE": dtype == torch.float64,
            "PRECISION": "tf32" if allows_tf32 else "ieee",
            "WIDENS": dtype == torch.bfloat16 and is_interpreted(),
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tiles_for(dtype: torch.dtype, mean_rows: float = 128) -> Tiles:
    """Tiles for a dtype and the mean number of rows per expert.

    Args:
        dtype: Of rows and weights.
        mean_rows: Rows per expert; few rows get low tiles, so that less of a tile is empty.

    Returns:
        The sizes.
    """
    if dtype.itemsize == 2:
        rows = min(128, max(16, next_power_of_2(int(mean_rows))))
        return Tiles(rows=rows, columns=128, inner=64, num_warps=8 if rows == 128 else 4, num_stages=3)
    return Tiles(rows=32, columns=32, inner=32, num_warps=4, num_stages=2)


@dataclass(frozen=True, kw_only=True)
class _TileMap:
    expert_P: torch.Tensor
    row_P: torch.Tensor
    end_P: torch.Tensor

    @property
    def size(self) -> int:
        return self.expert_P.numel()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.expert_P, self.row_P, self.end_P


def map_tiles(counts_E: torch.Tensor, num_rows: int, rows_per_tile: int) -> _TileMap:
    """Which expert and rows each tile works on, made on the device.

    Args:
        counts_E: Rows per expert ``(E,)``.
        num_rows: N, their sum.
        rows_per_tile: Rows of a tile, a power of two.

    Returns:
        The map, with as many tiles as any counts of that sum could need.
    """
    num_experts = counts_E.numel()
    size = num_rows // rows_per_tile + min(num_experts, num_rows)
    expert_P = torch.empty(size, dtype=torch.int32, device=counts_E.device)
    row_P, end_P = torch.empty_like(expert_P, dtype=torch.int64), torch.empty_like(expert_P, dtype=torch.int64)
    block = 64
    launch(
        kernels("grouped").map_tiles, (-(-size // block),), counts_E, expert_P, row_P, end_P, num_experts, size,
        BLOCK_M=rows_per_tile, BLOCK_E=next_power_of_2(num_experts), BLOCK_P=block, num_warps=4,
    )  # fmt: skip
    return _TileMap(expert_P=expert_P, row_P=row_P, end_P=end_P)


def _grid(tile_map: _TileMap, columns: int, tiles: Tiles) -> tuple[int]:
    return (tile_map.size * -(-columns // tiles.columns),)


def _multiply(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], outer: int, tile_map: _TileMap, tiles: Tiles, *, transposed: bool
) -> torch.Tensor:
    (a_NI, w), (a2_NI, w2) = pairs[0], pairs[-1]
    out_NO = a_NI.new_empty(a_NI.shape[0], outer)
    launch(
        kernels("grouped").multiply_rows, _grid(tile_map, outer, tiles), a_NI, w, a2_NI, w2, out_NO,
        *tile_map.tensors(), a_NI.shape[1], outer, IS_TRANSPOSED=transposed, HAS_SECOND=len(pairs) > 1,
        **tiles.meta(a_NI.dtype),
    )  # fmt: skip
    return out_NO


def _weight_gradient(
    a: torch.Tensor, index_N: torch.Tensor | None, rows: list[torch.Tensor], ends_E: torch.Tensor, tiles: Tiles
) -> list[torch.Tensor]:
    width_a, width_b = a.shape[1], rows[0].shape[1]
    outs = [a.new_empty(ends_E.numel(), width_a, width_b) for _ in rows]
    num_blocks = -(-width_a // tiles.rows) * -(-width_b // tiles.columns)
    launch(
        kernels("grouped").weight_gradient, (ends_E.numel() * num_blocks,), a, index_N, rows[0], rows[-1], outs[0],
        outs[-1], ends_E, width_a, width_b, HAS_INDEX=index_N is not None, HAS_SECOND=len(rows) > 1,
        **tiles.meta(a.dtype),
    )  # fmt: skip
    return outs


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: FunctionCtx,
        x: torch.Tensor,
        w1_EDF: torch.Tensor,
        w3_EDF: torch.Tensor,
        w2_EFD: torch.Tensor,
        counts_E: torch.Tensor,
        index_N: torch.Tensor | None,
        row_N: torch.Tensor | None,
        order: TokenOrder | None,
        keeps: bool,
    ) -> torch.Tensor:
        x, w1_EDF, w3_EDF, w2_EFD = (value.contiguous() for value in (x, w1_EDF, w3_EDF, w2_EFD))
        num_rows = x.shape[0] if index_N is None else index_N.numel()
        tiles = tiles_for(x.dtype, num_rows / counts_E.numel())
        tile_map = map_tiles(counts_E, num_rows, tiles.rows)
        hidden_NF = x.new_empty(num_rows, w1_EDF.shape[2])
        gate_NF, up_NF = (torch.empty_like(hidden_NF), torch.empty_like(hidden_NF)) if keeps else (None, None)
        launch(
            kernels("grouped").up_project, _grid(tile_map, hidden_NF.shape[1], tiles), x, index_N, w1_EDF, w3_EDF,
            gate_NF, up_NF, hidden_NF, *tile_map.tensors(), x.shape[1], hidden_NF.shape[1],
            HAS_INDEX=index_N is not None, KEEPS=keeps, **tiles.meta(x.dtype),
        )  # fmt: skip
        if keeps:
            by_token = (None, None) if order is None else (order.copy_N, order.start_T1)
            kept = (x, w1_EDF, w3_EDF, w2_EFD, counts_E, index_N, row_N, gate_NF, up_NF)
            ctx.save_for_backward(*kept, *tile_map.tensors(), *by_token)  # pyright: ignore[reportArgumentType]
            ctx.tiles = tiles  # pyright: ignore[reportAttributeAccessIssue]
        return _multiply([(hidden_NF, w2_EFD)], x.shape[1], tile_map, tiles, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        x, w1_EDF, w3_EDF, w2_EFD, counts_E, index_N, row_N, gate_NF, up_NF, *mapped, copy_N, start_T1 = saved
        tiles: Tiles = ctx.tiles  # pyright: ignore[reportAttributeAccessIssue]
        tile_map = _TileMap(expert_P=mapped[0], row_P=mapped[1], end_P=mapped[2])
        half = dataclasses.replace(tiles, columns=tiles.columns // 2)  # five tiles in one epilogue spill otherwise
        grad_ND = gradients[0].contiguous()
        grad_gate_NF, grad_up_NF, hidden_NF = (torch.empty_like(gate_NF) for _ in range(3))
        launch(
            kernels("grouped").down_backward, _grid(tile_map, gate_NF.shape[1], half), grad_ND, w2_EFD, gate_NF, up_NF,
            grad_gate_NF, grad_up_NF, hidden_NF, *tile_map.tensors(), x.shape[1], gate_NF.shape[1],
            **half.meta(x.dtype),
        )  # fmt: skip
        needs = ctx.needs_input_grad  # pyright: ignore[reportAttributeAccessIssue]
        grad_x = grad_w1 = grad_w3 = grad_w2 = None
        if needs[0]:
            pairs = [(grad_gate_NF, w1_EDF), (grad_up_NF, w3_EDF)]
            grad_x = _multiply(pairs, x.shape[1], tile_map, tiles, transposed=True)
            if index_N is not None:
                grad_x = sum_copies(grad_x, row_N, TokenOrder(copy_N=copy_N, start_T1=start_T1))
        ends_E, wide = counts_E.cumsum(0), tiles_for(x.dtype)
        if needs[1] or needs[2]:
            grad_w1, grad_w3 = _weight_gradient(x, index_N, [grad_gate_NF, grad_up_NF], ends_E, wide)
        if needs[3]:
            (grad_w2,) = _weight_gradient(hidden_NF, None, [grad_ND], ends_E, wide)
        return grad_x, grad_w1, grad_w3, grad_w2, None, None, None, None, None


def _keeps(x: torch.Tensor, weights: Weights) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in (x, *weights))


def _check(x: torch.Tensor, weights: Weights) -> None:
    if x.dtype not in DTYPES or any(weight.dtype != x.dtype for weight in weights):
        got = f"{x.dtype} with weights of {weights[0].dtype}"
        allowed = "one dtype of float16, bfloat16, float32, float64"
        raise MoeError("dtype of experts in Triton", got=got, allowed=allowed, remedy="convert rows or weights")


def swiglu_rows(rows_ND: torch.Tensor, counts_E: torch.Tensor, weights: Weights) -> torch.Tensor:
    """``(silu(x w1) * (x w3)) w2`` of each expert for its rows.

    Args:
        rows_ND: Rows sorted by expert ``(N, D)``; differentiable.
        counts_E: Rows per expert ``(E,)``, int64, summing to N; not checked, since that would need the host.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD`` in the dtype of the rows; differentiable.

    Returns:
        Expert outputs ``(N, D)``.

    Raises:
        MoeError: If the dtypes do not fit.
    """
    _check(rows_ND, weights)
    return _Swiglu.apply(rows_ND, *weights, counts_E, None, None, None, _keeps(rows_ND, weights))


def swiglu_tokens(
    x_TD: torch.Tensor, source_N: torch.Tensor, row_N: torch.Tensor, order: TokenOrder, counts_E: torch.Tensor,
    weights: Weights,
) -> torch.Tensor:  # fmt: skip
    """`swiglu_rows` on the rows ``x[source]``, which are read where they lie instead of being copied first.

    Args:
        x_TD: Token states ``(T, D)``; differentiable.
        source_N: Token of each row ``(N,)``, rows sorted by expert.
        row_N: Row of each copy ``(N,)``.
        order: The copies of each token.
        counts_E: Rows per expert ``(E,)``.
        weights: ``w1_EDF``, ``w3_EDF``, ``w2_EFD`` in the dtype of the states; differentiable.

    Returns:
        Expert outputs ``(N, D)``.

    Raises:
        MoeError: If the dtypes do not fit.
    """
    _check(x_TD, weights)
    return _Swiglu.apply(x_TD, *weights, counts_E, source_N, row_N, order, _keeps(x_TD, weights))
