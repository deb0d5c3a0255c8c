"""Evaluate trained classifiers: top-1, top-5, loss, calibration, confusion matrix and accuracy by class; on one crop,
10 or 144 crops, by population, batch or balanced moments, each checkpoint alone and as an ensemble; and what balanced
batches show of it (Hajaj and Gillies, 2018): batches that are balanced by predictions, images that walk through one.

    python tools/evaluate_classification.py runs/fbn --output out
    python tools/evaluate_classification.py runs/bn-seed1 runs/bn-seed2 --crops 144 --ensemble --output out
    python tools/evaluate_classification.py runs/fbn runs/fbn/model_best.pth --moments balanced --output out
    python tools/evaluate_classification.py runs/balanced --moments balanced --crops 10 --spread-crops --output out
    python tools/evaluate_classification.py runs/balanced --relabel 20 --walks 10 --output out
    python tools/evaluate_classification.py weights.pth --config-file configs/ImageNet/resnet50_FBN.yaml --output out

A PATH is an OUTPUT_DIR of tools/train_classification.py, whose model_final.pth, else last checkpoint, is taken, or a
file of weights, whose config is the config.yaml beside it or --config-file. Into the folder --output go `report.html`
with its pictures, `evaluation.json` with all figures, and a confusion matrix as JSON for each checkpoint. Runs in one
process.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import (
    RUN_ERRORS,
    add_import,
    format_table,
    import_modules,
    path_names,
    stoppable,
    user_errors,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="run folders, or files of weights")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--config-file", metavar="FILE", type=Path, help="config of files of weights that lie alone")
    parser.add_argument("--crops", type=int, choices=(1, 10, 144), default=1, help="views that are averaged over")
    parser.add_argument("--moments", choices=("population", "batch", "balanced"), help="default: the run's")
    parser.add_argument(
        "--spread-crops", action="store_true", help="other company for each crop of an image, by moments of batches"
    )
    parser.add_argument(
        "--relabel", type=int, metavar="ROUNDS", default=0, help="balance the batches by predictions, so many times"
    )
    parser.add_argument(
        "--walks", type=int, metavar="N", default=0, help="so many images of a kind walk through a balanced batch"
    )
    parser.add_argument("--val-images", type=int, metavar="N", help="so many, each class in its share; 0: all")
    parser.add_argument("--ensemble", action="store_true", help="add the mean of all checkpoints' probabilities")
    parser.add_argument(
        "--name", metavar="NAME", action="append", help="short name, one for each PATH; default: the folders'"
    )
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, default=[], help="config overrides; come last"
    )
    add_import(parser)
    return parser.parse_args(argv)


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Config overrides that the flags stand for, behind which the user's own come."""
    given = {"TEST.MOMENTS": args.moments, "DATASETS.VAL_IMAGES": args.val_images}
    studies = {"RELABEL": args.relabel, "WALKS": args.walks}  # not the run's own, of its end
    crops = args.crops if any(studies.values()) else 1
    others = {"CROPS": crops, "MOMENTS": "()", "POPULATION": False}
    given |= {f"TEST.AT_END.{key}": value for key, value in (studies | others).items()}
    if args.moments is not None:
        given["TEST.ALSO"] = "()"
    return [part for key, value in given.items() if value is not None for part in (key, str(value))] + args.opts


def names_of(args: argparse.Namespace) -> list[str]:
    """A name for each path; ValueError where one is twice."""
    names = path_names(args.paths, args.name)
    if args.ensemble and len(names) < 2:
        raise ValueError("--ensemble is of two checkpoints or more, got one PATH")
    return names


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the figures of each checkpoint."""
    args = parse_args(argv)
    with user_errors():
        names = names_of(args)
        if args.output.exists() and not args.output.is_dir():
            raise ValueError(f"--output {args.output} is a file, not a folder")
        if (args.output / "config.yaml").exists():  # whose evaluation.json is another kind of record
            raise ValueError(f"--output {args.output} holds a run or its evaluation; choose another folder")
        import_modules(args.imports)

        from fbn_plugin.engine.classification.comparison import check_same_set, evaluate_checkpoints, write_comparison
        from fbn_plugin.engine.classification.predictions import find_checkpoint
        from fbn_plugin.engine.reports.classifiers import summary_rows, write_classifier_report

        options = args.config_file, overrides_of(args)
        checkpoints = [find_checkpoint(path, *options, name) for path, name in zip(args.paths, names)]
        check_same_set(checkpoints)
        comparison = evaluate_checkpoints(checkpoints, args.crops, args.ensemble, args.spread_crops)
    with user_errors(*RUN_ERRORS):
        command = shlex.join(["python", "tools/evaluate_classification.py", *(sys.argv[1:] if argv is None else argv)])
        write_comparison(args.output, comparison, command)
        shown = dict(zip(names, comparison.shown))
        report = comparison.title, comparison.facts, comparison.classes, comparison.entries, command, shown
        write_classifier_report(args.output / "report.html", *report)
    print(f"{comparison.title}\n\n{format_table(summary_rows(comparison.entries))}\n")
    for fact in comparison.facts:
        print(f"- {fact}")
    print(f"\nwritten to {args.output / 'report.html'}")
    return {name: measures.figures for name, measures in comparison.entries.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
