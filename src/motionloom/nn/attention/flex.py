"""A pattern as a FlexAttention block mask: compiled on first use, forward and backward on a GPU, forward only
on a CPU.

Shapes: B batch, H heads, N queries, M keys, D channels of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from motionloom.nn.attention.pattern import Plan

BLOCK = 128
TABLE = 32
"""Tables of classes are padded to multiples of this."""


def applies(plan: Plan, q: Tensor, needs_gradient: bool) -> bool:
    """Whether FlexAttention can compute it here at all."""
    if q.dtype == torch.float64 or q.shape[-1] < 16 or plan.device.type not in ("cuda", "cpu"):
        return False
    if plan.device.type == "cpu":
        return not needs_gradient and _compiler_at_hand()
    return True


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D); differentiable on a GPU."""
    if q.device.type == "cpu":
        # It refuses tensors that ask for a gradient even where none is recorded.
        q, k, v = q.detach(), k.detach(), v.detach()
    out: Tensor = _compiled()(q, k, v, block_mask=_block_mask(plan))
    return out


def _block_mask(plan: Plan) -> Any:
    """Which blocks of 128 x 128 pairs are seen wholly, and which in part, from the classes that are in them:
    the full mask never exists."""
    if "flex" not in plan.made:
        from torch.nn.attention.flex_attention import BlockMask

        q_BN, k_BM, table_BQK = plan.classes
        q_BnQ, q_whole_n = _in_blocks(q_BN, table_BQK.shape[1])
        k_BmK, k_whole_m = _in_blocks(k_BM, table_BQK.shape[2])
        some, none = (q_BnQ @ t.float() @ k_BmK.transpose(1, 2) > 0 for t in (table_BQK, ~table_BQK))
        whole = some & ~none & q_whole_n[:, None] & k_whole_m
        plan.made["flex"] = BlockMask.from_kv_blocks(
            *_ordered(some & ~whole),
            *_ordered(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(q_BN, k_BM, table_BQK),
            seq_lengths=(plan.queries, plan.keys),
        )
    return plan.made["flex"]


def _mask_mod(q_BN: Tensor, k_BM: Tensor, table_BQK: Tensor) -> Any:
    # One function and few shapes for all patterns: another one would be compiled anew. Where all samples have
    # one rule, ``each`` is 0.
    each = torch.tensor(int(len(q_BN) > 1), device=q_BN.device)
    sizes = [-n % TABLE for n in reversed(table_BQK.shape[1:])]
    table_BQK = torch.nn.functional.pad(table_BQK, (0, sizes[0], 0, sizes[1]))

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b * each
        return table_BQK[row, q_BN[row, q], k_BM[row, k]]

    return sees


def _in_blocks(class_BN: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(B, blocks, classes): 1.0 where a class is in a block; (blocks,): whether it is a whole block."""
    batch, tokens = class_BN.shape
    blocks = -(-tokens // BLOCK)
    block_N = torch.arange(tokens, device=class_BN.device) // BLOCK
    present = torch.zeros(batch, blocks * classes, device=class_BN.device)
    present.scatter_(1, block_N * classes + class_BN, 1.0)
    whole = (torch.arange(blocks, device=class_BN.device) + 1) * BLOCK <= tokens
    return present.view(batch, blocks, classes), whole


def _ordered(blocks_Bnm: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their columns first, (B, 1, n) and (B, 1, n, m) int32."""
    columns = blocks_Bnm.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_Bnm.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _compiler_at_hand() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True
