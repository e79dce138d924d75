"""Members that were lost together with the coordinator, and are to be kept from saving.

They may not be dead: on the far side of a network that was cut they train on with that coordinator,
in the same life, and perhaps reach the volume. So those that go on with another coordinator take
the run's next life, and what the others save is refused.
"""

import time
from collections.abc import Callable

from demoreset_api.errors import TryAgain
from demoreset_trainer.group import Quorum

PATIENCE = 5.0  # seconds for members that are only slower to come back


class Fence:
    """Of one member: whom it has lost sight of, and the life that keeps their saves away.

    Args:
        take_life: Takes the run's next life on the disk, as `Saver` has it.
        note: Told what a person wants to know.
    """

    def __init__(self, take_life: Callable[[], int | None], note: Callable[[str], None]) -> None:
        self._take_life, self._note = take_life, note
        self._beyond: set[str] = set()  # members that were lost together with the coordinator
        self._since = 0.0  # when; or when a life was tried to be taken
        self._taking = False
        self._refused = False  # one could not be taken, which was told
        self.life = 0  # that was taken, until all members are in it; 0: none

    def lose(self, quorum: Quorum, expected: list[str]) -> None:
        """See who is missing after the coordinator was away, and who has only been slower."""
        if quorum.cut_off and (missing := {*expected} - {*quorum.members}):
            self._beyond, self._since = self._beyond | missing, time.monotonic()
        self._beyond -= {*quorum.members}

    def build(self, *, first: bool) -> None:
        """Take a life where it is time: it falls to the first member.

        One that is being taken is waited for even where all have come back: it may be on the disk
        already, and refuse what this group saves.
        """
        late = time.monotonic() > self._since + PATIENCE
        if not (self._taking or (self._beyond and first and late)):
            return
        self._taking = True
        try:
            life = self._take_life()
        except TryAgain as error:
            if not self._refused:
                self._refused = True
                self._note(f"others may train this run, too, and could not be fenced off: {error}")
            self._taking, self._since = False, time.monotonic()
            return
        if life is not None:
            self._taking = self._refused = False
            self.life, self._beyond = life, set()

    def stands(self) -> None:
        """All members are in a later life than those who were lost."""
        self.life, self._beyond = 0, set()
