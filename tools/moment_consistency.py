"""How far mean and variance of some of a batch's images are from those of the whole batch, at each norm of classifiers.

    python tools/moment_consistency.py --from runs/bn128 --output out
    python tools/moment_consistency.py runs/bn128 --batches 20 --output out
    python tools/moment_consistency.py runs/bn128 --output out --opts MEASURE.MOMENTS.SUBSET 8

With --from, PATHs are OUTPUT_DIRs of runs that measured it while they trained (MEASURE.MOMENTS.PERIOD in the config):
lines over the iterations, as means over all layers or those of --layer. Without, it is measured at a checkpoint, layer
by layer: a PATH is an OUTPUT_DIR, whose model_final.pth, else last checkpoint, is taken, or a file of weights, whose
config is the config.yaml beside it or --config-file. How many images, and by which norms, say MEASURE.MOMENTS.SUBSET
and NORMS. Into the folder --output go `moments.png` and `moments.json`. Runs in one process.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import interruption  # noqa: F401

from fbn_plugin.engine.reports.measured_arguments import add_arguments, checked_names
from fbn_plugin.engine.run.cli import RUN_ERRORS, format_table, stoppable, user_errors


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--layer", metavar="NAME", help="with --from: the figure of this norm; default: of all")
    return parser.parse_args(argv)


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the figures that it prints."""
    args = parse_args(argv)
    with user_errors():
        names = checked_names(args)
        if args.layer is not None and not args.from_runs:
            raise ValueError("--layer is for --from; of a checkpoint the figure has all layers")

        from fbn_plugin.engine.classification.measured_checkpoints import checkpoint_moments
        from fbn_plugin.engine.classification.measured_runs import read_measured_run
        from fbn_plugin.engine.classification.predictions import find_checkpoint
        from fbn_plugin.engine.reports.measured import figure_rows, moment_report, run_moments, write_measured

        if args.from_runs:
            read = [read_measured_run(path, name, "moments") for path, name in zip(args.paths, names)]
            record, picture, found = run_moments(read, args.layer)
        else:
            options = args.config_file, ["MEASURE.MOMENTS.PERIOD", "1", *args.opts]
            checkpoints = [find_checkpoint(path, *options, name) for path, name in zip(args.paths, names)]
            measured = [checkpoint_moments(each, args.batches) for each in checkpoints]
            record, picture, found = moment_report(measured)
    with user_errors(*RUN_ERRORS):
        command = shlex.join(["python", "tools/moment_consistency.py", *(sys.argv[1:] if argv is None else argv)])
        write_measured(args.output, "moments", record, picture, command)
    print(f"Distance of the moments, {record['over']}:\n\n{format_table(figure_rows(found))}\n")
    print(f"written to {args.output / 'moments.png'}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
