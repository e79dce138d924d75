"""Of several ways the one that survives disturbances is chosen, if it is hardly longer."""

from collections.abc import Sequence

import pytest

from demoreset_trainer.shorten import Course, choose


@pytest.mark.parametrize("way", [[1] * 30 + [0] * 6 + [1] * 13, [1] * 25 + [0] * 6 + [1] * 18])
def test_survival_is_what_disturbed_ways_played_from_power_on_say(way: list[int]) -> None:
    course, other = Course("freeway", 1), Course("freeway", 1)
    reached = [
        other.walk(disturbed) is not None
        for number in range(1, len(way) - 1)
        for disturbed in (
            [*way[:number], way[number], way[number], *way[number + 1 :]],
            [*way[:number], *way[number + 1 :]],
        )
    ]
    assert 0 < sum(reached) < len(reached)
    assert course.survival(way) == sum(reached) / len(reached)


class Known(Course):
    """Ways that nothing makes shorter, and how safe each of them is."""

    def __init__(self, safe: dict[tuple[int, ...], float]) -> None:
        self._safe = safe

    def walk(self, actions: Sequence[int], begin: int = 0) -> int | None:
        return None

    def mark(self, actions: Sequence[int]) -> None:
        pass

    def survival(self, actions: Sequence[int]) -> float:
        return self._safe[tuple(actions)]


@pytest.mark.parametrize(
    ("candidates", "chosen"),  # each its decisions, how often the action changes, and survival
    [
        ([(20, 1, 0.9), (20, 2, 0.5)], 0),
        ([(20, 1, 0.5), (23, 1, 0.9)], 1),  # SAFER, and no more
        ([(20, 1, 0.5), (24, 1, 0.9)], 0),
        ([(24, 1, 0.9), (22, 1, 0.8), (20, 1, 0.5)], 1),
        ([(22, 1, 0.9), (20, 1, 0.9)], 1),  # as safe, and shorter
        ([(20, 3, 0.9), (20, 1, 0.9)], 1),  # as safe, and smoother
        ([(20, 1, 0.1), (20, 2, 0.2), (20, 3, 0.3), (20, 4, 0.4), (20, 5, 0.9)], 3),  # TRIED
    ],
)
def test_the_safest_of_those_that_are_nearly_the_shortest_is_chosen(
    candidates: list[tuple[int, int, float]], chosen: int
) -> None:
    ways = [
        tuple(number % 2 for number in range(turns)) + (turns % 2,) * (length - turns)
        for length, turns, _ in candidates
    ]
    safe = [survival for _, _, survival in candidates]
    course = Known(dict(zip(ways, safe, strict=True)))
    assert choose(course, ways) == (list(ways[chosen]), safe[chosen])
