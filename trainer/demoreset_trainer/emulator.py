"""The one module that talks to the Arcade Learning Environment (ale-py).

One call of `act` is one emulator frame. Sticky actions and frame skips are ours, not the
emulator's: its saved state lacks the last sticky action, so after a restore the first frames would
repeat an action of another episode.
"""

import hashlib
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ale_py import ALEInterface, ALEState, LoggerMode, roms

from demoreset_api.errors import UserError

Frame = npt.NDArray[np.uint8]

ALL_ACTIONS = tuple(range(18))  # the joystick's codes, as in ale_py.Action
RAM_BYTES = 128
# The emulator ends the process that loads one of these without a second player.
FOR_TWO = ("combat", "joust", "maze_craze", "warlords")

ALEInterface.setLoggerMode(LoggerMode.Error)


@lru_cache(maxsize=1)
def emulator_version() -> str:
    """The emulator's version: states saved by one need not fit another."""
    return version("ale-py")


def rom_md5(game: str) -> str:
    """MD5 of the game's ROM, as ale-py ships it.

    Raises:
        UserError: ale-py does not know the game.
    """
    return hashlib.md5(_rom_path(game).read_bytes(), usedforsecurity=False).hexdigest()


@cache  # ale-py looks through all of its files
def _rom_path(game: str) -> Path:
    if game not in roms.get_all_rom_ids():
        raise UserError(
            f"game: ale-py {emulator_version()} has no game {game!r}; names look like "
            "'montezuma_revenge' or 'freeway'"
        )
    if game in FOR_TWO:
        raise UserError(f"game: {game!r} is a game for two players, which one agent cannot play")
    path = roms.get_rom_path(game)
    if path is None:
        raise UserError(f"game: the ROM of {game!r} is missing; reinstall ale-py")
    return Path(path)


_stock: dict[str, list["Emulator"]] = {}


def stock(game: str, count: int) -> None:
    """Make emulators for later; processes that are forked from this one have them, too.

    One takes a tenth of a second.
    """
    _stock[game] = [Emulator(game) for _ in range(count)]


def stocked(game: str) -> bool:
    """Whether there are any for later."""
    return bool(_stock.get(game))


def take(game: str) -> "Emulator":
    """One of those that were made before, else a new one."""
    made = _stock.get(game)
    return made.pop() if made else Emulator(game)


class Emulator:
    """One game, deterministic: the same actions from power-on give the same frames."""

    def __init__(self, game: str) -> None:
        rom = _rom_path(game)
        self._ale = ale = ALEInterface()
        ale.setInt("random_seed", 0)
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(str(rom))
        ale.reset_game()
        self.game = game
        self.minimal_actions = tuple(int(action.value) for action in ale.getMinimalActionSet())
        self.height, self.width = ale.getScreenDims()
        # Taken once: some games let the seed or the frames played before set their initial state.
        self._power_on = ale.cloneState()
        # Without a frame played, some games (qbert, tetris) take over only part of a state.
        ale.act(0)
        self.reset()
        self.act = ale.act  # frame by frame, the hot path: no wrapper in between
        self.lives = ale.lives
        self.game_over = ale.game_over

    def reset(self) -> None:
        """Go to the game's own start."""
        self._ale.restoreState(self._power_on)

    def save(self) -> bytes:
        """The state as bytes, without the screen."""
        return self._ale.cloneState().serialize()

    def restore(self, state: bytes) -> None:
        """Go to a saved state. The screen is still the old one until the next `act`."""
        self._ale.restoreState(ALEState(state))

    def clone(self) -> ALEState:
        """The state as a cheap object, for use in this process alone."""
        return self._ale.cloneState()

    def restore_clone(self, state: ALEState) -> None:
        """Go to a cloned state. The screen is still the old one until the next `act`."""
        self._ale.restoreState(state)

    def ram(self) -> npt.NDArray[np.uint8]:
        """The console's 128 bytes of memory."""
        ram: npt.NDArray[np.uint8] = self._ale.getRAM()
        return ram

    def poke(self, address: int, value: int) -> None:
        """Set one byte of the console's memory."""
        self._ale.setRAM(address, value)

    def grey_into(self, out: Frame) -> None:
        """Write the screen, [height, width] in grey, into `out`."""
        self._ale.getScreenGrayscale(out)

    def rgb(self) -> Frame:
        """The screen, [height, width, 3]."""
        screen: Frame = self._ale.getScreenRGB()
        return screen
