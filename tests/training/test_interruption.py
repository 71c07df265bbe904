"""The first signal asks, the second one insists, and what handled signals before does so again afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from research.training.interruption import Interruption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request(number, code, capsys):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.code == 0
        os.kill(os.getpid(), number)
        assert interruption.code == code
        assert "once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before
