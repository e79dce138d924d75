"""Signals as a wish to stop."""

import os
import queue
import signal

import pytest

from demoreset_trainer.signals import Signals


def test_the_first_is_acknowledged_while_the_main_thread_is_busy() -> None:
    heard: queue.Queue[str] = queue.Queue()
    with Signals() as signals:
        assert signals() is None
        signals.acknowledge(heard.put)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.get(timeout=10).startswith("SIGTERM: ")
        os.kill(os.getpid(), signal.SIGINT)
        assert signals() == signal.SIGINT
    assert heard.empty()


def test_one_that_came_before_anybody_could_say_it_is_acknowledged_then() -> None:
    heard: queue.Queue[str] = queue.Queue()
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        signals.acknowledge(heard.put)
        assert heard.get(timeout=10).startswith("Ctrl-C: ")


def test_a_closed_terminal_is_a_wish_to_stop_but_not_under_nohup() -> None:
    for ignored in (False, True):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signals() == (None if ignored else signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_everything_and_the_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals = Signals()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals:
        os.kill(os.getpid(), signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
