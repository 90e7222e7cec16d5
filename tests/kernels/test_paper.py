"""The presets "svg_ear" and "svg2" against their papers, written down once more in plain float64 loops.

arXiv 2603.08982 (SVG-EAR) with the clusters of arXiv 2505.18875 (SVG2), and SVG2 itself. Nothing here is
shared with the kernels but the tokens that k-means starts from.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.blocks import cluster
from svg_ear_compile.kernels.blocks import permute_torch as permute
from svg_ear_compile.kernels.papers import kmeans
from svg_ear_compile.kernels.probe import torch as probe
from svg_ear_compile.kernels.routing import torch as route

QUERY_CLUSTERS, KEY_CLUSTERS = 9, 21
DIM = 12
SCALE = DIM**-0.5


# --- the paper --------------------------------------------------------------------------------------------


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[list[int], Tensor]:
    """1. Euclidean k-means of x [N,D] from given centroids; an empty cluster keeps its centroid."""
    centroids = centroids.clone()
    for _ in range(iterations):
        labels = [int((t - centroids).norm(dim=-1).argmin()) for t in x]
        for c in range(len(centroids)):
            members = [t for t, label in enumerate(labels) if label == c]
            if members:
                centroids[c] = x[members].mean(0)
    return labels, centroids


def means(x: Tensor, labels: list[int], clusters: int) -> Tensor:
    """Means of clusters; 0 for an empty one, which nothing may depend on."""
    found = [x[[t for t, label in enumerate(labels) if label == c]] for c in range(clusters)]
    return torch.stack([m.mean(0) if len(m) else torch.zeros_like(x[0]) for m in found])


def token_error(q: Tensor, k: Tensor, v: Tensor, labels: list[int], kc: Tensor, vc: Tensor) -> Tensor:
    """3. E_ij = sum_{t in j} ||exp(s_t) v_t - exp(sbar) vc_j||^2 for the query centroids q [Cq,D]."""
    error = torch.zeros(len(q), len(kc), dtype=torch.float64)
    for i in range(len(q)):
        for t, j in enumerate(labels):
            s, center = SCALE * q[i] @ k[t], SCALE * q[i] @ kc[j]
            error[i, j] += (s.exp() * v[t] - center.exp() * vc[j]).square().sum()
    return error


def top_p(mass: list[float], p: float) -> list[int]:
    """The smallest set of clusters that holds the share p of the mass."""
    chosen: list[int] = []
    for j in sorted(range(len(mass)), key=lambda j: -mass[j]):
        if sum(mass[c] for c in chosen) >= p * sum(mass):
            break
        chosen.append(j)
    return chosen


def greedy(
    error: Tensor,
    q: Tensor,
    kc: Tensor,
    q_sizes: list[int],
    k_sizes: list[int],
    density: float | None = None,
    gamma: float = 1.0,
) -> list[list[int]]:
    """4. Per query cluster: its budget is spent on the top 5% by mass, then by score.

    The budget is the density's share of all pairs of the row, or what top-p 0.9 costs (the released code).
    Returns each row's key clusters in the order of their choice.
    """
    filled = [j for j in range(len(kc)) if k_sizes[j]]
    rows = []
    for i in range(len(q)):
        mass = [k_sizes[j] * (SCALE * q[i] @ kc[j]).exp().item() for j in filled]
        if density is None:
            budget: float = sum(q_sizes[i] * k_sizes[filled[j]] for j in top_p(mass, 0.9))
        else:
            budget = q_sizes[i] * (density * sum(k_sizes))
        by_mass = sorted(range(len(filled)), key=lambda j: -mass[j])
        chosen = [filled[j] for j in by_mass[: math.ceil(0.05 * len(filled))]]
        scores = {
            j: error[i, j].log().item() - gamma * math.log(q_sizes[i] * k_sizes[j])
            for j in filled
            if j not in chosen and q_sizes[i]
        }
        for j in sorted(scores, key=lambda j: -scores[j]):
            if sum(q_sizes[i] * k_sizes[c] for c in chosen) >= budget:
                break
            chosen.append(j)
        rows.append(chosen if q_sizes[i] else [])
    return rows


def by_mass(q: Tensor, kc: Tensor, k_sizes: list[int]) -> list[list[int]]:
    """SVG2: each row's key clusters, the largest share of the mass n_j exp(s(qc_i, kc_j)) first."""
    filled = [j for j in range(len(kc)) if k_sizes[j]]
    return [sorted(filled, key=lambda j, q=row: -k_sizes[j] * (SCALE * q @ kc[j]).exp().item()) for row in q]


def compensated(
    q: Tensor, k: Tensor, v: Tensor, labels: list[int], kc: Tensor, vc: Tensor, exact: list[int]
) -> Tensor:
    """2. For one query q [D], one softmax over the true tokens of exact clusters and all other centroids."""
    num, den = torch.zeros_like(v[0]), 0.0
    for j in range(len(kc)):
        members = [t for t, label in enumerate(labels) if label == j]
        if j in exact:
            for t in members:
                w = (SCALE * q @ k[t]).exp()
                num, den = num + w * v[t], den + w
        elif members:
            w = len(members) * (SCALE * q @ kc[j]).exp()
            num, den = num + w * vc[j], den + w
    return num / den


# --- ours -------------------------------------------------------------------------------------------------


def tokens(L: int, clusters: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = 1.5 * torch.randn(clusters, DIM, generator=g)
    label = torch.randint(0, clusters, (1, 2, L), generator=g)
    return centers[label] + 0.4 * torch.randn(1, 2, L, DIM, generator=g)


class Ours:
    """One call of the preset on 150 tokens, [1,2,150,12], and on the next step's, which moved a little."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed + 100)
        self.L = 150
        self.q, self.k = tokens(self.L, 7, seed), tokens(self.L, 15, seed + 50)
        self.v = 0.5 * self.k.roll(1, -1) + 0.3 * torch.randn(self.k.shape, generator=g)
        self.states: list[Tensor | None] = [None, None]
        self.blocks: list[cluster.Blocks] = []
        self.step()

    def step(self) -> None:
        counts = ((QUERY_CLUSTERS, 0), (KEY_CLUSTERS, 0))
        self.blocks = []
        for n, x in enumerate((self.q, self.k)):
            blocks, self.states[n] = cluster.make_blocks(
                x, None, counts[n], (128, 64)[n], self.states[n], 0, False, "kmeans", (), 0
            )
            self.blocks.append(blocks)

    def labels(self, n: int, h: int) -> list[int]:
        """Cluster of each token: 0 for queries, 1 for keys."""
        found = torch.empty(self.L, dtype=torch.int64)
        ends = self.blocks[n].offsets[0, h]
        found[self.blocks[n].order[0, h].long()] = torch.repeat_interleave(ends.diff().long())
        return found.tolist()

    def scores_and_kept(
        self, density: float | None, routing: str = "svg_ear", compensate: bool = True
    ) -> tuple[probe.Scores, Tensor, Tensor]:
        queries, keys = self.blocks
        k, v = (permute.gather(x, keys.order, keys.offsets) for x in (self.k, self.v))
        qc = permute.block_means(permute.gather(self.q, queries.order, queries.offsets), queries.offsets)
        kc, vc = (permute.block_means(x, keys.offsets) for x in (k, v))
        scores = probe.probe(qc, k, v, keys.offsets, kc, vc, SCALE, routing)
        sizes = queries.offsets.diff(dim=-1), keys.offsets.diff(dim=-1)
        kept = route.route(scores, *sizes, QUERY_CLUSTERS, KEY_CLUSTERS, routing, density)
        return scores, kept, route.centroid_bias(scores, kept, sizes[1], routing, compensate)


SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_clusters_of_the_first_and_the_next_step(seed: int) -> None:
    """50 iterations from the start tokens, then 2 from the carried centroids of tokens that moved."""
    ours = Ours(seed)
    assert (kmeans.FIRST_ITERATIONS, kmeans.NEXT_ITERATIONS) == (50, 2)
    start = [
        kmeans._first_tokens(None, ours.L, c, 0, ours.q.device)[0] for c in (QUERY_CLUSTERS, KEY_CLUSTERS)
    ]
    assert all(len(set(s.tolist())) == len(s) for s in start)
    paper: dict[tuple[int, int], Tensor] = {}
    for n, x in enumerate((ours.q, ours.k)):
        for h in range(2):
            labels, paper[n, h] = lloyd(x[0, h].double(), x[0, h, start[n]].double(), 50)
            assert ours.labels(n, h) == labels
    g = torch.Generator().manual_seed(seed)
    ours.q, ours.k = (x + 0.5 * torch.randn(x.shape, generator=g) for x in (ours.q, ours.k))
    ours.step()
    for n, x in enumerate((ours.q, ours.k)):
        state = ours.states[n]
        assert state is not None
        for h in range(2):
            labels, centroids = lloyd(x[0, h].double(), paper[n, h], 2)
            assert ours.labels(n, h) == labels
            torch.testing.assert_close(state[0, h].double(), centroids, rtol=0, atol=1e-5)


@SEEDS
@pytest.mark.parametrize("density", [None, 0.2, 0.6])
def test_scores_budgets_and_choices(seed: int, density: float | None) -> None:
    ours = Ours(seed)
    scores, kept, bias = ours.scores_and_kept(density)
    for h in range(2):
        q, k, v = (x[0, h].double() for x in (ours.q, ours.k, ours.v))
        q_labels, k_labels = ours.labels(0, h), ours.labels(1, h)
        q_sizes = [q_labels.count(c) for c in range(QUERY_CLUSTERS)]
        k_sizes = [k_labels.count(c) for c in range(KEY_CLUSTERS)]
        qc, kc, vc = (
            means(q, q_labels, len(q_sizes)),
            means(k, k_labels, len(k_sizes)),
            means(v, k_labels, len(k_sizes)),
        )
        error = token_error(qc, k, v, k_labels, kc, vc)
        several = [
            j for j in range(KEY_CLUSTERS) if k_sizes[j] > 1
        ]  # one token alone: error 0, log of rounding
        wanted = error[:, several].log() - torch.tensor(k_sizes, dtype=torch.float64)[several].log()
        difference = scores.error[0, h][:, several].double() - wanted
        # The same up to a constant of the row, which the greedy choice does not see.
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-4)

        rows = greedy(error, qc, kc, q_sizes, k_sizes, density)
        for i, row in enumerate(rows):
            assert kept[0, h, i].nonzero()[:, 0].tolist() == sorted(row)
        assert 0 < sum(map(len, rows)) < QUERY_CLUSTERS * KEY_CLUSTERS, "neither nothing nor everything"

        # Section 2: the joint softmax of our plan is the paper's compensation.
        for t in range(0, ours.L, 10):
            i = q_labels[t]
            logits = torch.tensor(
                [SCALE * q[t] @ k[u] if kept[0, h, i, k_labels[u]] else -math.inf for u in range(ours.L)]
            )
            logits = torch.cat([logits.double(), SCALE * kc @ q[t] + bias[0, h, i].double()])
            ours_out = logits.softmax(-1) @ torch.cat([v, vc])
            paper_out = compensated(q[t], k, v, k_labels, kc, vc, rows[i])
            torch.testing.assert_close(ours_out, paper_out, rtol=0, atol=1e-5)


@SEEDS
def test_svg2_keeps_top_p_and_drops_the_rest(seed: int) -> None:
    """The clusters of top-p 0.9, and a softmax over their tokens alone."""
    ours = Ours(seed)
    _, kept, bias = ours.scores_and_kept(None, "mass", compensate=False)
    assert (bias == -math.inf).all()
    for h in range(2):
        q, k, v = (x[0, h].double() for x in (ours.q, ours.k, ours.v))
        q_labels, k_labels = ours.labels(0, h), ours.labels(1, h)
        k_sizes = [k_labels.count(c) for c in range(KEY_CLUSTERS)]
        qc, kc = means(q, q_labels, QUERY_CLUSTERS), means(k, k_labels, KEY_CLUSTERS)
        rows = []
        for i in range(QUERY_CLUSTERS):
            mass = [n * (SCALE * qc[i] @ kc[j]).exp().item() for j, n in enumerate(k_sizes)]
            rows.append(top_p(mass, 0.9) if i in q_labels else [])
            assert kept[0, h, i].nonzero()[:, 0].tolist() == sorted(rows[i])
        assert 0 < sum(map(len, rows)) < QUERY_CLUSTERS * KEY_CLUSTERS, "neither nothing nor everything"
        for t in range(0, ours.L, 10):
            row = rows[q_labels[t]]
            exact = torch.tensor([u for u in range(ours.L) if k_labels[u] in row])
            wanted = (SCALE * k[exact] @ q[t]).softmax(-1) @ v[exact]
            seen = kept[0, h, q_labels[t]][torch.tensor(k_labels)]
            logits = (SCALE * k @ q[t]).masked_fill(~seen, -math.inf)
            logits = torch.cat([logits, SCALE * kc @ q[t] + bias[0, h, q_labels[t]].double()])
            ours_out = logits.softmax(-1) @ torch.cat([v, means(v, k_labels, KEY_CLUSTERS)])
            torch.testing.assert_close(ours_out, wanted, rtol=0, atol=1e-12)


@SEEDS
@pytest.mark.parametrize("density", [0.15, 0.5])
def test_svg2_with_a_density(seed: int, density: float) -> None:
    """Every row keeps its clusters of the largest mass until they are its share of the keys."""
    ours = Ours(seed)
    _, kept, _ = ours.scores_and_kept(density, "mass", compensate=False)
    for h in range(2):
        q_labels, k_labels = ours.labels(0, h), ours.labels(1, h)
        k_sizes = [k_labels.count(c) for c in range(KEY_CLUSTERS)]
        qc = means(ours.q[0, h].double(), q_labels, QUERY_CLUSTERS)
        kc = means(ours.k[0, h].double(), k_labels, KEY_CLUSTERS)
        for i, order in enumerate(by_mass(qc, kc, k_sizes)):
            row: list[int] = []
            while i in q_labels and sum(k_sizes[j] for j in row) < density * ours.L:
                row = order[: len(row) + 1]
            assert kept[0, h, i].nonzero()[:, 0].tolist() == sorted(row)
