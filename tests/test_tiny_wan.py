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


def test_longer_clip_moves_at_the_same_speed(scenes) -> None:
    """A clip of 8 frames is the middle of the 16-frame clip of the same seed."""
    short, _ = batch(scenes, 5, (8, 32, 32))
    long, _ = batch(scenes, 5, (16, 32, 32))
    torch.testing.assert_close(short, long[:, :, 4:12])


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


def test_training_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two legs, then a third from the exported weights alone: steps add up and losses are finite."""
    arguments = ["--toy", "--no-compile", "--device", "cpu", "--max-steps", "3", "--log-every", "1"]
    arguments += ["--minutes", "1", "--out", str(tmp_path)]
    for leg in range(3):
        import_example("train").main(arguments)
        assert f"from step {3 * leg}" in capsys.readouterr().out
        told = json.loads((tmp_path / "log.json").read_text())
        assert [entry["step"] for entry in told["log"]] == list(range(1, 3 * leg + 4))
        assert all(math.isfinite(entry["loss"]) for entry in told["log"])
        assert told["validation"]["4x16x16"] < 2
        assert (tmp_path / "samples_4x16x16.png").exists()
        if leg == 0:
            before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        elif leg == 1:
            after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            moved = after["model"]["proj_out.weight"] - before["model"]["proj_out.weight"]
            assert 0 < moved.abs().max() < 0.01, "a few warm-up steps on from where the first leg ended"
            assert {int(s["step"]) for s in after["optimizer"]["state"].values()} == {6}
            (tmp_path / "checkpoint.pt").unlink()
    weights = tiny_wan.load_model(dtype=torch.bfloat16, folder=tmp_path / "export")
    assert weights.config.attention_head_dim == 128


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=1, attention_head_dim=16, in_channels=3, out_channels=3,
        text_dim=tiny_wan.TEXT_DIM, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


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
