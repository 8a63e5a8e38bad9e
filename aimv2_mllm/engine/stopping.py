"""A run that is asked to stop: it ends its step, saves, and leaves with the signal's exit code."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from aimv2_mllm.engine.distributed import Ranks


class StopRequest:
    """While entered, SIGINT or SIGTERM is only noted; a second SIGINT stops at once.

    Leaving restores the old handlers and raises what the signal asks for.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._signal = 0  # none
        self._replaced: dict[int, Any] = {}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: all ranks ask this together, and stop together."""
        self._signal = self._ranks.largest(self._signal)
        return self._signal != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # One that the parent has turned off (nohup, a job in the background) stays off.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._replaced[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Of several ranks the loop tells when they have agreed.
        if not self._signal and self._ranks.size == 1:
            # No print: a handler may run in the middle of one.
            os.write(
                2, b"\nstopping after this step and a checkpoint; Ctrl-C again stops at once\n"
            )
        self._signal = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._signal and kind is None:
            raise (
                KeyboardInterrupt
                if self._signal == signal.SIGINT
                else SystemExit(128 + signal.SIGTERM)
            )
