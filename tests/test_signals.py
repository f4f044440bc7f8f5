"""Signals as a value to poll: the first sets it, the second acts, and all is as before afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from sr3_jax.distributed.signals import exit_if_stopped, stop_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_sets_the_exit_code(number, code):
    before = signal.getsignal(number)
    with stop_signals() as stopped:
        assert stopped() == 0
        signal.raise_signal(number)
        assert stopped() == code
    assert signal.getsignal(number) is before


def test_the_second_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def work():
        with stop_signals() as stopped:
            seen.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_leaving_says_how_to_go_on(capsys):
    exit_if_stopped(0)
    with pytest.raises(SystemExit) as stop:
        exit_if_stopped(143)
    assert stop.value.code == 143
    assert capsys.readouterr().err == "Stopped. Run the same command again to go on from there.\n"
