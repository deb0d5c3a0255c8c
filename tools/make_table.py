"""Table I of "Filtered Batch Normalization" from run folders: AP and AP50 of masks and boxes after 50k, 100k, 150k and
270k iterations at two images a batch, the paper's printed figures in parentheses.

    python tools/make_table.py                                  # the paper's figures alone
    python tools/make_table.py runs/bn runs/fbn --output table.md
    python tools/make_table.py runs/bn-seed* runs/fbn-seed* --all-metrics --json table.json
    python tools/make_table.py runs/* --label "FBN everywhere=runs/fbn-heads"

RUN_DIR is the OUTPUT_DIR of tools/train_net.py (detectron2), tools/train_detection.py (torchvision) or
tools/train_classification.py, with any norm: of a training, or of an --eval-only into a folder of its own.
Every evaluation of the runs is a row; on COCO 2017 the paper's are, too, run or not.
Runs of the same norm become one column, mean ± standard deviation over their seeds; every framework and data set has a
table of its own. Below each stands what was run, in which settings the runs differ, and how far they can be compared.
Classification runs have tables of top-1, top-5 and loss, a norm and setting a row.
"""

import argparse
import json
import os
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


def read_labels(given: Sequence[str], folders: Sequence[Path]) -> dict[Path, str]:
    """``LABEL=RUN_DIR`` pairs as folder -> label; ValueError where a folder is none of the runs."""
    labels = {}
    for pair in given:
        label, _, folder = pair.rpartition("=")
        if not label or not folder:
            raise ValueError(f"--label must be LABEL=RUN_DIR, got {pair!r}")
        if Path(folder) not in folders:
            raise ValueError(f"--label {pair!r}: {folder} is none of the run folders given")
        labels[Path(folder)] = label
    return labels


def detector_tables(
    folders: Sequence[Path], labels: Mapping[Path, str], all_metrics: bool
) -> tuple[str, dict[str, Any]]:
    """Text and plain data of the tables of detection runs; of none, the paper's."""
    from fbn_plugin.engine.reports.table import PAPER_SOURCE, build_tables, paper_table
    from fbn_plugin.engine.run.run_folder import read_run

    tables = build_tables([read_run(folder) for folder in folders], labels) or [paper_table()]
    lines = []
    for table in tables:
        title = " and ".join(table.train_sets)
        lines += [f"## {title} → {table.test_set}, {table.engine}" if table.engine else "## COCO", ""]
        lines += [format_table(table.rows()), ""]
        if all_metrics and table.engine:
            lines += ["At the last evaluation:", "", format_table(table.all_metrics()), ""]
        lines += [*(f"- {note}" for note in table.notes()), ""]
    text = "\n".join([*lines, f"AP in percent. The paper: {PAPER_SOURCE}."])
    return text, {"paper": PAPER_SOURCE, "tables": [table.as_json() for table in tables]}


def classifier_tables(folders: Sequence[Path], labels: Mapping[Path, str]) -> tuple[str, list[dict[str, Any]]]:
    """Text and plain data of the tables of classification runs."""
    from fbn_plugin.engine.classification.run_folder import read_classification_run
    from fbn_plugin.engine.reports.classification_table import build_classification_tables

    tables = build_classification_tables([read_classification_run(folder) for folder in folders], labels)
    lines = []
    for table in tables:
        lines += [f"## {table.title}", "", format_table(table.rows()), ""]
        lines += [*(f"- {note}" for note in table.notes()), ""]
    return "\n".join(lines), [table.as_json() for table in tables]


@stoppable()
def main(argv: Sequence[str] | None = None) -> str:
    """Run the command line; return the text that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="*", type=Path, help="a run's OUTPUT_DIR")
    parser.add_argument(
        "--label",
        metavar="LABEL=RUN_DIR",
        action="append",
        default=[],
        help="put a run into the column LABEL, not that of its norm; may be repeated",
    )
    parser.add_argument("--all-metrics", action="store_true", help="add the six APs at the last evaluation")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the tables as Markdown, too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON, too")
    add_import(parser)
    args = parser.parse_args(argv)
    with user_errors():
        check_outputs(args.output, args.json)
        import_modules(args.imports)
        from fbn_plugin.engine.files.disk import atomic_write
        from fbn_plugin.engine.run.run_folder import is_classification

        resolved = [os.path.realpath(folder) for folder in args.run_dirs]
        for folder in args.run_dirs:
            if resolved.count(os.path.realpath(folder)) > 1:
                raise ValueError(f"run folder {folder} is given more than once")
        labels = read_labels(args.label, args.run_dirs)
        classifiers = [folder for folder in args.run_dirs if is_classification(folder)]
        detectors = [folder for folder in args.run_dirs if folder not in classifiers]
        text, tables = classifier_tables(classifiers, labels) if classifiers else ("", [])
        content: dict[str, Any] = {"tables": tables}
        if detectors or not classifiers:
            more, content = detector_tables(detectors, labels, args.all_metrics)
            text, content["tables"] = text + more, [*tables, *content["tables"]]
        if args.output:
            atomic_write(args.output, (text + "\n").encode())
        if args.json:
            atomic_write(args.json, (json.dumps(content, indent=2) + "\n").encode())
    print(text)
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
