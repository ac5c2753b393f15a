"""Triton kernels: the accept-while-equal rule, and packing a step's tokens for the host. Triton and torch; no vLLM.

Both kernels work on flat rows with per-request bounds that stay on the device: no host waits, and no allocations except
the results. Slow forms of the same functions are in :mod:`vllm_specplug.samplers.reference`.
"""

from __future__ import annotations

import torch

try:
    # untyped, and missing without CUDA
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError(
        "vllm_specplug.samplers.kernels needs the package triton, which comes with CUDA builds of torch; without it, "
        "vllm_specplug.samplers.base.accept_while_equal verifies drafts in plain PyTorch"
    ) from error

NUM_HEADER_COLUMNS = 2
"""Columns of :func:`pack_emitted` before the first token: total length, number of emitted tokens."""


# Not tl.min: the first import of triton decides whether Triton's own functions are interpreted, and another module may
# have imported triton before TRITON_INTERPRET was set.
@triton.jit
def _smaller(left, right):  # type: ignore[no-untyped-def]
    return tl.minimum(left, right)


@triton.jit  # type: ignore[untyped-decorator]
def _verify_kernel(  # type: ignore[no-untyped-def]
    target_ptr,  # [num_rows]
    draft_ptr,  # [num_rows]
    cu_num_rows_ptr,  # [num_requests + 1]
    token_ids_ptr,  # [num_requests, width]
    num_emitted_ptr,  # [num_requests]
    width,
    block_size: tl.constexpr,  # a power of 2, at least width
):
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_num_rows_ptr + request).to(tl.int64)
    num_rows = (tl.load(cu_num_rows_ptr + request + 1).to(tl.int64) - start).to(tl.int32)
    depth = tl.arange(0, block_size)
    target = tl.load(target_ptr + start + depth, mask=depth < num_rows, other=-1)
    tl.store(token_ids_ptr + request * width + depth, target, mask=depth < width)
    # The draft token to compare with `target` is the input of the next row. The last row has -1 instead, so that the
    # search below always ends inside the request.
    draft = tl.load(draft_ptr + start + depth + 1, mask=depth + 1 < num_rows, other=-1).to(tl.int64)
    stops = (draft < 0) | (draft != target)
    num_accepted = tl.reduce(tl.where(stops, depth, block_size), 0, _smaller)
    tl.store(num_emitted_ptr + request, tl.where(num_rows > 0, num_accepted + 1, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _pack_kernel(  # type: ignore[no-untyped-def]
    idx_mapping_ptr,  # [num_requests]
    num_emitted_ptr,  # [num_requests]
    total_len_ptr,  # [max_requests]
    all_token_ids_ptr,  # [max_requests, max_len]
    all_token_ids_stride,
    verified_ptr,  # [num_requests, >= width], or None
    verified_stride,
    out_ptr,  # [num_requests, NUM_HEADER_COLUMNS + width]
    out_stride,
    width,
    num_header_columns: tl.constexpr,
    block_size: tl.constexpr,  # a power of 2, at least width
):
    row = tl.program_id(0).to(tl.int64)  # int64: the offsets below can pass 2**31
    request = tl.load(idx_mapping_ptr + row).to(tl.int64)
    num_emitted = tl.load(num_emitted_ptr + row)
    total_len = tl.load(total_len_ptr + request)
    out_row = out_ptr + row * out_stride
    tl.store(out_row, total_len)
    tl.store(out_row + 1, num_emitted)
    column = tl.arange(0, block_size)
    first = request * all_token_ids_stride + total_len - num_emitted
    token_ids = tl.load(all_token_ids_ptr + first + column, mask=(column < num_emitted) & (column < width), other=-1)
    if verified_ptr is not None:
        behind = (column >= num_emitted) & (column < width)
        verified = tl.load(verified_ptr + row * verified_stride + column, mask=behind, other=-1)
        token_ids = tl.where(behind, verified.to(tl.int32), token_ids)
    tl.store(out_row + num_header_columns + column, token_ids, mask=column < width)


def verify_drafts(
    target_token_ids: torch.Tensor, draft_token_ids: torch.Tensor, cu_num_rows: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept draft tokens while they equal the target's: the rule of ``accept_while_equal``, for ragged rows.

    Request ``i`` has the logits rows ``cu_num_rows[i]`` to ``cu_num_rows[i + 1] - 1``, at most ``width``. This limit is
    not checked, since the bounds are on the device.

    Args:
        target_token_ids: ``[num_rows]`` int64, the target's own token at each row.
        draft_token_ids: ``[num_rows]`` int32 or int64, the *input* token of each row. A request's first row holds no
            draft; its row ``j`` holds draft ``j``, which is compared with the target's token of row ``j - 1``.
            Negative ids are placeholders and never accepted.
        cu_num_rows: ``[num_requests + 1]`` int32 or int64.
        width: longest draft plus one.

    Returns:
        ``token_ids``, ``[num_requests, width]`` int64: the target's token at *every* row of a request, also behind the
        first rejection, then -1; and ``num_emitted``, ``[num_requests]`` int32: number of emitted tokens, which is
        accepted draft tokens plus one, or 0 for a request without rows.

    Raises:
        ValueError: a tensor is not one-dimensional and contiguous, or has another type than named here, or targets and
            draft tokens differ in number.

    Example: rows of one request with targets ``[5, 7, 9]`` and inputs ``[3, 5, 8]`` give ``[[5, 7, 9]]`` and ``[2]``:
    draft token 5 is accepted, 7 replaces draft token 8, and 9 is the target's token after 8.
    """
    _check("target_token_ids", target_token_ids, (torch.int64,))
    _check("draft_token_ids", draft_token_ids, (torch.int32, torch.int64))
    _check("cu_num_rows", cu_num_rows, (torch.int32, torch.int64))
    if len(draft_token_ids) != len(target_token_ids):
        raise ValueError(f"{len(draft_token_ids)} rows of draft_token_ids for {len(target_token_ids)} target tokens")
    num_requests = len(cu_num_rows) - 1
    token_ids = target_token_ids.new_empty(num_requests, width)
    num_emitted = target_token_ids.new_empty(num_requests, dtype=torch.int32)
    if num_requests:
        _verify_kernel[(num_requests,)](
            target_token_ids,
            draft_token_ids,
            cu_num_rows,
            token_ids,
            num_emitted,
            width,
            block_size=triton.next_power_of_2(width),
            num_warps=1,
        )
    return token_ids, num_emitted


def pack_emitted(
    idx_mapping: torch.Tensor,
    num_emitted: torch.Tensor,
    total_len: torch.Tensor,
    all_token_ids: torch.Tensor,
    verified: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Pack a step's results for the host into one tensor, so that one copy suffices.

    Args:
        idx_mapping: ``[num_requests]`` int64 or int32, table row of each request of the batch; none may be negative.
        num_emitted: ``[num_requests]`` int32, number of tokens that each request emitted in this step, at most
            ``width``.
        total_len: ``[max_requests]`` int32, by table row: number of tokens so far, the emitted ones included.
        all_token_ids: ``[max_requests, max_len]`` int32, by table row: prompt and output; any row stride.
        verified: ``[num_requests, >= width]`` int64, the ``token_ids`` of this step's :func:`verify_drafts`, or None.
        out: ``[num_requests, NUM_HEADER_COLUMNS + width]`` int32, filled with ``total_len``, ``num_emitted``, the
            emitted tokens, and behind them the tokens of ``verified`` in the same columns (-1 if it is None).

    Raises:
        ValueError: a tensor has another type than named here, or its last dimension is not contiguous.

    Example: tokens ``[1, 2, 5, 7]`` of which 2 were emitted, ``verified = [[5, 7, 9]]``: ``[[4, 2, 5, 7, 9]]``.
    """
    _check("idx_mapping", idx_mapping, (torch.int32, torch.int64))
    _check("num_emitted", num_emitted, (torch.int32,))
    _check("total_len", total_len, (torch.int32,))
    _check("all_token_ids", all_token_ids, (torch.int32,), num_dims=2)
    _check("out", out, (torch.int32,), num_dims=2)
    width = out.shape[1] - NUM_HEADER_COLUMNS
    if verified is not None:
        _check("verified", verified, (torch.int64,), num_dims=2)
        if verified.shape[1] < width:
            raise ValueError(f"verified has {verified.shape[1]} columns, out has room for {width} tokens")
    if len(idx_mapping):
        _pack_kernel[(len(idx_mapping),)](
            idx_mapping,
            num_emitted,
            total_len,
            all_token_ids,
            all_token_ids.stride(0),
            verified,
            0 if verified is None else verified.stride(0),
            out,
            out.stride(0),
            width,
            num_header_columns=NUM_HEADER_COLUMNS,
            block_size=triton.next_power_of_2(width),
            num_warps=1,
        )


def _check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], num_dims: int = 1) -> None:
    # A kernel would silently read the wrong memory.
    if tensor.dtype not in dtypes or tensor.dim() != num_dims or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(
            f"{name} must have {num_dims} dimension(s), the last one contiguous, and type "
            f"{' or '.join(map(str, dtypes))}; given: shape {list(tensor.shape)}, strides {list(tensor.stride())}, "
            f"{tensor.dtype}"
        )
