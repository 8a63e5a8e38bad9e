"""What lmms-eval finds by the entry point `lmms_eval.models`: the name of our models there.

Imports lmms-eval, and nothing of ours: it is read whenever that starts, whatever model it asks.
"""

from typing import Any

MODEL = "aimv2_mllm"  # what stands behind lmms-eval's --model


def manifest() -> Any:
    """lmms-eval's record of the two classes, for tasks that send messages and for others."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL,
        chat_class_path="aimv2_mllm.lmms.model.MessagesModel",
        simple_class_path="aimv2_mllm.lmms.model.TextModel",
    )
