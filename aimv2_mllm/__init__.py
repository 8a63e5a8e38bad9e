"""AIMv2 vision encoders, pre-trained by multimodal autoregression, as the eyes of multimodal LLMs.

Owns the public names. Each is imported when it is first asked for, so `import aimv2_mllm` costs
nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.chat import answer, load_model
    from .model.connectors import CONNECTORS, build_connector
    from .model.encoder import (
        AIMv2Encoder,
        aimv2_1b,
        aimv2_3b,
        aimv2_base,
        aimv2_huge,
        aimv2_large,
        aimv2_nano,
    )
    from .model.lit import AIMv2LiT
    from .model.lit_weights import load_lit
    from .model.pretrainer import AIMv2ForPreTraining
    from .model.towers import TOWERS, load_tower
    from .model.weights import load_encoder, save_encoder

    __version__: str

# public name -> the module that has it
NAMES = {
    "AIMv2Encoder": "model.encoder",
    "AIMv2ForPreTraining": "model.pretrainer",
    "AIMv2LiT": "model.lit",
    "CONNECTORS": "model.connectors",
    "TOWERS": "model.towers",
    "aimv2_1b": "model.encoder",
    "aimv2_3b": "model.encoder",
    "aimv2_base": "model.encoder",
    "aimv2_huge": "model.encoder",
    "aimv2_large": "model.encoder",
    "aimv2_nano": "model.encoder",
    "answer": "chat.chat",
    "build_connector": "model.connectors",
    "load_encoder": "model.weights",
    "load_lit": "model.lit_weights",
    "load_model": "chat.chat",
    "load_tower": "model.towers",
    "save_encoder": "model.weights",
}

__all__ = [  # noqa: RUF022 (in the order of NAMES, which a test holds)
    "AIMv2Encoder",
    "AIMv2ForPreTraining",
    "AIMv2LiT",
    "CONNECTORS",
    "TOWERS",
    "aimv2_1b",
    "aimv2_3b",
    "aimv2_base",
    "aimv2_huge",
    "aimv2_large",
    "aimv2_nano",
    "answer",
    "build_connector",
    "load_encoder",
    "load_lit",
    "load_model",
    "load_tower",
    "save_encoder",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("aimv2-mllm")
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{NAMES[name]}"), name)
    globals()[name] = value  # the next time it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
