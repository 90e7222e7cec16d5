"""The tiny trained Wan model: its captions, its weights and its sampler.

The model is a `diffusers.WanTransformer3DModel` that works on pixels and draws procedural scenes: one or two
textured shapes that move over a panning photograph. A caption is `CAPTION_LENGTH` token ids, not free text:

    [background, pan, then for each object (nearest first): shape, colour, texture, direction]

`sentence` and `parse` go between ids and English; `embed` turns ids into the vectors that the model reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

BACKGROUNDS = ("coffee", "cat", "rocket", "astronaut", "temple", "flower")
PANS = ("left", "right", "up", "down")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
TEXTURES = ("plain", "striped", "dotted")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

NULL = 0  # every token of the empty caption of classifier-free guidance
NONE = 1  # every token of an object that is not there
MAX_OBJECTS = 2
OBJECT_WORDS = (SHAPES, COLOURS, TEXTURES, DIRECTIONS)
CAPTION_LENGTH = 2 + MAX_OBJECTS * len(OBJECT_WORDS)
SLOT_WORDS = (BACKGROUNDS, PANS) + OBJECT_WORDS * MAX_OBJECTS
TEXT_DIM = 64
GUIDANCE = 2.0  # how far samples lean on their caption
NULL_CAPTION = (NULL,) * CAPTION_LENGTH

_FIRST_ID: dict[int, int] = {}
_next_id = 2
for _words in (BACKGROUNDS, PANS, *OBJECT_WORDS):
    _FIRST_ID[id(_words)] = _next_id
    _next_id += len(_words)
VOCABULARY_SIZE = _next_id


def slot_offset(slot: int) -> int:
    """The id of the first word that caption position `slot` can hold; word `i` there has id offset + i."""
    return _FIRST_ID[id(SLOT_WORDS[slot])]


def _word(ids: Sequence[int], slot: int) -> str:
    words, index = SLOT_WORDS[slot], int(ids[slot]) - slot_offset(slot)
    if not 0 <= index < len(words):
        raise ValueError(f"caption position {slot} holds id {int(ids[slot])}, not one of {words}")
    return words[index]


def sentence(ids: Sequence[int] | Tensor) -> str:
    """Caption ids [CAPTION_LENGTH] as an English sentence that `parse` reads; "" for the empty caption."""
    ids = [int(i) for i in ids]
    if tuple(ids) == NULL_CAPTION:
        return ""
    objects = []
    for slot in range(2, CAPTION_LENGTH, len(OBJECT_WORDS)):
        if ids[slot] != NONE:
            shape, colour, texture, direction = (_word(ids, slot + i) for i in range(4))
            objects.append(f"a {texture} {colour} {shape} moving {direction}")
    return f"{' in front of '.join(objects)}, over the {_word(ids, 0)} photo panning {_word(ids, 1)}"


def parse(text: str) -> tuple[int, ...]:
    """Caption ids of a sentence such as "a striped red star moving left in front of a blue ring moving up,
    over the cat photo panning right".

    Words left out get a default (red, plain, moving right, over the coffee photo panning left); an object
    without a shape and more than MAX_OBJECTS objects raise.
    """
    if not text.strip():
        return NULL_CAPTION
    front, _, back = text.lower().partition(" over ")
    objects = front.split(" in front of ")
    if len(objects) > MAX_OBJECTS:
        raise ValueError(f"at most {MAX_OBJECTS} objects, got {len(objects)} in {text!r}")

    def ids_of(clause: str, slots: range) -> list[int]:
        said = re.findall(r"[a-z-]+", clause)
        ids = []
        for slot in slots:
            words = SLOT_WORDS[slot]
            found = [word for word in said if word in words]
            if not found and words is SHAPES:
                raise ValueError(f"no shape in {clause!r}: say one of {', '.join(SHAPES)}")
            ids.append(slot_offset(slot) + (words.index(found[-1]) if found else 0))
        return ids

    caption = ids_of(back, range(2))
    for k in range(MAX_OBJECTS):
        slots = range(2 + 4 * k, 6 + 4 * k)
        caption += ids_of(objects[k], slots) if k < len(objects) else [NONE] * 4
    return tuple(caption)


def embed(ids: Tensor | Sequence[int]) -> Tensor:
    """Text vectors of caption ids: [..., CAPTION_LENGTH] int -> [..., CAPTION_LENGTH, TEXT_DIM] fp32.

    Row `id` of a 64 x 64 Hadamard matrix plus the row of the position (counted from the end): orthogonal
    vectors of entries +-1 that need no random numbers and are therefore the same everywhere.
    """
    ids = torch.as_tensor(ids)
    rows = torch.ones(1, 1)
    while len(rows) < TEXT_DIM:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    rows = rows.to(ids.device)
    return rows[ids] + rows[TEXT_DIM - CAPTION_LENGTH :]


def load_model(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, folder: Path | None = None
) -> WanTransformer3DModel:
    """The trained transformer in eval mode, from `folder` (default: the weights in this package)."""
    from diffusers import WanTransformer3DModel

    folder = folder or Path(__file__).parent
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"no weights (*.safetensors) in {folder}: train them with examples/tiny_wan/train.py and copy "
            "the files of its export folder there"
        )
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def velocity(model: nn.Module, clip: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
    """What the model predicts, noise - clip: [B, 3, F, H, W] fp32.

    clip: [B, 3, F, H, W] in [-1, 1], with noise; timestep: [B] in [0, 1000]; ids: [B, CAPTION_LENGTH].
    """
    # diffusers keeps some other parameters in fp32.
    dtype = model.get_parameter("patch_embedding.weight").dtype
    prediction: Tensor = model(clip.to(dtype), timestep, embed(ids).to(dtype), return_dict=False)[0]
    return prediction.float()


def noise_shift(frames: int, height: int, width: int) -> float:
    """How far the noise levels of a clip of so many pixels are moved up: sqrt(F H W / 1024).

    With more pixels a scene shows through more noise, so its layout is decided at higher noise levels.
    s -> shift s / (1 + (shift - 1) s) as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2);
    here also over frames.
    """
    return math.sqrt(frames * height * width / 1024)


@torch.no_grad()
def sample(
    model: nn.Module,
    noise: Tensor,
    ids: Tensor,
    *,
    steps: int = 30,
    guidance: float = GUIDANCE,
    shift: float | None = None,
    on_step: Callable[[int], None] | None = None,
    velocity: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = velocity,
) -> Tensor:
    """Integrates the flow from noise to clips by Euler steps with classifier-free guidance.

    noise: [B, 3, F, H, W] standard normal, any float dtype; ids: [B, CAPTION_LENGTH]. Each step calls the
    model twice (with the caption, then with the empty one; once if guidance is 1), in the model's dtype; the
    clip itself stays fp32. shift: default `noise_shift`. `on_step(i)` is called after step i. `velocity`
    calls a model of another class. Returns [B, 3, F, H, W] fp32 in [0, 1].
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    frames, height, width = noise.shape[2:]
    shift = noise_shift(frames, height, width) if shift is None else shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps, device=noise.device)
    ids = ids.to(noise.device)
    empty = torch.full_like(ids, NULL)
    clip = noise.float()
    for i, time in enumerate(scheduler.timesteps):
        times = time.expand(len(clip))
        direction = velocity(model, clip, times, ids)
        if guidance != 1:
            without = velocity(model, clip, times, empty)
            direction = without + guidance * (direction - without)
        clip = scheduler.step(direction, time, clip, return_dict=False)[0]
        if on_step is not None:
            on_step(i)
    return (clip / 2 + 0.5).clamp(0, 1)
