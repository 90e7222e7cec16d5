"""What is known and decided about one attention call: values that can be printed.

A decision is never a bare False: a Verdict names its Reason, and each Reason is one sentence for people
and a hint about what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx

from .sizes import Extent, length_hint


class Reason(Enum):
    """Why a site is rewritten or stays dense: (sentence, hint)."""

    REWRITTEN = ("self attention over video tokens", "")
    CROSS = ("cross attention: queries and keys come from different tokens", "")
    TOO_FEW_TOKENS = ("too few tokens for sparsity to pay", "lower min_tokens to rewrite it anyway")
    NOT_VIDEO = (
        "its tokens are not video",
        "name the module in sites= to rewrite it anyway",
    )
    NO_SIGN_OF_VIDEO = (
        "nothing in the graph says that these tokens are video",
        "name the module in sites= if they are",
    )
    MASK = ("its attention mask is not a key-padding mask", "")
    MASK_CAUSAL = ("causal attention over blocks of frames or tokens", "")
    MASK_FLOAT = ("its attention mask is a float bias that nothing proves to be padding", "")
    DROPOUT = ("attention dropout is on", "call model.eval()")
    CAUSAL = ("causal attention", "")
    GRAD = ("gradients are required", "call the model under torch.no_grad() or torch.inference_mode()")
    HEAD_DIM = ("head_dim is not supported", "supported: 16 to 256, the same for query, key and value")
    DTYPE = ("dtype is not supported", "supported: float32, float16 and bfloat16, one for all")
    GQA = ("grouped-query attention", "")
    RANK = ("query, key and value are not [batch, heads, tokens, head_dim]", "")
    FORCED_BACKEND = (
        "the script forces an SDPA backend around it",
        "remove the torch.nn.attention.sdpa_kernel around it",
    )
    UNKNOWN_SHAPE = ("its shapes are not known at compile time", "")
    UNKNOWN_TOKENS = (
        "the graph does not show where its tokens come from",
        "name the module in sites= if it is self attention over video",
    )
    AFTER_BREAK = (
        "a graph break separates it from its projections",
        "TORCH_LOGS=graph_breaks shows it",
    )
    FACTORISED = ("attention within single frames, or along one dimension of the video", "")
    TEXT = ("its tokens are text or conditioning, not video", "")
    SPLIT_TEXT = ("text or conditioning tokens lie on both sides of the video tokens, or among them", "")
    SCALE = ("its scale is computed in the graph", "")
    SAVED = (
        "code compiled to be saved (aot_compile) loses what decides each call",
        "call what torch.compile returns; torch.compiler.save_cache_artifacts() makes a later compilation short",
    )
    REPORT_ONLY = ("SVG_EAR=report: nothing is rewritten", "set SVG_EAR=1")
    OUR_FAILURE = ("the rewrite failed; this is a bug of svg-ear-compile", "please report the warning")

    @property
    def sentence(self) -> str:
        return self.value[0]

    @property
    def hint(self) -> str:
        return self.value[1]


@dataclass(frozen=True)
class Verdict:
    """The decision about one site.

    detail: the figures of this site, e.g. '512 of at least 8192 tokens'.
    advice: what to do, if it differs between sites with this reason.
    """

    rewrite: bool
    reason: Reason
    detail: str = ""
    advice: str = ""

    @property
    def hint(self) -> str:
        """What to do."""
        return self.advice or self.reason.hint

    def __str__(self) -> str:
        return self.reason.sentence + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Layout:
    """Where text and video tokens lie, and the frame grid.

    num_text and grid hold ints, or Extents (sizes.py) when shapes are dynamic; grid is (frames, height,
    width) in tokens, or None when it is not in the graph. sources say in words where each was read.
    shards: the tokens are those of so many ranks end to end, each with its equal share of the video and of the
    text; shard: the number of this process's share.
    packed: arguments of the model that tell which rows of a packed sequence are video, and where each row lies
    (sources.py); then the call knows num_text and the grids, and the graph does not.
    """

    num_text: int | Extent = 0
    text_first: bool = False
    grid: tuple[int | Extent, int | Extent, int | Extent] | None = None
    text_source: str = "video only"
    grid_source: str = "unknown"
    shards: int = 1
    shard: int = 0
    packed: tuple[str, str] | None = None

    @property
    def text_hint(self) -> int:
        """num_text, with today's sizes under dynamic shapes."""
        return length_hint(self.num_text)

    @property
    def grid_hint(self) -> tuple[int, ...] | None:
        """The grid, with today's sizes under dynamic shapes."""
        return None if self.grid is None else tuple(map(length_hint, self.grid))


@dataclass(frozen=True)
class KeyMask:
    """Which keys are seen. node: a bool tensor of one row of keys per batch element, [B or 1, (1, (1,)) S].

    zero_rows: whether the model also hides all keys from the queries at the same places.
    """

    node: fx.Node
    zero_rows: bool = False


@dataclass(frozen=True)
class SiteFacts:
    """What a scaled_dot_product_attention call is, in plain values.

    q_len and k_len are ints, or strings of the symbolic expression under dynamic shapes (q_hint, k_hint are
    then the values seen at compile time).
    """

    module_path: str
    module_class: str
    kind: str
    """'self', 'joint', 'cross' or 'unknown'."""
    batch: int
    heads: int
    head_dim: int
    q_len: int | str
    k_len: int | str
    q_hint: int
    k_hint: int
    dtype: str
    mask: str
    """'none', 'key padding [B,1,1,S] bool', ...: the mask in words."""


@dataclass(frozen=True)
class Site(SiteFacts):
    """One such call of one graph, and what is decided about it.

    key_mask: what the ops get for the mask. min_tokens, min_frames: of the video; a call with fewer is dense. 0 where
    there is nothing to check, since all calls are of one size.
    """

    index: int
    node: fx.Node
    verdict: Verdict
    layout: Layout
    key_mask: KeyMask | None = None
    min_tokens: int = 0
    min_frames: int = 0


@dataclass(frozen=True)
class GraphInputs:
    """Which positions of the compiled callable's arguments the host looks at before a call.

    rotary: tables over token positions; of share number `shard` of `shards` ranks' tokens.
    """

    rotary: tuple[int, ...]
    shards: int = 1
    shard: int = 0
