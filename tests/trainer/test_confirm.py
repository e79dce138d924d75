"""The goal's episodes are the same, whoever plays them."""

from typing import cast

import pytest
import torch

from demoreset_api.spec import PolicySpec
from demoreset_trainer import confirm
from demoreset_trainer.confirm import Confirmation
from demoreset_trainer.demo import Demo
from demoreset_trainer.env import DemoResetEnv, Rules
from demoreset_trainer.play import play
from demoreset_trainer.policy import Policy, architecture
from demoreset_trainer.slots import Begin, Slots

EPISODES = 8


def test_members_share_the_episodes_that_one_would_play(assault: Demo) -> None:
    shape = architecture(PolicySpec())
    torch.manual_seed(0)
    demo = assault.prefix(54)  # 21 points; who plays at random has them sooner, later or never
    policy = Policy(shape, len(DemoResetEnv(demo).action_codes))
    rules = Rules(max_frames=60, lag_frames=60)
    with Slots(demo, rules, shape.view, slots=3, processes=1) as slots:
        confirmation = Confirmation(
            policy,
            lambda count: slots,
            episodes=EPISODES,
            seed=3,
            alive=lambda: None,
            watch=lambda: None,
        )

        def shares(members: int) -> list[bool]:
            found: list[bool | None] = [None] * EPISODES
            for rank in range(members):
                all_of_them = "abc"[:members]
                found[rank::members] = confirmation.share(
                    5, all_of_them[rank], all_of_them, lambda: False
                )
            return [bool(one) for one in found]

        alone = shares(1)
        assert 0 < sum(alone) < EPISODES
        assert shares(2) == shares(3) == alone

        # Told to stop, it does not play to the end; and it can begin anew.
        for steps in (0, 5):
            told = iter([False] * steps + [True])
            assert confirmation.share(5, "a", "a", told.__next__) == []
        assert shares(1) == alone
        # With others it plays its share: they have played theirs.
        assert confirmation.share(5, "a", "ab", lambda: True) == alone[::2]

        # Their noise is their own: the same start played under two numbers differs.
        begins = [Begin(0, 1)] * 4
        some = play(slots, policy, begins, numbers=[0, 1, 2, 3], seed=3)
        assert len(set(some)) > 1
        assert play(slots, policy, begins, numbers=[3, 2, 1, 0], seed=3) == some[::-1]


def test_what_met_the_goal_is_not_what_an_evaluation_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def play(*_: object, seed: int, **__: object) -> list[object]:
        seeds.append(seed)
        return []

    monkeypatch.setattr(confirm, "play", play)
    confirmation = Confirmation(
        Policy(architecture(PolicySpec()), 3),
        lambda count: cast("Slots", None),
        episodes=EPISODES,
        seed=3,
        alive=lambda: None,
        watch=lambda: None,
    )
    for update in (5, 6, 5):
        for me in "ab":
            confirmation.share(update, me, "ab", lambda: False)
    assert len({3, *seeds}) == 3
    assert seeds[:2] == seeds[4:]  # all members, whenever they play it
    assert seeds[0] == seeds[1]
