"""The probe against fp64 loops over blocks of all shapes, and its behaviour at the edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.blocks import permute_torch as permute
from svg_ear_compile.kernels.probe import torch as probe

EPS = torch.finfo(torch.float32).eps
ROUTINGS = ("output_error", "svg_ear")
# Name: sizes of the key blocks per head, and whether the probe must take them to be of any size.
LAYOUTS: dict[str, tuple[list[list[int]], bool]] = {
    "tiles": ([[64, 64, 64], [64, 64, 64]], False),
    "ragged tail": ([[64, 64, 1], [64, 64, 1]], False),
    "text and masked keys": ([[64, 64, 17, 0, 64, 3], [64, 50, 0, 0, 30, 0]], False),
    "clusters": ([[1, 90, 0, 33, 5], [0, 0, 130, 0, 1]], True),
    "tiles, unknown": ([[64, 64, 17, 0, 64, 3], [64, 50, 0, 0, 30, 0]], True),
    "no key": ([[0, 0], [3, 0]], True),
}


class Case:
    """Queries, keys and values in block order for one layout of LAYOUTS; B = 2, the same sizes in both."""

    def __init__(self, layout: str, dim: int = 16, rows: int = 5, sharp: float = 1.0, seed: int = 0) -> None:
        sizes, self.variable = LAYOUTS[layout]
        g = torch.Generator().manual_seed(seed)
        ends = torch.tensor(sizes).cumsum(-1)
        self.offsets = torch.cat([torch.zeros(2, 1), ends], -1).int().expand(2, 2, -1).contiguous()
        length = int(ends.max()) + 2  # two slots that never hold a key
        self.queries = torch.randn(2, 2, rows, dim, generator=g) * sharp
        self.key = torch.randn(2, 2, length, dim, generator=g)
        self.value = torch.randn(2, 2, length, dim, generator=g) + 1
        gone = torch.arange(length) >= self.offsets[..., -1:]
        self.key[gone] = self.value[gone] = 0
        self.scale = dim**-0.5

    def scores(self, routing: str, **changes: Tensor) -> probe.Scores:
        c = {"queries": self.queries, "key": self.key, "value": self.value, **changes}
        kc, vc = (permute.block_means(x, self.offsets) for x in (c["key"], c["value"]))
        return probe.probe(
            c["queries"], c["key"], c["value"], self.offsets, kc, vc, self.scale, routing, self.variable
        )

    def blocks(self, b: int, h: int) -> list[tuple[int, int, int]]:
        ends = self.offsets[b, h].tolist()
        return [(j, first, end) for j, (first, end) in enumerate(itertools.pairwise(ends))]


def check_against_loops(case: Case, routing: str) -> None:
    """Every entry against float64, within what float32 logits allow: exp(s) is known to EPS (D + |s|).

    Errors are compared as e, not log e, relative to the largest that the block's terms could add up to:
    below that, cancellation in the sum, and not the method, decides.
    """
    scores = case.scores(routing)
    dim = case.key.shape[-1]
    for b in range(2):
        for h in range(2):
            q, k, v = (x[b, h].double() for x in (case.queries, case.key, case.value))
            logits = case.scale * q @ k.T
            total = logits[:, : case.offsets[b, h, -1]].logsumexp(-1)
            top = logits[:, : case.offsets[b, h, -1]].amax(-1) if case.offsets[b, h, -1] else total
            off = 4 * EPS * (dim + case.scale * (q.abs() @ k.abs().T).max().item())
            for j, first, end in case.blocks(b, h):
                found = [x[b, h, :, j] for x in scores]
                if first == end:
                    assert all((x == -math.inf).all() for x in found)
                    continue
                n, s, members = end - first, logits[:, first:end], v[first:end]
                center, mean = case.scale * q @ k[first:end].mean(0), members.mean(0)
                torch.testing.assert_close(found[1].double(), center + math.log(n), rtol=0, atol=off)
                gap = s.logsumexp(-1) - math.log(n) - center
                assert (gap > -1e-12).all(), "Jensen"
                torch.testing.assert_close(found[2].double(), gap, rtol=0, atol=2 * off)
                for i in range(len(q)):
                    # All below the block's own maximum: float64 underflows too.
                    m = s[i].amax()
                    p, c = (s[i] - m).exp(), (center[i] - m).exp()
                    if routing == "output_error":
                        base = total[i] - m
                        wanted = (p[:, None] * (members - mean)).sum(0).norm().item()
                        most = (p * (members - mean).norm(dim=-1)).sum().item()
                    else:
                        base = top[i] - m
                        wanted = (p[:, None] * members - c * mean).norm().item()
                        most = (p[:, None] * members).norm().item() + n**0.5 * (c * mean.norm()).item()
                    value = math.exp((found[0][i].double() + math.log(n)).item() / 2 + base.item())
                    assert abs(value - wanted) <= 2 * off * (most + wanted), (b, h, i, j)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_equal_loops(layout: str, routing: str) -> None:
    check_against_loops(Case(layout), routing)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["tiles", "clusters"])
def test_logits_of_500_neither_overflow_nor_vanish(layout: str, routing: str) -> None:
    case = Case(layout, dim=16, sharp=250.0)
    logits = case.scale * case.queries @ case.key.mT
    assert logits.abs().max() > 500
    scores = case.scores(routing)
    assert not any(x.isnan().any() or x.eq(math.inf).any() for x in scores)
    filled = (case.offsets.diff() > 0)[:, :, None].expand_as(scores.gap)
    assert scores.gap[filled].isfinite().all()
    check_against_loops(case, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_not_tied_by_underflow(routing: str) -> None:
    """exp(-200) is 0 in float32: blocks that far below the best of the row still have an order."""
    case = Case("tiles", sharp=250.0)
    scores = case.scores(routing)
    assert scores.error.min() < -400
    assert all(len(set(row.tolist())) == 3 for row in scores.error.flatten(0, 2))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("same", ["one token per block", "equal tokens"])
def test_a_block_of_equal_tokens_loses_nothing(routing: str, same: str) -> None:
    case = Case("clusters")
    if same == "equal tokens":
        case.key, case.value = (x[:, :, :1].expand_as(x).contiguous() for x in (case.key, case.value))
    scores, whole = case.scores(routing), Case("clusters").scores(routing)
    alone = (case.offsets.diff() == 1)[:, :, None].expand_as(scores.gap)
    if same == "equal tokens":
        alone = (case.offsets.diff() > 0)[:, :, None].expand_as(scores.gap)
    off = 4 * EPS * 2 * 16
    assert (scores.gap[alone] <= off).all()
    assert (scores.gap[alone] >= 0).all()
    assert (
        scores.error[alone].max() < 2 * math.log(off) + whole.error[whole.error.isfinite()].max().item() + 3
    )


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nan_stays_where_it_is(routing: str) -> None:
    case = Case("clusters")
    good = case.scores(routing)

    def changed(**changes: Tensor) -> Tensor:
        """Entries [B,H,Cq,Ck] of the error that a change reaches; all others have the same bits."""
        scores = case.scores(routing, **changes)
        reached = scores.error.isnan()
        assert torch.equal(scores.error[~reached], good.error[~reached])
        assert torch.equal(scores.gap[~reached], good.gap[~reached])
        return reached

    value = case.value.clone()
    value[1, 0, 50] = torch.nan  # of block 1
    reached = changed(value=value)
    assert reached[1, 0, :, 1].all()
    assert reached.sum() == 5

    queries = case.queries.clone()
    queries[0, 1, 3] = torch.nan
    reached = changed(queries=queries)
    assert reached.nonzero()[:, :3].unique(dim=0).tolist() == [[0, 1, 3]]

    key = case.key.clone()
    key[1, 1, 7, 2] = torch.nan  # reaches the normaliser of the head's rows
    assert changed(key=key).nonzero()[:, :2].unique(dim=0).tolist() == [[1, 1]]

    key[1, 1, 7, 2] = torch.inf  # logits of -inf are in order, but the centroid is not: unknown as well
    scores = case.scores(routing, key=key)
    assert scores.error[1, 1, :, 2].isnan().all()
    other = torch.tensor([[True, True], [True, False]])
    assert torch.equal(scores.error[other], good.error[other])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["tiles", "clusters"])
def test_chunks_strides_and_repeats(layout: str, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(layout, rows=7)
    once = case.scores(routing)
    assert all(torch.equal(p, q) for p, q in zip(once, case.scores(routing), strict=True)), "the same bits"
    strided = {x: getattr(case, x).transpose(1, 2).contiguous().transpose(1, 2) for x in ("key", "value")}
    assert all(torch.equal(p, q) for p, q in zip(once, case.scores(routing, **strided), strict=True))
    monkeypatch.setattr(probe, "_CHUNK_BYTES", 1)
    check_against_loops(case, routing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_narrow_inputs_are_read_as_they_are(dtype: torch.dtype, routing: str) -> None:
    case = Case("text and masked keys")
    narrow = {x: getattr(case, x).to(dtype) for x in ("key", "value")}
    wide = {x: y.float() for x, y in narrow.items()}
    pairs = zip(case.scores(routing, **narrow), case.scores(routing, **wide), strict=True)
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mass_equals_loops_and_reads_centroids_only(layout: str) -> None:
    case = Case(layout)
    kc = permute.block_means(case.key, case.offsets)
    error, mass, gap = case.scores("mass")
    for b in range(2):
        for h in range(2):
            for j, first, end in case.blocks(b, h):
                if first == end:
                    assert all((x[b, h, :, j] == -math.inf).all() for x in (error, mass, gap))
                    continue
                logits = case.scale * case.queries[b, h].double() @ kc[b, h, j].double()
                wanted = (math.log(end - first) + logits).float()
                torch.testing.assert_close(mass[b, h, :, j], wanted, rtol=1e-6, atol=1e-5)
                assert torch.equal(error[b, h, :, j], mass[b, h, :, j])
                assert not gap[b, h, :, j].any()
    key = case.key.clone()
    key[0, 0, 0] = torch.nan
    error, mass, _ = case.scores("mass", key=key)
    assert error[0, 0, :, 0].isnan().all() or case.offsets[0, 0, 1] == 0
    assert not error[0, 1].isnan().any()


def test_an_unknown_routing_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown routing 'greedy'"):
        Case("tiles").scores("greedy")
