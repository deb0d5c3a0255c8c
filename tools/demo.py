"""The main job in one command: train a small Mask R-CNN at two images a batch with BN and with FBN, and compare them.

Makes a COCO-format set from scikit-learn's digits and photographs (or takes one of yours), runs
``tools/train_detection.py`` with two configs that differ in the norm alone, prints a table of average precisions, and
writes a report with curves and detections.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from fbn_plugin.engine.cli import user_errors
from fbn_plugin.engine.coco_data import resolve_dataset
from fbn_plugin.engine.demo_data import make_digits_on_photos
from fbn_plugin.engine.report import ap_table, format_table, write_report

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("BN", "FBN")


def parse_args(args=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for data, runs and report")
    parser.add_argument(
        "--data", help="a COCO-format folder with train and val annotations; default: digits on photographs"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="config overrides for both runs, such as SOLVER.MAX_ITER 100"
    )
    return parser.parse_args(args)


def own_data_overrides(data: Path) -> tuple[list[str], str]:
    """Overrides that put a folder of one's own in the place of the digits, and the name of its validation set.

    Raises:
        FileNotFoundError, ValueError: the folder has no train or val annotations, or they are wrong.
    """
    train, val = (f"{data.resolve()}:{split}" for split in ("train", "val"))
    classes = len(resolve_dataset(train).class_names)
    resolve_dataset(val)
    overrides = [
        *("DATASETS.TRAIN", f"('{train}',)"),
        *("DATASETS.TEST", f"('{val}',)"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", str(classes)),
        *("INPUT.MIN_SIZE_TRAIN", "(256,)"),
        *("INPUT.MAX_SIZE_TRAIN", "427"),
        *("INPUT.MIN_SIZE_TEST", "256"),
        *("INPUT.MAX_SIZE_TEST", "427"),
        *("INPUT.RANDOM_FLIP", "horizontal"),
    ]
    return overrides, val


def main(args=None) -> None:
    args = parse_args(args)
    with user_errors():
        if args.data:
            overrides, val_name = own_data_overrides(Path(args.data))
            title = f"BN and FBN on {Path(args.data).resolve().name}"
        else:
            folder = make_digits_on_photos(args.output / "digits_on_photos").resolve()
            overrides = ["DATASETS.TRAIN", f"('{folder}:train',)", "DATASETS.TEST", f"('{folder}:val',)"]
            val_name = f"{folder}:val"
            title = "BN and FBN on handwritten digits"

    commands, runs = [], {}
    for norm in NORMS:
        runs[norm] = args.output / norm
        config = ROOT / "configs" / "Demo" / f"mask_rcnn_R_18_FPN_{norm}.yaml"
        command = [sys.executable, str(ROOT / "tools" / "train_detection.py"), "--config-file", str(config)]
        command += [*overrides, "OUTPUT_DIR", str(runs[norm]), *args.overrides]
        commands.append(shlex.join(["python", "tools/train_detection.py", "--config-file", *command[3:]]))
        commands[-1] = commands[-1].replace(f"{ROOT}/", "")
        print(f"\n$ {commands[-1]}", flush=True)
        status = subprocess.run(command).returncode
        if status:
            raise SystemExit(status)

    print("\nAverage precision on the validation images, in percent:\n")
    print(format_table(ap_table(runs)))
    facts = [
        "Mask R-CNN with a ResNet-18 FPN, trained from scratch at two images a batch. The two runs have the same seed "
        "and differ in the norm alone.",
        "This is a demonstration at reduced size, one run each: it shows that both train, not which is better.",
    ]
    report = args.output / "report.html"
    write_report(report, title, facts, resolve_dataset(val_name), runs, commands)
    print(f"\nCurves and detections: {report}")


if __name__ == "__main__":
    main()
