"""Every transformer class of the installed diffusers is tested here as a video model, or said to be none.

A class that a new diffusers brings fails this test by name: give it a tiny configuration, or an entry below.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers.models.transformers
from diffusers import ModelMixin
from models.tiny import BUILDERS, build

NO_VIDEO = {
    "images": """
        AuraFlowTransformer2DModel BriaTransformer2DModel BriaFiboTransformer2DModel
        BriaFibo2Transformer2DModel ChromaTransformer2DModel CogView3PlusTransformer2DModel
        CogView4Transformer2DModel DiTTransformer2DModel DreamLiteTransformer2DModel
        ErnieImageTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel
        GlmImageTransformer2DModel HiDreamImageTransformer2DModel HunyuanDiT2DModel
        HunyuanImageTransformer2DModel Ideogram4Transformer2DModel JoyImageEditTransformer3DModel
        JoyImageEditPlusTransformer3DModel Krea2Transformer2DModel LongCatImageTransformer2DModel
        Lumina2Transformer2DModel LuminaNextDiT2DModel NucleusMoEImageTransformer2DModel
        OmniGenTransformer2DModel OvisImageTransformer2DModel PixArtTransformer2DModel PriorTransformer
        PRXTransformer2DModel QwenImageTransformer2DModel QwenImage21Transformer2DModel
        SanaTransformer2DModel SD3Transformer2DModel Transformer2DModel ZImageTransformer2DModel
    """,
    "sound": """
        AceStepTransformer1DModel LongCatAudioDiTTransformer MiniMaxMusic3RVQDepthDecoder
        MiniMaxMusic3Transformer1DModel StableAudioDiTModel StableAudio3DiTModel T5FilmDecoder
    """,
    "proteins": "RFD4ProteinaTransformer",
    "time alone, inside of U-Nets: each pixel attends to a few frames": "TransformerTemporalModel",
}


def transformer_classes() -> set[str]:
    """Names of all model classes defined in diffusers.models.transformers."""
    found = set()
    for info in pkgutil.iter_modules(diffusers.models.transformers.__path__):
        module = importlib.import_module(f"diffusers.models.transformers.{info.name}")
        found |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value)
            and issubclass(value, ModelMixin)
            and value.__module__ == module.__name__
        }
    return found


def test_every_class_has_a_place() -> None:
    tested = {type(build(builder.__name__)[0]).__name__ for builder in BUILDERS}
    others = {name for names in NO_VIDEO.values() for name in names.split()}
    installed = transformer_classes()
    assert not installed - tested - others, "neither a tiny configuration nor an entry in NO_VIDEO"
    assert not others & tested - {"FluxTransformer2DModel"}, "both"
    print("not in this diffusers:", sorted(others - installed))
