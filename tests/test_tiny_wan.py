"""The tiny Wan model's captions, scenes, training script and demo, at toy size on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from svg_ear_compile import cli, tiny_wan
from svg_ear_compile.demo import Demo, run

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

FOLDER = Path(__file__).parent.parent / "examples" / "tiny_wan"


def import_example(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def scenes():
    return import_example("scenes").Scenes()


def batch(scenes, seed: int, size: tuple[int, int, int] = (4, 32, 48)):
    return scenes.batch(6, *size, torch.Generator().manual_seed(seed))


def test_same_seed_same_scenes(scenes) -> None:
    (clip, ids), (again, ids_again), (other, _) = batch(scenes, 1), batch(scenes, 1), batch(scenes, 2)
    assert clip.shape == (6, 3, 4, 32, 48)
    assert ids.shape == (6, tiny_wan.CAPTION_LENGTH)
    assert torch.equal(clip, again)
    assert torch.equal(ids, ids_again)
    assert not torch.equal(clip, other)


def test_values_and_motion(scenes) -> None:
    clip, _ = batch(scenes, 3)
    assert clip.min() >= -1
    assert clip.max() <= 1
    assert clip.std() > 0.3
    assert ((clip[:, :, 1:] - clip[:, :, :-1]).abs().amax((1, 2, 3, 4)) > 0.2).all(), "every clip moves"


def test_first_object_hides_the_second(scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects overlap, and where the first one covers a pixel, nothing of the second or the photo is seen."""
    layers = []
    original = scenes._object
    monkeypatch.setattr(scenes, "_object", lambda *a: layers.append(original(*a)) or layers[-1])
    clip, ids = scenes.batch(16, 8, 32, 32, torch.Generator().manual_seed(4))
    (paint, first), (_, second) = layers
    overlap = (first == 1) & (second == 1)
    both = ids[:, 6] != tiny_wan.NONE
    assert (overlap.sum((1, 2, 3, 4))[both] > 0).float().mean() > 0.5
    assert (overlap.sum((1, 2, 3, 4))[~both] == 0).all()
    where = overlap.expand_as(clip)
    assert torch.equal(clip[where], paint.clamp(-1, 1)[where])


def test_calm_clips_only_move(scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upright, at one size, mostly one plain shape; the share of them is as told, and seeds keep their clips."""
    objects = []
    original = scenes._object
    monkeypatch.setattr(scenes, "_object", lambda *a: objects.append(a) or original(*a))
    ids = scenes.batch(200, 2, 8, 8, torch.Generator().manual_seed(9), calm=0.6)[1]
    (_, _, texture, _, _, size, angle, *_), _ = objects
    calm = (angle == 0).all(1)
    assert calm.float().mean() == pytest.approx(0.6, abs=0.12)
    assert (size[calm, 0] == size[calm, 1]).all()
    assert (size[~calm, 0] != size[~calm, 1]).all()
    assert (texture[calm] == 0).float().mean() > 0.7
    assert (ids[calm, 6] == tiny_wan.NONE).float().mean() > 0.65
    assert (ids[~calm, 6] == tiny_wan.NONE).float().mean() < 0.4


def test_longer_clip_moves_at_the_same_speed(scenes) -> None:
    """A clip of 8 frames is the middle of the 16-frame clip of the same seed."""
    short, _ = batch(scenes, 5, (8, 32, 32))
    long, _ = batch(scenes, 5, (16, 32, 32))
    torch.testing.assert_close(short, long[:, :, 4:12])


def test_a_short_clip_may_lie_anywhere_in_a_long_one(scenes) -> None:
    """Single frames at times of their own: not all from the middle, and within the 16 frames."""
    times = []
    original = scenes._panorama
    scenes._panorama = lambda *a: times.append(next(x for x in a if x.shape == (64, 1))) or original(*a)
    try:
        scenes.batch(64, 1, 8, 8, torch.Generator().manual_seed(8), anywhere=True)
        scenes.batch(64, 1, 8, 8, torch.Generator().manual_seed(8))
    finally:
        del scenes._panorama
    anywhere, middle = times
    assert anywhere.abs().max() <= 0.5
    assert anywhere.std() > 0.2
    assert (middle == 0).all()


def test_captions_round_trip(scenes) -> None:
    for ids in batch(scenes, 6)[1].tolist() + batch(scenes, 7)[1].tolist():
        assert list(tiny_wan.parse(tiny_wan.sentence(ids))) == ids
        assert min(ids) >= 1
        assert max(ids) < tiny_wan.VOCABULARY_SIZE
    assert tiny_wan.sentence(tiny_wan.NULL_CAPTION) == ""
    assert tiny_wan.parse("") == tiny_wan.NULL_CAPTION
    short = tiny_wan.sentence(tiny_wan.parse("a star over the cat photo"))
    assert short == "a plain red star moving right, over the cat photo panning left"
    with pytest.raises(ValueError, match="no shape"):
        tiny_wan.parse("a red elephant")


def test_embedding_tells_ids_and_positions_apart() -> None:
    ids = torch.arange(tiny_wan.VOCABULARY_SIZE)[:, None].expand(-1, tiny_wan.CAPTION_LENGTH)
    vectors = tiny_wan.embed(ids)
    assert vectors.shape == (*ids.shape, tiny_wan.TEXT_DIM)
    assert len(vectors.flatten(0, 1).unique(dim=0)) == ids.numel()


@pytest.mark.slow
def test_training_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two legs, then a third from the exported weights alone: steps add up and losses are finite."""
    arguments = ["--plan", "toy", "--no-compile", "--device", "cpu", "--max-steps", "3", "--log-every", "1"]
    arguments += ["--minutes", "1", "--total-minutes", "16", "--out", str(tmp_path)]
    for leg in range(3):
        import_example("train").main(arguments)
        assert f"from step {3 * leg}" in capsys.readouterr().out
        told = json.loads((tmp_path / "log.json").read_text())
        assert [entry["step"] for entry in told["log"]] == list(range(1, 3 * leg + 4))
        assert all(math.isfinite(loss) for entry in told["log"] for loss in entry["loss"].values())
        assert told["validation"]["after"]["4x16x16, calm"]["mean"] < 2
        assert (tmp_path / "samples_4x16x16.png").exists()
        if leg == 0:
            before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        elif leg == 1:
            after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            moved = after["model"]["proj_out.weight"] - before["model"]["proj_out.weight"]
            assert 0 < moved.abs().max() < 0.01, "a few warm-up steps on from where the first leg ended"
            assert {int(s["step"]) for s in after["optimizers"][0]["state"].values()} == {6}
            (tmp_path / "checkpoint.pt").unlink()
    weights = tiny_wan.load_model(dtype=torch.bfloat16, folder=tmp_path / "export")
    assert weights.config.attention_head_dim == 128


@pytest.mark.parametrize("model", ["hunyuan", "cogvideox"])
def test_other_models_train(model: str, scenes) -> None:
    """The loss of one batch falls, and the caption matters."""
    kind = import_example("kinds").KINDS[model]
    flow_matching_loss = import_example("losses").flow_matching_loss
    torch.manual_seed(0)
    network = kind.build(toy=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        generator = torch.Generator().manual_seed(0)
        loss = flow_matching_loss(kind, network, scenes, (2, 16, 16), 2, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    clip, ids = scenes.batch(2, 2, 16, 16, torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (kind.velocity(network, clip, torch.full((2,), 900.0), x) for x in (ids, ids.flip(0)))
    assert first.shape == clip.shape
    assert not torch.equal(first, second)


def test_validation_sees_the_same_clips_and_the_noise_level(scenes) -> None:
    """Every level gets the same batches; a model that answers 0 has the same loss at all of them."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def answer(_, noisy: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append((timestep, ids))
        return torch.zeros_like(noisy)

    kind = import_example("kinds").Kind("", {}, {}, answer)
    losses = import_example("losses").validation_losses(
        kind, torch.nn.Identity(), scenes, (2, 16, 16), 4, batches=2
    )
    assert [float(t[0]) for t, _ in seen] == pytest.approx(
        [1000 * s for s in import_example("losses").VALIDATED_AT for _ in "ab"]
    )
    assert all(torch.equal(seen[i][1], seen[i % 2][1]) for i in range(len(seen)))
    assert not torch.equal(seen[0][1], seen[1][1])
    by_level = {level: loss for level, loss in losses.items() if level != "mean"}
    assert len(set(by_level.values())) == 1, "the target noise - clip does not depend on s"
    assert losses["mean"] == next(iter(by_level.values())) > 1


def test_larger_clips_are_trained_and_sampled_at_more_noise() -> None:
    assert tiny_wan.noise_shift(16, 64, 64) == 8
    assert tiny_wan.noise_shift(16, 128, 128) == 16
    plans, noise_levels = import_example("plans"), import_example("losses").noise_levels
    generator = torch.Generator().manual_seed(0)
    small, large = (noise_levels(4000, size, generator) for size in (plans.SMALL, plans.LARGE))
    for levels in (small, large):
        assert levels.min() > 0
        assert levels.max() < 1
    # one in four is uniform, the median of the others is shift / (shift + 1)
    assert (small > 8 / 9).float().mean() == pytest.approx(0.75 / 2 + 0.25 / 9, abs=0.03)
    assert (large > 16 / 17).float().mean() == pytest.approx(0.75 / 2 + 0.25 / 17, abs=0.03)

    times = []
    sampled = tiny_wan.sample(
        torch.nn.Identity(), torch.zeros(1, 3, 16, 64, 64), torch.zeros(1, 10, dtype=torch.long), steps=3,
        velocity=lambda _, clip, timestep, ids: times.append(timestep.item()) or clip,
    )  # fmt: skip
    assert len(times) == 2 * 3, "guidance takes two calls a step"

    def shifted(s: float) -> float:
        return 8 * s / (1 + 7 * s)

    last = shifted(0.001)  # diffusers counts its steps from noise to there, and then shifts
    expected = [1000 * shifted(s) for s in (1, (1 + last) / 2, last)]
    assert times[::2] == pytest.approx(expected, rel=1e-3)
    assert (sampled == 0.5).all()


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=1, attention_head_dim=16, in_channels=3, out_channels=3,
        text_dim=tiny_wan.TEXT_DIM, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_training_starts_from_weights(toy_weights: Path, tmp_path: Path) -> None:
    """Without one of their blocks; the schedule is this leg's, and nothing but what can be sent around is written."""
    main = import_example("train").main
    main(
        [
            "--plan", "toy", "--no-compile", "--device", "cpu", "--max-steps", "4", "--minutes", "5",
            "--start", str(toy_weights), "--drop-block", "0", "--no-checkpoint", "--out", str(tmp_path),
        ]
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"export", "log.json", "samples_4x16x16.png"}
    told = json.loads((tmp_path / "log.json").read_text())
    weights = tiny_wan.load_model(folder=tmp_path / "export")
    assert weights.config.num_layers == len(weights.blocks) == 1
    moved = (
        weights.blocks[0].ffn.net[2].weight
        - tiny_wan.load_model(folder=toy_weights).blocks[1].ffn.net[2].weight
    )
    assert 0 < moved.abs().max() < 0.01
    assert told["step"] == 4
    assert set(told["validation"]) == {"before", "after"}


def test_demo_with_a_backend_that_changes_nothing(
    toy_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("svg_ear_compile.demo.can_compile", lambda device: False)
    demo = Demo(steps=5, size=(4, 16, 16), weights=toy_weights, out=tmp_path, device="cpu", backend="eager")
    result = run(demo)
    assert result.psnr == math.inf
    assert result.ssim == pytest.approx(1)
    assert len(result.dense_seconds) == len(result.sparse_seconds) == 5
    assert result.sparse_from == 1
    assert {path.name for path in tmp_path.iterdir()} == {"side_by_side.gif", "difference.png", "demo.json"}
    assert json.loads((tmp_path / "demo.json").read_text())["settings"]["density"] == 0.25
    said = capsys.readouterr().out
    assert re.search(r"A sparse step takes \d+\.\d\dx of a dense one", said)
    assert "a plain red square moving right" in said


def test_demo_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--weights", str(tmp_path), "--device", "cpu"]) == 1
    assert "examples/tiny_wan/train.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--size", "64"])
    assert "16x64x64" in capsys.readouterr().err
