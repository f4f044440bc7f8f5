"""Stop signals: the first one sets a value, the second one acts, and handlers are restored."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from sr3_jax.distributed.signals import exit_if_stopped, stop_signals


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_first_signal_sets_the_exit_code(number, code):
    before = signal.getsignal(number)
    with stop_signals() as stopped:
        assert stopped() == 0
        signal.raise_signal(number)
        assert stopped() == code
    assert signal.getsignal(number) is before


def test_second_signal_acts_immediately():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGHUP)
        assert stopped() == 0
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_act_during_a_long_call_that_runs_no_python(number):
    """As a device call does: pbkdf2 holds the main thread for minutes and releases the lock of the interpreter."""
    code = (
        "import hashlib, signal; from sr3_jax.distributed.signals import stop_signals\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stop_signals('this image'):\n"
        "    print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert "Stopping after this image" in process.stderr.readline()
            started = time.monotonic()
            process.send_signal(number)
            assert process.wait(30) in (128 + number, -number)
            assert time.monotonic() - started < 3
        finally:
            process.kill()


def test_no_effect_outside_the_main_thread():
    seen = []

    def work():
        with stop_signals() as stopped:
            seen.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


def test_exit_if_stopped_exits_with_the_code_and_a_message(capsys):
    exit_if_stopped(0)
    with pytest.raises(SystemExit) as stop:
        exit_if_stopped(143)
    assert stop.value.code == 143
    assert "Run the same command again" in capsys.readouterr().err
