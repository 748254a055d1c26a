"""Device code of the expert networks: matrix products over row blocks of varying numbers of rows per expert.

Rows are sorted by expert. A map made on the device gives every tile of rows its expert, so the host never learns the
counts; it launches as many tiles as there could be, and those left over return at once. Every output element is written
by one program that sums in a fixed order. Offsets are 32 bits wide from bases of 64 bits, so the rows of a tile and
the matrix of one expert must each have fewer than 2**31 elements.

Shapes: E experts, N rows, D model width, F feed-forward width, P tiles of rows.
"""

# ruff: noqa: TID253, PLR0913  `runtime.kernels` alone loads this file; kernels take what they take
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl


@triton.jit
def _multiply_add(a, b, total, PRECISION: tl.constexpr, WIDENS: tl.constexpr):
    """``a b + total``; the interpreter multiplies bfloat16 by its bits, so there operands are widened first."""
    if WIDENS:
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def map_tiles(
    counts_ptr,
    expert_ptr,
    row_ptr,
    end_ptr,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Expert (-1 for none), first row, and end of that expert's rows, of each tile of at most ``BLOCK_M`` rows."""
    tile = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    expert = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0).to(tl.int64)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, 0)
    last_row = tl.cumsum(counts, 0)
    owner = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), 1)
    is_owner = expert[None, :] == owner[:, None]
    first_tile = tl.sum(tl.where(is_owner, (last_tile - tiles)[None, :], 0), 1)
    first_row = tl.sum(tl.where(is_owner, (last_row - counts)[None, :], 0), 1)
    end = tl.sum(tl.where(is_owner, last_row[None, :], 0), 1)
    inside = tile < num_tiles
    tl.store(expert_ptr + tile, tl.where(owner < num_experts, owner, -1), mask=inside)
    tl.store(row_ptr + tile, first_row + (tile - first_tile) * BLOCK_M, mask=inside)
    tl.store(end_ptr + tile, end, mask=inside)


@triton.jit
def up_project(
    x_ptr,
    index_ptr,
    w1_ptr,
    w3_ptr,
    gate_ptr,
    up_ptr,
    hidden_ptr,
    expert_ptr,
    row_ptr,
    end_ptr,
    width,
    hidden_width,
    HAS_INDEX: tl.constexpr,
    KEEPS: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``gate = x w1``, ``up = x w3``, ``hidden = silu(gate) * up``; row i of x is ``x[index[i]]`` with an index."""
    num_columns = tl.cdiv(hidden_width, BLOCK_N)
    tile = tl.program_id(0) // num_columns
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(row_ptr + tile)
    row = tl.arange(0, BLOCK_M)
    is_row = row < tl.load(end_ptr + tile) - first
    source = x_ptr + (first + row)[:, None] * width
    if HAS_INDEX:
        source = x_ptr + tl.load(index_ptr + first + row, mask=is_row, other=0)[:, None] * width
    column = (tl.program_id(0) % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden_width
    w1_ptr += expert * width * hidden_width
    w3_ptr += expert * width * hidden_width
    acc = tl.float64 if IS_DOUBLE else tl.float32
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < width
        x = tl.load(source + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        place = k[:, None] * hidden_width + column[None, :]
        is_place = is_k[:, None] & is_column[None, :]
        w1 = tl.load(w1_ptr + place, mask=is_place, other=0.0)
        gate = _multiply_add(x, w1, gate, PRECISION, WIDENS)
        w3 = tl.load(w3_ptr + place, mask=is_place, other=0.0)
        up = _multiply_add(x, w3, up, PRECISION, WIDENS)
    place = row[:, None] * hidden_width + column[None, :]
    is_place = is_row[:, None] & is_column[None, :]
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    base = first * hidden_width
    tl.store(hidden_ptr + base + place, hidden.to(hidden_ptr.dtype.element_ty), mask=is_place)
    if KEEPS:
        tl.store(gate_ptr + base + place, gate.to(gate_ptr.dtype.element_ty), mask=is_place)
        tl.store(up_ptr + base + place, up.to(up_ptr.dtype.element_ty), mask=is_place)


@triton.jit
def multiply_rows(
    a_ptr,
    w_ptr,
    a2_ptr,
    w2_ptr,
    out_ptr,
    expert_ptr,
    row_ptr,
    end_ptr,
    inner,
    outer,
    IS_TRANSPOSED: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out = a w[e]`` (``+ a2 w2[e]``), ``w[e]`` of ``(inner, outer)``, or of ``(outer, inner)`` if transposed."""
    num_columns = tl.cdiv(outer, BLOCK_N)
    tile = tl.program_id(0) // num_columns
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(row_ptr + tile)
    row = tl.arange(0, BLOCK_M)
    is_row = row < tl.load(end_ptr + tile) - first
    column = (tl.program_id(0) % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < outer
    a_ptr += first * inner
    a2_ptr += first * inner
    w_ptr += expert * inner * outer
    w2_ptr += expert * inner * outer
    acc = tl.float64 if IS_DOUBLE else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < inner
        at_a = row[:, None] * inner + k[None, :]
        is_a = is_row[:, None] & is_k[None, :]
        if IS_TRANSPOSED:
            at_w = column[:, None] * inner + k[None, :]
            is_w = is_column[:, None] & is_k[None, :]
        else:
            at_w = k[:, None] * outer + column[None, :]
            is_w = is_k[:, None] & is_column[None, :]
        a = tl.load(a_ptr + at_a, mask=is_a, other=0.0)
        w = tl.load(w_ptr + at_w, mask=is_w, other=0.0)
        if IS_TRANSPOSED:
            w = tl.trans(w)
        total = _multiply_add(a, w, total, PRECISION, WIDENS)
        if HAS_SECOND:
            a2 = tl.load(a2_ptr + at_a, mask=is_a, other=0.0)
            w2 = tl.load(w2_ptr + at_w, mask=is_w, other=0.0)
            if IS_TRANSPOSED:
                w2 = tl.trans(w2)
            total = _multiply_add(a2, w2, total, PRECISION, WIDENS)
    place = row[:, None] * outer + column[None, :]
    tl.store(
        out_ptr + first * outer + place, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :]
    )


@triton.jit
def down_backward(
    grad_ptr,
    w2_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    hidden_ptr,
    expert_ptr,
    row_ptr,
    end_ptr,
    width,
    hidden_width,
    IS_DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of gate and up from ``grad w2^T``, and ``hidden`` once more, which the forward pass did not keep."""
    num_columns = tl.cdiv(hidden_width, BLOCK_N)
    tile = tl.program_id(0) // num_columns
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(row_ptr + tile)
    row = tl.arange(0, BLOCK_M)
    is_row = row < tl.load(end_ptr + tile) - first
    column = (tl.program_id(0) % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden_width
    grad_ptr += first * width
    w2_ptr += expert * width * hidden_width
    acc = tl.float64 if IS_DOUBLE else tl.float32
    grad_hidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < width
        grad = tl.load(grad_ptr + row[:, None] * width + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        at_w = column[:, None] * width + k[None, :]
        w2 = tl.load(w2_ptr + at_w, mask=is_column[:, None] & is_k[None, :], other=0.0)
        grad_hidden = _multiply_add(grad, tl.trans(w2), grad_hidden, PRECISION, WIDENS)
    base = first * hidden_width
    place = row[:, None] * hidden_width + column[None, :]
    is_place = is_row[:, None] & is_column[None, :]
    gate = tl.load(gate_ptr + base + place, mask=is_place, other=0.0).to(acc)
    up = tl.load(up_ptr + base + place, mask=is_place, other=0.0).to(acc)
    share = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * share
    grad_gate = grad_hidden * up * (share + silu * (1.0 - share))
    tl.store(grad_gate_ptr + base + place, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=is_place)
    tl.store(grad_up_ptr + base + place, (grad_hidden * silu).to(grad_up_ptr.dtype.element_ty), mask=is_place)
    tl.store(hidden_ptr + base + place, (silu * up).to(hidden_ptr.dtype.element_ty), mask=is_place)


@triton.jit
def weight_gradient(
    a_ptr,
    index_ptr,
    b_ptr,
    b2_ptr,
    out_ptr,
    out2_ptr,
    end_ptr,
    width_a,
    width_b,
    HAS_INDEX: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out[e] = a^T b`` (and ``out2[e] = a^T b2``) over the rows of expert e, ``end[e-1]`` to ``end[e]``."""
    num_columns = tl.cdiv(width_b, BLOCK_N)
    num_blocks = tl.cdiv(width_a, BLOCK_M) * num_columns
    expert = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    at_a = (block // num_columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_b = (block % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_a = at_a < width_a
    is_b = at_b < width_b
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    acc = tl.float64 if IS_DOUBLE else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    total2 = tl.zeros([BLOCK_M, BLOCK_N], dtype=acc)
    for start in range(first, end, BLOCK_K):
        row = tl.arange(0, BLOCK_K)
        is_row = row < end - start
        source = a_ptr + start * width_a + row[:, None] * width_a
        if HAS_INDEX:
            source = a_ptr + tl.load(index_ptr + start + row, mask=is_row, other=0)[:, None] * width_a
        a = tl.load(source + at_a[None, :], mask=is_row[:, None] & is_a[None, :], other=0.0)
        a = tl.trans(a)
        place = row[:, None] * width_b + at_b[None, :]
        is_place = is_row[:, None] & is_b[None, :]
        b = tl.load(b_ptr + start * width_b + place, mask=is_place, other=0.0)
        total = _multiply_add(a, b, total, PRECISION, WIDENS)
        if HAS_SECOND:
            b2 = tl.load(b2_ptr + start * width_b + place, mask=is_place, other=0.0)
            total2 = _multiply_add(a, b2, total2, PRECISION, WIDENS)
    base = expert * width_a * width_b
    place = at_a[:, None] * width_b + at_b[None, :]
    is_place = is_a[:, None] & is_b[None, :]
    tl.store(out_ptr + base + place, total.to(out_ptr.dtype.element_ty), mask=is_place)
    if HAS_SECOND:
        tl.store(out2_ptr + base + place, total2.to(out2_ptr.dtype.element_ty), mask=is_place)
