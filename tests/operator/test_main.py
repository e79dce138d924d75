"""The operator's life: nothing acts when the lease is gone."""

import asyncio

import pytest

from demoreset_operator.main import _until


class Work:
    def __init__(self) -> None:
        self.steps = 0

    async def run(self) -> None:
        while True:
            self.steps += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize("by_signal", [True, False])
def test_nothing_works_on_when_it_is_over(by_signal: bool) -> None:
    async def life() -> tuple[int, int]:
        stop, work = asyncio.Event(), Work()

        async def end() -> None:
            await asyncio.sleep(0.01)
            if by_signal:
                stop.set()
                await asyncio.sleep(60)

        async def act() -> None:
            await _until(stop, work.run())

        await _until(stop, end(), act())
        at_end = work.steps
        await asyncio.sleep(0.02)
        return at_end, work.steps

    at_end, later = asyncio.run(asyncio.wait_for(life(), 10))
    assert later == at_end > 0


def test_an_error_ends_it() -> None:
    async def fail() -> None:
        raise RuntimeError("no luck")

    async def life() -> None:
        await _until(asyncio.Event(), fail(), Work().run())

    with pytest.raises(RuntimeError, match="no luck"):
        asyncio.run(asyncio.wait_for(life(), 10))
