"""Device code of dispatch and combine: rows gathered, weighted sums over the copies of a token in a fixed order.

One program per row or token; rows are contiguous, ``width`` wide. No atomics, so results do not depend on timing.
"""

# ruff: noqa: TID253, PLR0913  `runtime.kernels` alone loads this file; kernels take what they take
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl


@triton.jit
def gather_rows(source_ptr, index_ptr, out_ptr, width, BLOCK_D: tl.constexpr):
    """``out[i] = source[index[i]]``."""
    row = tl.program_id(0).to(tl.int64)
    source_row = tl.load(index_ptr + row)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        value = tl.load(source_ptr + source_row * width + column, mask=inside)
        tl.store(out_ptr + row * width + column, value, mask=inside)


@triton.jit
def sum_copies(
    source_ptr,
    row_ptr,
    weight_ptr,
    copy_ptr,
    start_ptr,
    out_ptr,
    width,
    HAS_WEIGHT: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[t] = sum over the copies c of t of weight[c] * source[row[c]]``, in the order of the copies."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(start_ptr + token)
    last = tl.load(start_ptr + token + 1)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        total = tl.zeros([BLOCK_D], dtype=tl.float64 if IS_DOUBLE else tl.float32)
        for place in range(first, last):
            copy = tl.load(copy_ptr + place)
            row = tl.load(row_ptr + copy)
            value = tl.load(source_ptr + row * width + column, mask=inside, other=0.0).to(total.dtype)
            if HAS_WEIGHT:
                value = value * tl.load(weight_ptr + copy).to(total.dtype)
            total += value
        tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_backward(
    out_ptr,
    grad_ptr,
    token_ptr,
    row_ptr,
    weight_ptr,
    grad_out_ptr,
    grad_weight_ptr,
    width,
    IS_DOUBLE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per copy: ``grad_out[row] = weight * grad[token]`` and ``grad_weight = <out[row], grad[token]>``."""
    copy = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + copy)
    token = tl.load(token_ptr + copy)
    weight = tl.load(weight_ptr + copy).to(tl.float64 if IS_DOUBLE else tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float64 if IS_DOUBLE else tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < width
        grad = tl.load(grad_ptr + token * width + column, mask=inside, other=0.0).to(total.dtype)
        value = tl.load(out_ptr + row * width + column, mask=inside, other=0.0).to(total.dtype)
        total += grad * value
        scaled = (grad * weight).to(grad_out_ptr.dtype.element_ty)
        tl.store(grad_out_ptr + row * width + column, scaled, mask=inside)
    tl.store(grad_weight_ptr + copy, tl.sum(total, 0).to(grad_weight_ptr.dtype.element_ty))
