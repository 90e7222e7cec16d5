"""Blocks of all three orders: permutations, offsets, compactness, masks, determinism, NaN."""

from __future__ import annotations

import pytest
import torch
from clustered import is_permutation, radius, tokens
from torch import Tensor

from svg_ear_compile.kernels import context
from svg_ear_compile.kernels.blocks import cluster, splits
from svg_ear_compile.kernels.blocks.cubes import cubes
from svg_ear_compile.kernels.papers import kmeans
from svg_ear_compile.kernels.papers import kmeans_torch as kmeans_steps
from svg_ear_compile.kernels.plan import KEY_BLOCK, QUERY_BLOCK, block_counts

CPU = torch.device("cpu")
ORDERS = ("cubes", "splits", "kmeans")
GRID = (3, 7, 13)  # 273 video tokens: ragged in every direction, and in blocks of 64 and 128


def make(
    x: Tensor,
    order: str,
    *,
    valid: Tensor | None = None,
    queries: bool = False,
    num_text: int = 0,
    text_first: bool = False,
    carried: Tensor | None = None,
    grid: tuple[int, ...] | None = GRID,
    clusters: int = 6,
    split_heads: tuple[bool, ...] = (),
) -> tuple[cluster.Blocks, Tensor | None]:
    counts = block_counts(x.shape[2], num_text, order)[0 if queries else 1]
    if order == "kmeans":
        counts = (clusters, counts[1])
    block = QUERY_BLOCK if queries else KEY_BLOCK
    return cluster.make_blocks(
        x, valid, counts, block, carried, num_text, text_first, order, [grid] if grid else [], 0, split_heads
    )


def coordinates(grid: tuple[int, ...], order: Tensor) -> Tensor:
    _, H, W = grid
    return torch.stack([order // (H * W), order // W % H, order % W], dim=-1)


def test_what_is_remembered_changes_nothing() -> None:
    """Other lengths, grids, texts, masks and heads take turns; none gets what is another's."""
    memo = context.Memo()
    lengths = ((273, "auto", GRID), (273, "splits", None), (150, "splits", None), (150, "auto", None))
    heads = ((), (True, False, True), (False, True, False))
    runs = [
        (tokens(1, 3, L + num_text, 16), order, grid, num_text, chosen)
        for L, order, grid in lengths for num_text in (0, 9) for chosen in heads
    ]  # fmt: skip
    for _ in range(2):
        for x, order, grid, num_text, chosen in runs:
            for valid in (None, torch.arange(x.shape[2])[None] < 140):
                counts = block_counts(x.shape[2], num_text, order)[1]
                how = (
                    x,
                    valid,
                    counts,
                    KEY_BLOCK,
                    None,
                    num_text,
                    True,
                    order,
                    [grid] if grid else [],
                    0,
                    chosen,
                )
                found, expected = cluster.make_blocks(*how, memo.remember), cluster.make_blocks(*how)
                for a, b in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or torch.equal(a, b)
    assert memo.made


@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (1, 5, 9), (2, 5, 7), (5, 1, 9), (4, 8, 16), (9, 6, 5), (13, 30, 45)]
)
def test_cubes_is_a_permutation_whose_steps_are_short(grid: tuple[int, ...]) -> None:
    order = cubes(grid, CPU)
    assert is_permutation(order)
    steps = coordinates(grid, order).diff(dim=0).abs()
    columns = -(-grid[0] // 4) * -(-grid[1] // 4)
    assert steps.sum(-1).gt(1).sum() <= columns - 1, "only the way from column to column may jump"
    assert not steps.numel() or steps.max() <= 4


@pytest.mark.parametrize("grid", [(21, 45, 80), (13, 30, 45), (16, 32, 32), (33, 30, 53)])
def test_cubes_are_compact_on_ragged_grids(grid: tuple[int, ...]) -> None:
    where = coordinates(grid, cubes(grid, CPU)).float()
    for size, ideal in ((64, (4, 4, 4)), (128, (4, 4, 8))):
        box = radius(torch.cartesian_prod(*(torch.arange(float(n)) for n in ideal)), size)
        # Ragged slabs are 3 to 4 wide, so boxes get at most 4/3 longer along the width, and a few straddle
        # two columns; runs of the raster order are several times as wide.
        assert radius(where, size) <= 1.25 * box
        if grid[0] % 4 == grid[1] % 4 == grid[2] % 8 == 0:
            assert radius(where, size) == pytest.approx(box, rel=1e-6)


def exact_splits(x: Tensor, tiles: int, block: int) -> Tensor:
    """The recursion of `splits` on x [N,D] float64, with exact principal directions."""
    index = torch.arange(x.shape[0])
    if tiles == 1:
        return index
    centred = x - x.mean(0)
    along = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    index = along.argsort(stable=True)
    parts = index[: -(-tiles // 2) * block], index[-(-tiles // 2) * block :]
    return torch.cat(
        [p[exact_splits(x[p], t, block)] for p, t in zip(parts, (-(-tiles // 2), tiles // 2), strict=True)]
    )


@pytest.mark.parametrize(("n", "block"), [(1000, 64), (1000, 128), (515, 64), (700, 32)])
def test_splits_are_as_compact_as_with_exact_directions(n: int, block: int) -> None:
    x = tokens(2, 2, n, 24)
    order = splits.splits(x, None, block)
    assert is_permutation(order)
    found = radius(x.gather(2, order[..., None].expand_as(x)), block)
    exact = radius(
        torch.stack([h[exact_splits(h.double(), -(-n // block), block)] for h in x.flatten(0, 1)]), block
    )
    unsorted = radius(x, block)
    assert found <= exact + 0.1 * (unsorted - exact)


def test_splits_of_separate_clusters_are_the_clusters() -> None:
    label = torch.randperm(8 * 64, generator=torch.Generator().manual_seed(1)) % 8
    x = (torch.eye(8)[label] * 100)[None, None] + 0.01 * torch.randn(
        1, 1, 512, 8, generator=torch.Generator().manual_seed(2)
    )
    found = label[splits.splits(x, None, 64)[0, 0]].view(8, 64)
    assert (found == found[:, :1]).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("num_text", [0, 1, 70, 129])
def test_text_comes_last_in_blocks_of_its_own(
    order: str, queries: bool, text_first: bool, num_text: int
) -> None:
    n = 273
    x = tokens(2, 3, n + num_text, 16)
    blocks, state = make(x, order, queries=queries, num_text=num_text, text_first=text_first)
    block = QUERY_BLOCK if queries else KEY_BLOCK
    assert blocks.order.dtype == blocks.offsets.dtype == torch.int32
    assert blocks.order.is_contiguous()
    assert blocks.offsets.is_contiguous()
    assert is_permutation(blocks.order)
    first = 0 if text_first else n
    assert (blocks.order[..., n:] == torch.arange(first, first + num_text)).all()
    video = blocks.offsets.shape[-1] - 1 - -(-num_text // block)
    assert (blocks.offsets[..., video:].diff() <= block).all()
    assert (blocks.offsets[..., video] == n).all()
    assert (blocks.offsets[..., -1] == n + num_text).all()
    assert (blocks.offsets.diff() >= 0).all()
    if order == "kmeans":
        assert state is not None
        assert state.shape == (2, 3, 6, 16)
    else:
        assert (state is not None) == (order == "splits")
        assert (blocks.offsets[..., :video] == torch.arange(video) * block).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text_first", [True, False])
def test_masked_keys_are_in_no_block(order: str, text_first: bool) -> None:
    num_text, n = 70, 273
    x = tokens(3, 2, n + num_text, 16)
    valid = torch.rand(3, n + num_text, generator=torch.Generator().manual_seed(3)) < 0.7
    valid[1] = True
    first, text = (num_text, 0) if text_first else (0, n)
    valid[2, first : first + n] = False  # no video key at all
    blocks, state = make(x, order, valid=valid, num_text=num_text, text_first=text_first)
    assert is_permutation(blocks.order)
    for b in range(3):
        ends, seen = blocks.offsets[b], valid[b]
        n_video = int(seen[first : first + n].sum())
        assert (ends[:, -1] == seen.sum()).all()
        assert (ends[:, -3] == n_video).all(), "text blocks start where the valid video ends"
        for h in range(2):
            slots = blocks.order[b, h].long()
            assert seen[slots[: ends[h, -1]]].all()
            assert not seen[slots[ends[h, -1] :]].any()
            in_text = [t for t in range(text, text + num_text) if seen[t]]
            assert slots[n_video : ends[h, -1]].tolist() == in_text
        if order != "kmeans":
            assert (ends[:, :-2] == (torch.arange(6) * 64).clamp(max=n_video)).all()
    # What a masked token holds is of no consequence.
    poisoned = torch.where(valid[:, None, :, None], x, torch.nan)
    again, state_again = make(poisoned, order, valid=valid, num_text=num_text, text_first=text_first)
    assert all(torch.equal(p, q) for p, q in zip(blocks, again, strict=True))
    if state is not None and state_again is not None:
        assert torch.equal(state[:2], state_again[:2])


def test_masked_tokens_do_not_move_the_clusters() -> None:
    x = tokens(1, 2, 273, 16)
    valid = (torch.arange(273) % 3 != 1)[None]
    left = valid[0].nonzero()[:, 0]
    carried = x[:, :, left[:6]].clone()
    few, _ = make(x[:, :, left], "kmeans", carried=carried, grid=None)
    many, _ = make(x, "kmeans", valid=valid, carried=carried, grid=None)
    assert torch.equal(few.offsets, many.offsets)
    assert torch.equal(left[few.order.long()], many.order[..., : len(left)].long())


def test_masked_tokens_do_not_move_the_splits() -> None:
    """Two tight clusters of 64, and masked tokens anywhere, between and around them."""
    x = torch.zeros(1, 1, 256, 4)
    x[..., 0] = torch.tensor([-1.0, 1.0]).repeat(128)
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    valid = (torch.arange(256) // 2 % 2 == 0)[None]
    x[:, :, ~valid[0]] = 100 * torch.randn(128, 4, generator=torch.Generator().manual_seed(1))
    order = splits.splits(x, valid, 64)[0, 0]
    assert valid[0, order[:128]].all()
    assert not valid[0, order[128:]].any()
    blocks = (order[:128] % 2).view(2, 64)
    assert (blocks == blocks[:, :1]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_equal_tokens_keep_their_order(order: str) -> None:
    blocks, _ = make(torch.full((1, 2, 273, 16), 3.0), order, grid=None)
    assert (blocks.order == torch.arange(273)).all()
    if order == "kmeans":
        assert blocks.offsets[0, 0].tolist() == [0] + [273] * 6, "the lowest index wins ties"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_nan_and_inf_stay_in_their_head(order: str, bad: float) -> None:
    x = tokens(2, 3, 273, 16)
    good, good_state = make(x, order, grid=None)
    x[1, 2, [100, 272], 5] = bad
    blocks, state = make(x, order, grid=None)
    assert is_permutation(blocks.order)
    assert (blocks.offsets[..., -1] == 273).all()
    assert (blocks.offsets.diff() >= 0).all()
    other = torch.ones(2, 3, dtype=torch.bool)
    other[1, 2] = False
    assert torch.equal(blocks.order[other], good.order[other])
    if state is not None and good_state is not None:
        assert torch.equal(state[other], good_state[other])
        later, later_state = make(tokens(2, 3, 273, 16, seed=5), order, carried=state, grid=None)
        assert later_state is not None
        assert later_state.isfinite().all(), "a NaN of one step does not live on in the clusters"
        assert is_permutation(later.order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_twice_any_strides_any_batch(order: str, dtype: torch.dtype) -> None:
    x = tokens(2, 3, 273, 16).to(dtype)
    before = torch.get_rng_state()
    once, state = make(x, order)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"
    laid_out = x.transpose(1, 2).contiguous().transpose(1, 2)
    for again, state_again in (make(x.clone(), order), make(laid_out, order)):
        assert all(torch.equal(p, q) for p, q in zip(once, again, strict=True))
        assert state is None or (state_again is not None and torch.equal(state, state_again))
    alone, _ = make(x[1:], order)
    assert torch.equal(alone.order, once.order[1:])


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(2, 3, 273, 16)
    whole = [make(x, order)[0] for order in ("splits", "kmeans")]
    monkeypatch.setattr(splits, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kmeans, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kmeans_steps, "_CHUNK_BYTES", 40 * 6 * 4)
    for blocks, order in zip(whole, ("splits", "kmeans"), strict=True):
        assert torch.equal(make(x, order)[0].order, blocks.order)


def test_auto_is_cubes_where_a_grid_is_known() -> None:
    x = tokens(1, 2, 273, 16)
    assert torch.equal(make(x, "auto")[0].order, make(x, "cubes")[0].order)
    assert torch.equal(make(x, "auto", grid=None)[0].order, make(x, "splits")[0].order)
    assert torch.equal(make(x, "cubes", grid=None)[0].order, make(x, "splits")[0].order)
    with pytest.raises(ValueError, match="unknown order 'raster'"):
        make(x, "raster")


def test_empty_clusters_keep_their_centroids() -> None:
    x = tokens(1, 2, 273, 16)
    carried = x[:, :, :6].clone()
    carried[:, :, 2] = 1e4
    blocks, state = make(x, "kmeans", carried=carried)
    assert state is not None
    assert (blocks.offsets.diff()[..., 2] == 0).all()
    assert torch.equal(state[:, :, 2], carried[:, :, 2])


def test_a_carried_nan_swallows_no_tokens() -> None:
    x = tokens(1, 2, 273, 16)
    carried = x[:, :, :6].clone()
    carried[0, 0, 3] = torch.nan
    blocks, _ = make(x, "kmeans", carried=carried)
    clean, _ = make(x, "kmeans", carried=carried.nan_to_num(0))
    assert torch.equal(blocks.order, clean.order)


def test_carried_centroids_of_another_shape_are_dropped() -> None:
    x = tokens(1, 2, 273, 16)
    fresh, state = make(x, "kmeans")
    again, _ = make(x, "kmeans", carried=x[:, :, :7])
    assert torch.equal(fresh.order, again.order)
    assert state is not None
    settled, state_settled = make(x, "kmeans", carried=state)
    assert state_settled is not None
    assert torch.equal(settled.order, fresh.order), "50 iterations have converged on these tokens"
    torch.testing.assert_close(state_settled, state, rtol=0, atol=1e-5)


def test_more_clusters_than_tokens() -> None:
    x = tokens(2, 1, 9, 4)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 2:] = False
    blocks, state = make(x, "kmeans", valid=valid, clusters=20, grid=None)
    assert (blocks.offsets.diff() > 0).sum(-1).tolist() == [[9], [2]], "each token is a cluster"
    assert state is not None
    assert state.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chosen", [(True, False, False), (False, True, True), (True, True, True)])
def test_each_head_has_the_order_that_was_chosen_for_it(chosen: tuple[bool, ...], masked: bool) -> None:
    x, valid = tokens(2, 3, 273 + 9, 16), None
    if masked:
        valid = torch.ones(2, 282, dtype=torch.bool)
        valid[1, 100:120] = False
    how = {"valid": valid, "num_text": 9, "text_first": True}
    mixed, state = make(x, "auto", split_heads=chosen, **how)
    by_cubes, by_splits = make(x, "cubes", **how)[0], make(x, "splits", **how)[0]
    assert torch.equal(mixed.offsets, by_cubes.offsets)
    for head, by_split in enumerate(chosen):
        expected = by_splits if by_split else by_cubes
        assert torch.equal(mixed.order[:, head], expected.order[:, head])
    assert state is not None
    assert state.shape == (2, sum(chosen), 282)


@pytest.mark.parametrize("order", ["auto", "splits"])
def test_orders_that_were_carried_on_are_used_again(order: str) -> None:
    chosen = (False, True, True)
    first, state = make(tokens(2, 3, 273, 16), order, split_heads=chosen)
    moved = tokens(2, 3, 273, 16, seed=5)
    again, kept = make(moved, order, split_heads=chosen, carried=state)
    assert kept is state
    assert torch.equal(again.order, first.order)
    anew, _ = make(moved, order, split_heads=chosen)
    assert not torch.equal(anew.order, first.order)


def test_orders_of_other_sizes_are_made_anew() -> None:
    x = tokens(1, 3, 273, 16)
    expected, _ = make(x, "auto", split_heads=(True, False, True))
    _, two = make(tokens(2, 3, 273, 16), "auto", split_heads=(True, False, True))
    _, other = make(x, "auto", split_heads=(True, False, False))
    for carried in (two, other, torch.zeros(1, 3, 6, 16)):
        blocks, _ = make(x, "auto", split_heads=(True, False, True), carried=carried)
        assert torch.equal(blocks.order, expected.order)


def test_a_mask_that_changed_does_not_harm_an_order_that_was_carried_on() -> None:
    x, valid = tokens(1, 2, 273, 16), torch.ones(1, 273, dtype=torch.bool)
    _, state = make(x, "splits", valid=valid)
    valid[0, :50] = False
    blocks, _ = make(x, "splits", valid=valid, carried=state)
    assert is_permutation(blocks.order)
    assert (blocks.offsets[..., -1] == 223).all()
    assert (blocks.order[..., 223:] < 50).all(), "masked tokens come after the last block"
