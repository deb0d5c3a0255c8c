"""Loss landscapes of classifiers: how loss and gradient change on a training batch when the weights move along the
gradient.

    python tools/loss_landscape.py --from runs/bn runs/fbn --output out
    python tools/loss_landscape.py runs/bn runs/fbn --batches 20 --output out
    python tools/loss_landscape.py weights.pth --config-file configs/MNIST/lenet5_FBN.yaml --output out

With --from, PATHs are OUTPUT_DIRs of runs that measured it while they trained (MEASURE.LANDSCAPE.PERIOD in the config):
bands over the iterations, of all runs in one figure. Without, it is measured at a checkpoint: a PATH is an OUTPUT_DIR,
whose model_final.pth, else last checkpoint, is taken, or a file of weights, whose config is the config.yaml beside it
or --config-file. Into the folder --output go `landscape.png` and `landscape.json`. Runs in one process.
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
    return parser.parse_args(argv)


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the figures that it prints."""
    args = parse_args(argv)
    with user_errors():
        names = checked_names(args)

        from fbn_plugin.engine.classification.measured_checkpoints import checkpoint_landscape
        from fbn_plugin.engine.classification.measured_runs import read_measured_run
        from fbn_plugin.engine.classification.predictions import find_checkpoint
        from fbn_plugin.engine.reports.measured import figure_rows, landscape_report, run_landscapes, write_measured

        if args.from_runs:
            read = [read_measured_run(path, name, "landscape") for path, name in zip(args.paths, names)]
            record, picture, found = run_landscapes(read)
        else:
            options = args.config_file, args.opts
            checkpoints = [find_checkpoint(path, *options, name) for path, name in zip(args.paths, names)]
            measured = [checkpoint_landscape(each, args.batches) for each in checkpoints]
            record, picture, found = landscape_report(measured)
    with user_errors(*RUN_ERRORS):
        command = shlex.join(["python", "tools/loss_landscape.py", *(sys.argv[1:] if argv is None else argv)])
        write_measured(args.output, "landscape", record, picture, command)
    print(f"Loss landscape, {record['over']}:\n\n{format_table(figure_rows(found))}\n")
    print(f"written to {args.output / 'landscape.png'}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
