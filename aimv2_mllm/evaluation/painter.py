"""A pre-training model that goes on with pictures, as far as its training lets it.

A decoder that never learned captions, or never to paint, is not asked for them: that is said.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import dreams
from aimv2_mllm.folders import stage_record

UNWRITTEN = "(none: this decoder never learned captions, it was trained with text_weight 0)"


class Painter:
    """The pre-training model in a folder; UsageError where there is no decoder.

    `num_patches` are those of a picture; `paints` and `writes` say whether it learned to.
    """

    def __init__(self, folder: Path) -> None:
        self.model, self._tokenizer, self.preprocessing = dreams.load_pretrainer(folder)
        trained = stage_record(folder).get("recipe", {})
        self.paints, self.writes = trained.get("alpha") != 0, trained.get("text_weight") != 0
        self.num_patches = int(self.model.encoder.config.num_patches)

    def check(self, prefix: int, statistics: str) -> None:
        """UsageError for a prefix that a picture does not have, and for no key of
        `dreams.STATISTICS`."""
        if not 1 <= prefix < self.num_patches:
            raise UsageError(
                f"prefix {prefix}: the model sees {self.num_patches} patches, so 1 to "
                f"{self.num_patches - 1} of them can be shown"
            )
        if statistics not in dreams.STATISTICS:
            raise UsageError(f"statistics is {statistics}, must be {', '.join(dreams.STATISTICS)}")

    def paint(
        self, pixels: Tensor, prefix: int, statistics: str = "true"
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first `prefix` patches alone of one picture (1, 3, H, W), and painted on from there,
        which who never learned it leaves grey: (H, W, 3) uint8 each; errors are `check`'s."""
        self.check(prefix, statistics)
        original = self.preprocessing.restore(pixels)
        [shown] = dreams.only_prefix(original, prefix, self.model.encoder.config.patch_size)
        if not self.paints:
            return shown, shown
        [painted] = self.preprocessing.restore(dreams.paint(self.model, pixels, prefix, statistics))
        return shown, painted

    def caption(self, pixels: Tensor) -> str:
        """What is written of the whole of one picture (1, 3, H, W)."""
        if not self.writes:
            return UNWRITTEN
        [text] = dreams.write_caption(self.model, pixels, self._tokenizer)
        return text
