"""Which checkpoint a run goes on from, the last one or with ``--resume auto`` the newest that is sound, and which of
those behind it are kept."""

import logging
import os
import re
from typing import Any

from fvcore.common import checkpoint as fvcore_checkpoint

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import check_contents, load_file
from fbn_plugin.engine.run.output_dir import last_checkpoint
from fbn_plugin.engine.run.states import checked_iteration

__all__ = ["PeriodicCheckpointer", "checkpoint_to_resume", "is_saved_after", "lacks_final", "save_before_leaving"]

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


def checkpoint_to_resume(folder: str | os.PathLike, resume: bool | str = True) -> tuple[str, list[str]]:
    """The checkpoint in OUTPUT_DIR that a run goes on from.

    Args:
        folder: holds a run.
        resume: ``"auto"``, or any other true value for the one that ``last_checkpoint`` names.

    Returns:
        its path, and lines for the log on what was passed over.

    Raises:
        ValueError, OSError: ``last_checkpoint`` names none, or one that is damaged; the sentence names the newest sound
            one before it. With ``"auto"``: there is no sound one.
    """
    last = None
    try:
        last = last_checkpoint(folder)
        check_contents(last)
        if resume == "auto":
            checked_iteration(last, load_file(last))
        return last, []
    except (OSError, ValueError) as error:
        refused = error
    sound = _newest_sound(folder, last)
    kind = FileNotFoundError if isinstance(refused, FileNotFoundError) else ValueError
    if sound is None:
        raise kind(f"{refused}; no other checkpoint in {folder} is sound")
    if resume != "auto":
        raise kind(f"{refused}; --resume auto continues from {sound}, the newest sound one before")
    return sound, [f"{refused}; continuing from {sound}, the newest sound one before"]


def _newest_sound(folder: str | os.PathLike, damaged: str | None) -> str | None:
    """The newest checkpoint of a run that can be gone on from, of those before the damaged one."""
    end = _number(damaged) if damaged else None
    numbered = {_number(name): os.path.join(folder, name) for name in os.listdir(folder)}
    final = os.path.join(folder, "model_final.pth")
    if final != damaged and os.path.isfile(final) and (content := _sound(final)) is not None:
        numbered[content["iteration"]] = final
    numbered.pop(None, None)
    for number in sorted(numbered, reverse=True):
        if (end is None or number < end) and _sound(numbered[number]) is not None:
            return numbered[number]
    return None


def _sound(path: str) -> dict[str, Any] | None:
    try:
        content = load_file(path)
        checked_iteration(path, content)
    except (OSError, ValueError):
        return None
    # Those of a model alone, such as an exported one, are no run's.
    return content if len(content) > 2 else None


def _number(path: str) -> int | None:
    """The iteration in the name of a numbered checkpoint; None of other files."""
    found = _NUMBERED.fullmatch(os.path.basename(path))
    return int(found[1]) if found else None


class PeriodicCheckpointer(fvcore_checkpoint.PeriodicCheckpointer):
    """fvcore's, that counts what is on the disk: ``max_to_keep`` is kept to over all interruptions of a run.

    Of the files ``model_NNNNNNN.pth`` up to the one just saved the newest are kept, and the one that
    ``last_checkpoint`` names; no other file is removed. Rank 0 removes them.
    """

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Save where it is due behind an iteration, counted from 0; ``kwargs`` are saved too."""
        if (iteration + 1) % self.period == 0:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration, **kwargs)
            if self.max_to_keep is not None:
                distributed.on_main(lambda: self._remove_older(self.max_to_keep, iteration))
        if self.max_iter is not None and iteration >= self.max_iter - 1:
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=iteration, **kwargs)

    def _remove_older(self, keep: int, saved: int) -> None:
        if not self.checkpointer.has_checkpoint():  # of one that does not save to the disk
            return
        folder = self.checkpointer.save_dir
        last = os.path.basename(last_checkpoint(folder))
        numbered = {name: _number(name) for name in os.listdir(folder)}
        old = sorted((n for n, number in numbered.items() if number is not None and number <= saved), key=numbered.get)
        for name in old[:-keep]:
            path = os.path.join(folder, name)
            if name != last and os.path.isfile(path):
                try:
                    os.remove(path)
                except OSError as error:
                    logger.warning("%s cannot be removed: %s", path, error.strerror)


def save_before_leaving(periodic: fvcore_checkpoint.PeriodicCheckpointer, iteration: int, **state: Any) -> None:
    """Save where a run stops, as the checkpoint of an iteration, of the last one too: ``model_final.pth`` may want
    population statistics that are left out now, and a resumed run writes it, see :func:`lacks_final`.

    Args:
        periodic: of the run.
        iteration: the one that is finished, from 0.
        state: what else goes into the checkpoint, as into ``periodic.step``.
    """
    periodic.save(f"{periodic.file_prefix}_{iteration:07d}", iteration=iteration, **state)


def is_saved_after(periodic: fvcore_checkpoint.PeriodicCheckpointer, iteration: int) -> bool:
    """Whether ``periodic.step(iteration)`` saves."""
    return (iteration + 1) % periodic.period == 0 or iteration + 1 >= periodic.max_iter


def lacks_final(path: str, start: int, max_iter: int) -> bool:
    """Whether a resumed run has nothing left to train and no ``model_final.pth`` yet.

    Args:
        path: the checkpoint that it goes on from.
        start: the iteration that it goes on with, from 0.
        max_iter: of the whole run.
    """
    return 0 < start == max_iter and os.path.basename(path) != "model_final.pth"
