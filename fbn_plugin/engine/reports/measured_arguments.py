"""What the command lines of ``tools/loss_landscape.py`` and ``tools/moment_consistency.py`` share."""

import argparse
from pathlib import Path

from fbn_plugin.engine.run.cli import add_import, import_modules, path_names

__all__ = ["add_arguments", "checked_names"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both have."""
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="run folders, or files of weights")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--from", dest="from_runs", action="store_true", help="PATHs are runs that measured it while they trained"
    )
    parser.add_argument("--config-file", metavar="FILE", type=Path, help="config of files of weights that lie alone")
    parser.add_argument("--batches", type=int, metavar="N", help="training batches to measure on; default: 10")
    parser.add_argument(
        "--name", metavar="NAME", action="append", help="short name, one for each PATH; default: the folders'"
    )
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, default=[], help="config overrides; come last"
    )
    add_import(parser)


def checked_names(args: argparse.Namespace) -> list[str]:
    """A name for each path, once the arguments fit together and what they name is imported; ``batches`` gets its
    default.

    Raises:
        ValueError: they do not fit.
    """
    names = path_names(args.paths, args.name)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file, not a folder")
    if args.from_runs:
        flags = {"--config-file": args.config_file, "--batches": args.batches, "--opts": args.opts}
        if given := [flag for flag, value in flags.items() if value not in (None, [])]:
            raise ValueError(f"{given[0]} is for checkpoints, not for --from, which reads what runs measured")
    args.batches = 10 if args.batches is None else args.batches
    if not 1 <= args.batches <= 2**20:
        raise ValueError(f"--batches must be 1 or more, and {2**20} or less, got {args.batches}")
    import_modules(args.imports)
    return names
