"""Signals in tests: heeded, whoever has started them."""

from __future__ import annotations

import signal

from es_megatron.trainer.signals import STOP_SIGNALS


def heed_all() -> None:
    """Heed signals that whoever started the tests may have ignored, in the background or under `nohup`."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
