"""Ctrl-C reaches a run whose main thread sleeps."""

import signal
import threading

import pytest

from simulations.simulate import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_another_thread_takes_stops_the_run_while_the_main_thread_sleeps(number):
    stop = threading.Event()
    seen = []

    def take() -> None:
        signal.pthread_kill(threading.get_ident(), number)
        seen.append(stop.wait(10))

    before = signal.getsignal(number)
    with stop_signals(stop) as prepared:
        prepared()
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert seen == [True]
    assert signal.getsignal(number) == before


def test_other_signals_stop_nothing():
    stop = threading.Event()
    usual = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stop_signals(stop) as prepared:
            prepared()
            signal.raise_signal(signal.SIGUSR1)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGUSR1, usual)


def test_a_signal_while_preparing_raises():
    with pytest.raises(KeyboardInterrupt), stop_signals(threading.Event()):
        signal.raise_signal(signal.SIGINT)
