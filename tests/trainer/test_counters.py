"""Totals that do not fall, whichever member tells them."""

from demoreset_trainer.counters import Counters


def test_members_agree_on_the_most_that_one_of_them_saw() -> None:
    saw = Counters(recoveries={"left": 2, "coordinator": 1}, recovery_seconds={"left": 1.5})
    missed = Counters(recoveries={"left": 2, "joined": 1}, recovery_seconds={"left": 1.6})
    missed.rolled_back = 1
    told = [saw.seen(), missed.seen()]
    for counters in (saw, missed):
        counters.agree(told)
        assert counters.recoveries == {"left": 2, "coordinator": 1, "joined": 1}
        assert counters.recovery_seconds == {"left": 1.6}
        assert counters.rolled_back == 1
