"""What a run's weights reach: COCO AP of a detector, or of any file of detections: AP, AP50, AP75, APs, APm, APl of
boxes and masks; top-1, top-5 and loss of a classifier.

    python tools/evaluate.py runs/fbn
    python tools/evaluate.py runs/fbn --weights model_0049999.pth --output ap_50k.json
    python tools/evaluate.py runs/fbn --dataset my_data:test
    python tools/evaluate.py --results coco_instances_results.json --dataset coco_2017_val

RUN_DIR is the OUTPUT_DIR of tools/train_net.py (detectron2), tools/train_detection.py (torchvision) or
tools/train_classification.py; the engine that trained the run evaluates it, of a classifier on the run's own set.
tools/evaluate_classification.py tells more of classifiers. With --results no model is needed: detections in COCO's
results format are scored, whoever made them. The figures are printed and written as JSON, to RUN_DIR/evaluation.json by
default; of RUN_DIR nothing else is touched.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import (
    add_import,
    check_outputs,
    format_table,
    import_modules,
    stoppable,
    user_errors,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the default of ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help="a run's OUTPUT_DIR")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint, as a path or a name in RUN_DIR; default: model_final.pth, else the last one",
    )
    parser.add_argument("--dataset", metavar="NAME", nargs="+", help="data sets; default: the run's DATASETS.TEST")
    parser.add_argument("--results", metavar="FILE", help="score this coco_instances_results.json; no model is run")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON file; default: RUN_DIR/evaluation.json")
    add_import(parser)
    args = parser.parse_args(argv)
    args.output = args.output or (Path(args.run_dir, "evaluation.json") if args.run_dir else None)
    return args


def check_args(args: argparse.Namespace) -> None:
    """ValueError or OSError for arguments that do not go together, a run folder that is not there, or an output that
    cannot be written."""
    if args.run_dir and not Path(args.run_dir).is_dir():  # which the default of --output is in
        raise FileNotFoundError(f"run folder {args.run_dir} is not there")
    check_outputs(args.output)
    if args.results and args.weights:
        raise ValueError("--weights names a model to run, and --results wants none: give one of them")
    if not args.run_dir and not (args.results and args.dataset):
        raise ValueError("RUN_DIR is needed, or both --results and --dataset")


def evaluate_classifier(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Evaluate a classification run; its figures by what they were measured on."""
    from fbn_plugin.engine.classification.run_evaluation import evaluate_run
    from fbn_plugin.engine.run.run_info import read_run_info

    if args.dataset or args.results:
        raise ValueError(f"{args.run_dir} is of a classifier: --dataset and --results are for detectors")
    check_imports(args, read_run_info(args.run_dir))
    figures, source = evaluate_run(Path(args.run_dir), args.weights, args.output)
    rows = [[*figures], [f"{value:.4f}" if name == "loss" else f"{value:.2f}" for name, value in figures.items()]]
    print(f"\n{source}\n\n{format_table(rows)}\n\nwritten to {args.output}")
    return {source: figures}


def check_imports(args: argparse.Namespace, info: Mapping[str, Any]) -> None:
    """ValueError where a run was trained with modules that are not given."""
    if (needed := info.get("imports")) and not args.imports:
        options = " ".join(f"--import {name}" for name in needed)
        raise ValueError(f"{args.run_dir} was trained with modules of its own: add {options}")


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the figures of each data set."""
    args = parse_args(argv)
    output = args.output
    with user_errors():
        check_args(args)
        import_modules(args.imports)  # a data set, too, may be one that a module registers
        from fbn_plugin.engine.run.run_folder import is_classification, read_run

        if args.run_dir and is_classification(args.run_dir):
            return evaluate_classifier(args)

        from fbn_plugin.engine.data.named_sets import resolve_dataset
        from fbn_plugin.engine.reports.evaluation import (
            averages_note,
            evaluate_weights,
            flat_metrics,
            metric_rows,
            read_detections,
            score_detections,
        )
        from fbn_plugin.engine.run.run_info import hardware, write_evaluation

        run = read_run(args.run_dir) if args.run_dir else None
        names = list(dict.fromkeys(args.dataset or run.test_sets))
        if not names:
            raise ValueError("the run's DATASETS.TEST is empty: name a data set with --dataset")
        if args.results and len(names) > 1:
            raise ValueError(f"--results are the detections on one set: name it with --dataset, of {', '.join(names)}")

        weights = iteration = device = note = None
        if args.results:
            data = resolve_dataset(names[0])
            metrics = {data.name: score_detections(data, read_detections(args.results, data), run)}
            source = args.results
        else:
            check_imports(args, run.info)
            weights = run.weights(args.weights)
            device = hardware("cpu" if run.config.get("MODEL.DEVICE") == "cpu" else None)
            note = averages_note(run, weights)
            if run.engine == "detectron2":
                from fbn_plugin.engine.detectron2.evaluation import evaluate_run

                train_net = Path(__file__).with_name("train_net.py")
                evaluate_run = functools.partial(evaluate_run, train_net=train_net, imports=args.imports)
            else:
                from fbn_plugin.engine.torchvision.evaluation import evaluate_run
            metrics, iteration = evaluate_weights(run, weights, names, evaluate_run)
            source = str(weights) if iteration is None else f"{weights}, {iteration + 1} iterations"
        if output:
            write_evaluation(output, iteration, weights, list(metrics), flat_metrics(metrics), device, args.results)

    for name, figures in metrics.items():
        print(f"\n{name} ({source})\n\n{format_table(metric_rows(figures))}")
    if note:
        print(f"\nnote: {note}")
    if output:
        print(f"\nwritten to {output}")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
