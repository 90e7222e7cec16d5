"""Sparse attention with centroid compensation in plain PyTorch: skipped blocks really cost nothing.

Per batch element and head, as many query blocks at a time as there are threads: gather the rows that each block meets
(tokens of kept blocks, centroids of compensated ones), two batched matrix products and a softmax, all in float32, one
rounding at the end. So each thread has a block of its own, whose rows and weights fit into its cache. All batches are
computed in the same memory, which is faster than new memory for each (docs/TRIED.md).

Blocks of a batch have equally many queries and, being sorted, about as many rows; lists of rows are padded to the
longest with a row of weight 0. Lists are read on the host, so this path is for the CPU. `variable` (blocks of any
size?) is the Triton kernels' business and makes no difference here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..plan import SparsePlan, Terms, term_blocks


class _Batch(NamedTuple):
    """g query blocks of one head, each of m queries, and the n rows at most that each of them meets.

    logits and values lie in memory that the next batch overwrites.
    """

    head: tuple[int, int]
    blocks: Tensor  # [g] int64
    tokens: Tensor  # [g*m] their queries, in the model's order
    query: Tensor  # [g,m,D] float32
    logits: Tensor  # [g,m,n] scale q.k + bias; -inf in padding
    values: Tensor  # [g,n,D]
    skipped: Tensor  # [g,n] bool: centroids, in the last Ck places, and padding, in the first

    def softmax(self) -> tuple[Tensor, Tensor]:
        """(weights, in place of the logits; their sums of the values [g,m,D])."""
        weights = torch.softmax(self.logits, dim=-1, out=self.logits)
        return weights, torch.bmm(weights, self.values)


def _batches(query: Tensor, plan: SparsePlan, scale: float) -> Iterator[_Batch]:
    """The query blocks that hold queries and meet anything."""
    (B, H, L, D), (Cq, Ck) = query.shape, plan.bias.shape[-2:]
    none = plan.bias.new_full((B, H, Cq, Ck + 1), -torch.inf)
    listed = torch.arange(Ck, device=query.device) < plan.kept_count[..., None]
    kept = none.scatter(-1, torch.where(listed, plan.kept_blocks.long(), Ck), 0)[..., :Ck]
    # What a query block can meet, in columns: the tokens of each key block, the centroid of each, and padding.
    bias = torch.cat([kept, plan.bias, none[..., :1]], dim=-1)
    rows_of = F.pad(plan.key_offsets.diff(dim=-1), (0, Ck + 1), value=1)
    counts = ((bias != -torch.inf) * rows_of[:, :, None]).sum(-1)
    query_sizes = plan.query_offsets.diff(dim=-1)

    together, longest = min(torch.get_num_threads(), Cq), int(counts.max())
    table_memory = query.new_empty((2, L + Ck + 1, D), dtype=torch.float32)
    row_memory = query.new_empty((2, together * longest, D), dtype=torch.float32)
    logit_memory = query.new_empty(together * int(query_sizes.max()) * longest, dtype=torch.float32)
    for head in product(range(B), range(H)):
        column_of = torch.arange(2 * Ck + 1, device=query.device).repeat_interleave(rows_of[head])
        end = len(column_of)
        tables = [
            torch.cat([x[head][: end - Ck - 1], centroids[head], x.new_zeros(1, D)], out=memory[:end])
            for x, centroids, memory in zip(
                (plan.key, plan.value), (plan.key_centroids, plan.value_centroids), table_memory, strict=True
            )
        ]
        sizes, numbers = query_sizes[head].tolist(), counts[head].tolist()
        batches = list(_alike(sizes, numbers, together))
        if not batches:
            continue
        # What can be looked up for all batches at once: a batch is a few rows of it.
        ordered = [i for batch in batches for i in batch]
        blocks = torch.tensor(ordered, device=query.device)
        met = (bias[head] != -torch.inf).index_select(1, column_of).nonzero()[:, 1].split(numbers)
        rows = pad_sequence([met[i] for i in ordered], True, end - 1, "left")
        columns = column_of[rows]
        biases = bias[head].index_select(0, blocks).gather(1, columns)[:, None]
        skipped = columns >= Ck
        slots = plan.query_order[head].split([*sizes, L - sum(sizes)])
        tokens = torch.cat([slots[i] for i in ordered]).long()
        queries = query[head].index_select(0, tokens).float()
        first = at = 0
        for batch in batches:
            g, m, n = len(batch), sizes[batch[0]], max(numbers[i] for i in batch)
            some, last = slice(first, first + g), slice(rows.shape[1] - n, None)
            keys, values = (
                torch.index_select(table, 0, rows[some, last].flatten(), out=memory[: g * n]).view(g, n, D)
                for table, memory in zip(tables, row_memory, strict=True)
            )
            own = slice(at, at + g * m)
            q = queries[own].view(g, m, D)
            out = logit_memory[: g * m * n].view(g, m, n)
            logits = torch.baddbmm(biases[some, :, last], q, keys.mT, alpha=scale, out=out)
            yield _Batch(head, blocks[some], tokens[own], q, logits, values, skipped[some, last])
            first, at = first + g, at + g * m


def _alike(queries: list[int], rows: list[int], most: int) -> Iterator[list[int]]:
    """Blocks that have any of both, in groups of equally many queries and about as many rows."""
    sizes = list(zip(queries, rows, strict=True))
    filled = sorted((i for i, size in enumerate(sizes) if all(size)), key=sizes.__getitem__, reverse=True)
    for _, equal in groupby(filled, queries.__getitem__):
        blocks = list(equal)
        yield from (blocks[first : first + most] for first in range(0, len(blocks), most))


def sparse_exact(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, variable: bool = True
) -> tuple[Tensor, Tensor]:
    """Writes the kept blocks' softmax into out [B,H,L,D]; returns (out, lse [B,H,L] float32).

    A query that meets nothing has out 0 and lse -inf.
    """
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    out.zero_()
    for x in _batches(query, plan._replace(bias=torch.full_like(plan.bias, -torch.inf)), scale):
        lse[x.head].index_copy_(0, x.tokens, x.logits.logsumexp(dim=-1).flatten())
        _write(out, x, x.softmax()[1])
    return out, lse


def centroid_compensation(
    query: Tensor,
    exact: Tensor,
    lse: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
) -> Tensor:
    """Writes the joint softmax of the exact part and the centroids into out and returns it.

    (e^lse exact + sum_j w_j vc_j) / (e^lse + sum_j w_j), w_j = e^(scale q.kc_j + bias_j)
    """
    out.copy_(exact)
    for x in _batches(query, plan._replace(kept_count=torch.zeros_like(plan.kept_count)), scale):
        skipped = x.logits.logsumexp(dim=-1, keepdim=True)
        kept = lse[x.head][x.tokens].view_as(skipped)
        both = torch.logaddexp(skipped, kept)
        known = exact[x.head][x.tokens].view_as(x.query).float()
        _write(out, x, known * (kept - both).exp() + x.softmax()[1] * (skipped - both).exp())
    return out


def attend(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    terms: Terms | None = None,
) -> Tensor:
    """Both in one: centroids are further keys of one softmax. Writes into out and returns it.

    terms: of first order, kernels/attention/first_order.py.

    A query that meets nothing, token or centroid, has out 0, as in scaled_dot_product_attention.
    """
    places = [] if terms is None else terms.places.tolist()
    group = term_blocks(plan.bias.shape[2])
    out.zero_()
    for x in _batches(query, plan, scale):
        weights, result = x.softmax()
        b, h = x.head
        if terms is not None and (place := places[h]) >= 0:
            last = slice(-plan.bias.shape[-1], None)
            share = (weights[..., last] * x.skipped[:, None, last]).sum(-1, keepdim=True)
            result += share * (x.query @ terms.matrices[b, place].index_select(0, x.blocks // group))
        _write(out, x, result)
    return out


def _write(out: Tensor, batch: _Batch, result: Tensor) -> None:
    out[batch.head].index_copy_(0, batch.tokens, result.flatten(0, 1).to(out.dtype))
