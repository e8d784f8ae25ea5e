"""Time and signals -> when a run saves a checkpoint, and when it stops: callback of the Trainer.

Ctrl-C, SIGTERM or the end of its terminal ends the run after the step it is in, saved; a second
one ends the process.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Checkpoints(TrainerCallback):
    """Saves every so many minutes and after the last step, and when the run is asked to stop.

    Args:
        minutes: between two checkpoints; None: Trainer saves by steps.
    """

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.is_asked_to_stop = False
        self._saved = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, the first signal asks to stop. Without effect in a second thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        # Those that nohup, or a script's `&`, had this process ignore stay ignored.
        before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}

        def ask(number: int, frame: Any) -> None:
            self.is_asked_to_stop = True
            for known, handler in before.items():
                signal.signal(known, handler)
            logger.info("stopping after this step; repeat to stop at once without saving")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_due = self.minutes is not None and (
            state.global_step >= state.max_steps
            or time.monotonic() - self._saved >= 60 * self.minutes
        )
        # Processes that do not agree would wait for each other.
        self.is_asked_to_stop, is_due = _any_process((self.is_asked_to_stop, is_due), args.device)
        if self.is_asked_to_stop:
            control.should_save = control.should_training_stop = True
        elif is_due:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()


def _any_process(flags: tuple[bool, ...], device: torch.device) -> tuple[bool, ...]:
    """Flag by flag, whether it is set in any process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return flags
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in found)
