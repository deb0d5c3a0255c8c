"""OUTPUT_DIR before and after a run: whether it may be written to, and how what was stopped there goes on."""

import os

__all__ = ["check_output_dir", "holds_run", "holds_training", "how_to_continue", "last_checkpoint", "make_output_dir"]


def holds_run(folder: str | os.PathLike) -> bool:
    """Whether a run has saved a checkpoint there."""
    return os.path.isfile(os.path.join(folder, "last_checkpoint"))


def holds_training(folder: str | os.PathLike) -> bool:
    """Whether something was trained there, whose settings an evaluation leaves as they are."""
    return holds_run(folder) or os.path.isfile(os.path.join(folder, "metrics.json"))


def last_checkpoint(folder: str | os.PathLike) -> str:
    """The path of the checkpoint that ``last_checkpoint`` names: a file in the folder.

    Raises:
        ValueError, OSError: it names none, such as an address or a file elsewhere; it cannot be read.
    """
    pointer = os.path.join(folder, "last_checkpoint")
    with open(pointer, "rb") as file:
        content = file.read(1000)
    try:
        name = content.decode().strip()
    except UnicodeDecodeError:
        name = ""
    # The characters that an address has mean something to detectron2, in a name too.
    if not name.isprintable() or set(name) & set("/\\:?#") or name in ("", ".", ".."):
        raise ValueError(f"{pointer} must hold the name of a checkpoint in its folder, got {content[:100]!r}")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path}, which {pointer} names, is not there")
    return path


def check_output_dir(folder: str | os.PathLike, resume: bool, eval_only: bool) -> None:
    """Refuse to write over a file, where nothing may be written, or to train over a run.

    Raises:
        ValueError: the folder is a file or has no name, cannot be written to, or holds a run that is not to be resumed.
    """
    if not os.fspath(folder):
        raise ValueError("OUTPUT_DIR must be the name of a folder, got ''")
    if os.path.islink(folder) and not os.path.exists(folder):
        raise ValueError(f"OUTPUT_DIR {folder} is a link to a folder that is not there")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"OUTPUT_DIR {folder} is a file, not a folder")
    there = os.path.abspath(folder)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if os.path.isdir(there) and not os.access(there, os.W_OK | os.X_OK):  # a file there, make_output_dir refuses
        below = "it" if os.path.exists(folder) else there
        raise ValueError(f"OUTPUT_DIR {folder} cannot be written to: {below} is read-only")
    if holds_run(folder) and not (resume or eval_only):
        raise ValueError(f"OUTPUT_DIR {folder} holds a run; add --resume to continue it, or choose another")


def make_output_dir(folder: str | os.PathLike) -> None:
    """Make the folder, where it is not there yet.

    Raises:
        OSError: it cannot be made; one sentence.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {folder} cannot be made: {error.strerror}") from None


def how_to_continue(folder: str | os.PathLike) -> str:
    """How a run that was stopped goes on."""
    if holds_run(folder):
        return f"--resume continues from the last checkpoint in {folder}"
    return f"nothing is saved yet in {folder}, so the run starts again"
