"""Small video models with attention in all the forms that models write it in, for hypothesis to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Attend = Callable[..., Tensor]

EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 191, 193, 257]
SELF_LAYOUTS = ["transpose", "permute", "movedim", "heads first", "chunk", "unbind", "3-D", "5-D"]
KEY_MASKS = ["none", "keys", "keys of all", "prefix", "hides nothing"]
OTHER_MASKS = ["additive", "additive keys", "pairs", "pairs of all"]


@dataclass(frozen=True)
class Site:
    """One attention call, and what happens around it."""

    kind: str = "self"
    style: str = "keywords"
    layout: str = "transpose"
    is_contiguous: bool = False
    mask: str = "none"
    is_causal: bool = False
    scale: float | None = None
    before: str = "nothing"
    after: str = "nothing"
    join: str = "tokens"
    """Where joint attention lays text and video end to end: as hidden states, or as heads."""

    @property
    def can_be_rewritten(self) -> bool:
        plain = self.mask in KEY_MASKS and not self.is_causal
        return self.kind != "cross" and plain and self.layout not in ("3-D", "5-D")


@dataclass(frozen=True)
class Form:
    """A model and its input. clip: (frames, height, width) in tokens, or None where tokens come packed."""

    sites: tuple[Site, ...]
    clip: tuple[int, int, int] | None = None
    length: int = 100
    text: int = 0
    text_first: bool = False
    batch: int = 1
    heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    writes_input: bool = False
    dynamic: bool = False
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.length if self.clip is None else self.clip[0] * self.clip[1] * self.clip[2]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def expects_rewrite(self, site: Site) -> bool:
        """A clip of one frame, or of one row, looks like an image."""
        return site.can_be_rewritten and (self.clip is None or min(self.clip) > 1)


class Attention(nn.Module):
    """A site: projections, masks, scaled_dot_product_attention through `attend`."""

    def __init__(self, form: Form, site: Site, number: int) -> None:
        super().__init__()
        self.form, self.site, self.number, self.scale = form, site, number, site.scale
        self.qkv, self.out = nn.Linear(form.width, 3 * form.width), nn.Linear(form.width, form.width)
        self.attend: Attend | None = None

    def heads(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """query, key, value [B,H,L,D], as the layout says."""
        form, layout = self.form, self.site.layout
        H, D = form.heads, form.head_dim
        if x is context and layout == "unbind":
            return list(self.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))
        if x is context and layout == "chunk":
            return [y.unflatten(-1, (H, D)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)]
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        found = [
            F.linear(y, w, b).reshape(y.shape[0], y.shape[1], H, D)
            for y, w, b in zip((x, context, context), weights, biases, strict=True)
        ]
        if layout == "permute":
            return [y.permute(0, 2, 1, 3) for y in found]
        if layout == "movedim":
            return [y.movedim(2, 1) for y in found]
        if layout == "heads first":
            return [y.transpose(1, 2).contiguous() for y in found]
        return [y.transpose(1, 2) for y in found]

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        site = self.site
        if self.attend is not None:
            return self.attend(self.number, q, k, v, mask, site.is_causal, self.scale)
        if site.style == "keywords":
            return F.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, is_causal=site.is_causal,
                scale=self.scale, enable_gqa=False,
            )  # fmt: skip
        if site.style == "positional":
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, site.is_causal, scale=self.scale)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=site.is_causal, scale=self.scale
        )

    def forward(self, x: Tensor, text: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        site, form = self.site, self.form
        n, first = form.text, form.text_first

        def join(a: Tensor, b: Tensor, dim: int) -> Tensor:
            return torch.cat([b, a] if first else [a, b], dim)

        if site.kind == "cross":
            q, k, v = self.heads(x, text)
        elif site.kind == "self":
            q, k, v = self.heads(x, x)
        elif site.join == "tokens":
            both = join(x, text, 1)
            q, k, v = self.heads(both, both)
        else:
            q, k, v = (join(a, b, 2) for a, b in zip(self.heads(x, x), self.heads(text, text), strict=True))
        if site.before == "multiply":
            q.mul_(0.5)
        elif site.before == "write":
            turned = q[..., 1::2] * 0.9
            q = q.clone()
            q[..., 1::2] = turned
        elif site.before == "fill":
            made = torch.empty_like(k)
            made[..., 0::2] = k[..., 0::2] + 0.1
            made[..., 1::2] = k[..., 1::2]
            k = made.type_as(k)
        if site.is_contiguous:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        mask = self.mask(q, k, masks)
        if site.layout == "3-D":
            flat = [y.flatten(0, 1) for y in (q, k, v)]
            mask = None if mask is None else mask.expand(q.shape[0], q.shape[1], -1, -1).flatten(0, 1)
            out = self.sdpa(*flat, mask).unflatten(0, q.shape[:2])
        elif site.layout == "5-D":
            out = self.sdpa(*(y[None] for y in (q, k, v)), mask)[0]
        else:
            out = self.sdpa(q, k, v, mask)
        if site.after == "add":
            out.add_(0.1)
        elif site.after == "write":
            out[:, :, :1] = 0.0
        elif site.after == "write value":
            v.zero_()
        merged = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
        if site.after == "twice":
            merged = merged + out.permute(0, 2, 1, 3).flatten(2).sin()
        merged = self.out(merged)
        if site.kind == "joint":
            x_part, text_part = (merged[:, n:], merged[:, :n]) if first else (merged[:, :-n], merged[:, -n:])
            return x + x_part, text + text_part
        return x + merged, text

    def mask(self, q: Tensor, k: Tensor, masks: dict[str, Tensor]) -> Tensor | None:
        """One tensor for all sites with as many keys; "prefix" is made in the graph."""
        name = self.site.mask
        if name == "none":
            return None
        if name == "prefix":
            shown = torch.arange(k.shape[2], device=k.device) < k.shape[2] - k.shape[2] // 3
            return shown[None, None, None].expand(k.shape[0], 1, 1, -1)
        if name == "hides nothing":
            return torch.ones(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
        mask = masks[f"{self.site.kind} {name}"]
        return mask if mask.dtype == torch.bool else mask.to(q.dtype)


class Model(nn.Module):
    """A patch embedding or packed tokens, the sites one after another."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(form.seed)
        self.form = form
        self.patch = nn.Conv3d(3, form.width, (1, 2, 2), (1, 2, 2)) if form.clip else nn.Identity()
        self.sites = nn.ModuleList(Attention(form, site, i) for i, site in enumerate(form.sites))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.form.writes_input:
            hidden_states.mul_(1.25)
        x, text = hidden_states, encoder_hidden_states
        if self.form.clip is not None:
            x = self.patch(x).flatten(2).transpose(1, 2)
        for site in self.sites:
            x, text = site(x, text, masks)
        return x, text

    def arguments(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same ones at each call, float64; masks for each kind of site and each kind of mask."""
        form = self.form
        random = torch.Generator().manual_seed(form.seed)
        shape: tuple[int, ...] = (form.batch, form.length, form.width)
        if form.clip is not None:
            frames, height, width = form.clip
            shape = (form.batch, 3, frames, 2 * height, 2 * width)
        hidden = torch.randn(shape, generator=random, dtype=torch.float64)
        text = torch.randn(form.batch, form.text, form.width, generator=random, dtype=torch.float64)
        masks = {}
        for site in form.sites:
            queries = form.tokens + (form.text if site.kind == "joint" else 0)
            keys = form.text if site.kind == "cross" else queries
            sizes = {
                "keys": (form.batch, 1, 1, keys), "keys of all": (1, 1, 1, keys),
                "additive": (form.batch, 1, queries, keys), "additive keys": (form.batch, 1, 1, keys),
                "pairs": (form.batch, 1, queries, keys), "pairs of all": (queries, keys),
            }  # fmt: skip
            name = f"{site.kind} {site.mask}"
            if site.mask in sizes and name not in masks:
                mask = torch.rand(sizes[site.mask], generator=random, dtype=torch.float64)
                if not site.mask.startswith("additive"):
                    mask = mask < 0.7
                    mask[..., 0] = True
                masks[name] = mask
        return hidden, text, masks


def sites(text: bool) -> st.SearchStrategy[Site]:
    """A site; those that can be rewritten are more frequent."""
    masks = st.one_of(st.sampled_from(KEY_MASKS), st.sampled_from([*KEY_MASKS, *OTHER_MASKS]))
    site = st.builds(
        Site,
        kind=st.sampled_from(["self", "joint", "self", "joint", "cross"] if text else ["self"]),
        style=st.sampled_from(["keywords", "positional", "mixed"]),
        layout=st.one_of(st.sampled_from(SELF_LAYOUTS[:-2]), st.sampled_from(SELF_LAYOUTS)),
        is_contiguous=st.booleans(),
        mask=masks,
        is_causal=st.sampled_from([False, False, False, True]),
        scale=st.sampled_from([None, None, 0.05, 0.5]),
        before=st.sampled_from(["nothing", "multiply", "write", "fill"]),
        after=st.sampled_from(["nothing", "add", "write", "write value", "twice"]),
        join=st.sampled_from(["tokens", "heads"]),
    )
    return site.map(_possible)


def _possible(site: Site) -> Site:
    """Causal attention takes no mask."""
    return site if site.mask == "none" else replace(site, is_causal=False)


@st.composite
def forms(draw: st.DrawFn, clip: bool) -> Form:
    """A form over a 5-D clip, or over packed tokens."""
    text = draw(st.sampled_from([0, 0, 1, 5, 64, 77]))
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 14))) if clip else None
    return Form(
        sites=tuple(
            draw(st.lists(sites(text > 0), min_size=1, max_size=draw(st.sampled_from([1, 1, 2, 3]))))
        ),
        clip=size,
        length=draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 150), st.integers(1, 700))),
        text=text,
        text_first=draw(st.booleans()),
        batch=draw(st.sampled_from([1, 1, 2])),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(16, 40)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        writes_input=draw(st.sampled_from([False, False, True])),
        dynamic=draw(st.sampled_from([False] * 7 + [True])),
        seed=draw(st.integers(0, 2**16)),
    )
