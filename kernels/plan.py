"""Which tokens meet exactly, and what stands for the rest: the plan of one attention call.

Notation (docs/DESIGN.md): B batch, H heads, L tokens (video and text), D head_dim, Cq query blocks,
Ck key blocks. Query block i holds the tokens query_order[query_offsets[i]:query_offsets[i+1]], key block j
the tokens key_order[key_offsets[j]:key_offsets[j+1]]. For a query q of block i, with s(q,k) = q.k * scale:

    num(q) = sum_{j kept} sum_{t in j} exp(s(q,k_t)) v_t + sum_j exp(s(q,kc_j) + bias_ij) vc_j
    den(q) = the same sums without the values;   out(q) = num / den

(arXiv 2603.08982, equation of the linear compensation branch; bias_ij = log n_j there, plus the Jensen gap
here where the routing asks for it.) bias is -inf where block j is kept for i, is empty, or is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUERY_BLOCK = 128
KEY_BLOCK = 64
MOST_MATRICES = 256
"""Of first-order terms, for each head (docs/TRIED.md has what other numbers give)."""
# The paper's cluster counts are for 720p video of 75,600 tokens; others are scaled by their token count.
PAPER_TOKENS, PAPER_QUERY_CLUSTERS, PAPER_KEY_CLUSTERS = 75_600, 300, 1000


class SparsePlan(NamedTuple):
    """The tensors between the three ops of a site; the class docstring's order is the op's return order.

    key, value          [B,H,L,D], dtype of the query: permuted into key order; slots from
                        key_offsets[...,-1] on hold masked keys and are zero
    query_order         [B,H,L] int32: slot -> token. Video tokens first, then text
    query_offsets       [B,H,Cq+1] int32: first slot of each query block, ascending; the last is L
    key_order           [B,H,L] int32: slot -> token. Valid video tokens, valid text, then masked tokens
    key_offsets         [B,H,Ck+1] int32: first slot of each key block; the last is the number of valid keys
    key_centroids       [B,H,Ck,D], dtype of the query: mean of the block's keys, 0 for an empty block
    value_centroids     [B,H,Ck,D], dtype of the query: mean of the block's values
    bias                [B,H,Cq,Ck] float32: logit bias of centroid j for the queries of block i, or -inf
    kept_count          [B,H,Cq] int32: number of key blocks computed exactly for query block i
    kept_blocks         [B,H,Cq,Ck] int32: their indices, ascending, in the first kept_count places; the
                        other places are unspecified
    query_centroids     [B,H,Cq,D], dtype of the query: mean of the block's queries, 0 for an empty block
    """

    key: Tensor
    value: Tensor
    query_order: Tensor
    query_offsets: Tensor
    key_order: Tensor
    key_offsets: Tensor
    key_centroids: Tensor
    value_centroids: Tensor
    bias: Tensor
    kept_count: Tensor
    kept_blocks: Tensor
    query_centroids: Tensor


class Terms(NamedTuple):
    """First-order terms of some heads (kernels/attention/first_order.py).

    places [H] int32: which of the matrices are a head's, -1: none. matrices [B,heads,groups,D,D]: M_g of
    term_blocks(Cq) query blocks each, fewer in the last group.
    """

    places: Tensor
    matrices: Tensor


def term_blocks(query_blocks: int) -> int:
    """So many consecutive query blocks share a matrix of first-order terms: a power of two."""
    at_least = -(-query_blocks // MOST_MATRICES)
    return 1 << (at_least - 1).bit_length()


def block_counts(length: int, num_text: int, order: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """((video, text) query blocks, (video, text) key blocks). Integer arithmetic only: SymInts too."""
    video = length - num_text
    text = (-(-num_text // QUERY_BLOCK), -(-num_text // KEY_BLOCK))
    if order == "kmeans":
        # +1 rather than max(1, ...): the same for symbolic lengths, without a guard
        queries = video * PAPER_QUERY_CLUSTERS // PAPER_TOKENS + 1
        keys = video * PAPER_KEY_CLUSTERS // PAPER_TOKENS + 1
    else:
        queries, keys = -(-video // QUERY_BLOCK), -(-video // KEY_BLOCK)
    return (queries, text[0]), (keys, text[1])


def plan_shapes(like: Tensor, num_text: int, order: str) -> list[tuple[int, ...]]:
    """The shapes of a plan's tensors, for keys like [B,H,L,D]."""
    B, H, L, D = like.shape
    (vq, tq), (vk, tk) = block_counts(L, num_text, order)
    Cq, Ck = vq + tq, vk + tk
    sizes: tuple[tuple[int, ...], ...] = (
        (L, D), (L, D), (L,), (Cq + 1,), (L,), (Ck + 1,), (Ck, D), (Ck, D), (Cq, Ck), (Cq,), (Cq, Ck), (Cq, D),
    )  # fmt: skip
    return [(B, H, *size) for size in sizes]


def empty_plan(query: Tensor, num_text: int, order: str) -> SparsePlan:
    """A plan's tensors, uninitialised: the fake of `clustered_permute`, and its answer in a dense call."""
    x, i, f = query.dtype, torch.int32, torch.float32
    dtypes = (x, x, i, i, i, i, x, x, f, i, i, x)
    shapes = plan_shapes(query, num_text, order)
    return SparsePlan(*(query.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)))
