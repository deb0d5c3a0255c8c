"""The main job in one command: train a small Mask R-CNN at two images a batch with BN and with FBN, and compare them.

Makes a COCO-format set from scikit-learn's digits and photographs (or takes one of yours), runs
``tools/train_detection.py`` with two configs that differ in the norm alone, prints a table of average precisions, and
writes a report with curves and detections. Called again, it goes on where it was interrupted; on other data or with
other settings it wants another folder.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.files.disk import writing
from fbn_plugin.engine.run.cli import add_import, format_table, stoppable, user_errors
from fbn_plugin.engine.run.stopping import Terminated

ROOT = Path(__file__).resolve().parents[1]
NORMS = ("BN", "FBN")

# For photographs, which are larger than the digits' and may be mirrored.
OWN_DATA = (
    *("INPUT.MIN_SIZE_TRAIN", "256", "INPUT.MAX_SIZE_TRAIN", "427"),
    *("INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "427"),
    *("INPUT.RANDOM_FLIP", "horizontal"),
)


def parse_args(args=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for data, runs and report")
    parser.add_argument(
        "--data", help="a COCO-format folder with train and val annotations; default: digits on photographs"
    )
    add_import(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="config overrides for both runs, such as SOLVER.MAX_ITER 100"
    )
    return parser.parse_args(args)


def remember_data(output: Path, files: Sequence[Path]) -> None:
    """Note which annotations the runs in ``output`` are on; ValueError where those before were on others."""
    from fbn_plugin.engine.files.disk import atomic_write

    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    note = output / "annotations.sha256"
    if not note.exists():
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        atomic_write(note, f"{digest}\n".encode())
    elif note.read_text().strip() != digest:
        raise ValueError(f"{output} holds a run on other data; choose another --output or remove it")


def end(processes: Iterable[subprocess.Popen], number: signal.Signals) -> None:
    """Send a signal, and kill what has not ended after half a minute."""
    for process in processes:
        process.send_signal(number)
    last = time.monotonic() + 30
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, last - time.monotonic()))
        process.kill()
        process.wait()


def run_side_by_side(tools: dict[str, list[str]]) -> None:
    """Run the commands at the same time on equal shares of the cores, what each prints behind its name.

    These layers are so small that a second thread for one run brings less than a second run. If one fails the others
    are stopped, and the demo ends with its message and exit code.
    """
    threads = str(max(1, (os.cpu_count() or 1) // len(tools)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen(command, env=environment, **pipes) for name, command in tools.items()}
    errors: dict[str, list[str]] = {name: [] for name in tools}

    def show(name: str) -> None:
        for line in running[name].stdout:
            print(f"{name:>4} | {line}", end="", flush=True)

    readers = [threading.Thread(target=show, args=(name,), daemon=True) for name in running]
    readers += [
        threading.Thread(target=errors[name].extend, args=(p.stderr,), daemon=True) for name, p in running.items()
    ]
    for reader in readers:
        reader.start()
    failed = None
    try:
        while failed is None and any(process.poll() is None for process in running.values()):
            time.sleep(0.2)
            failed = next((name for name, process in running.items() if process.poll()), None)
    except KeyboardInterrupt as stop:
        end(running.values(), signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
        raise
    failed = failed or next((name for name, process in running.items() if process.poll()), None)
    if failed:
        end(running.values(), signal.SIGTERM)
    for reader in readers:
        reader.join()
    if failed:
        sys.stderr.writelines(errors[failed])
        raise SystemExit(running[failed].returncode)


@stoppable()
def main(args=None) -> None:
    args = parse_args(args)
    with user_errors():
        name = os.path.basename(os.path.realpath(args.data)) if args.data else "digits_on_photos"
        output = args.output / name
        from fbn_plugin.engine.data.demo_data import make_digits_on_photos
        from fbn_plugin.engine.data.named_sets import resolve_dataset
        from fbn_plugin.engine.reports.report import ap_table, write_report

        folder = args.data or make_digits_on_photos(output / "data")
        train, val = (resolve_dataset(f"{folder}:{split}") for split in ("train", "val"))
        remember_data(output, [train.json_file, val.json_file])
        overrides = ["DATASETS.TRAIN", train.name, "DATASETS.TEST", val.name]
    if args.data:
        overrides += ["MODEL.ROI_HEADS.NUM_CLASSES", str(len(train.class_names)), *OWN_DATA]

    commands, runs, tools = [], {}, {}
    for norm in NORMS:
        runs[norm] = output / norm
        config = f"configs/Demo/mask_rcnn_R_18_FPN_{norm}.yaml"
        modules = [part for module in args.imports for part in ("--import", module)]
        arguments = [*modules, "--resume", *overrides, "OUTPUT_DIR", str(runs[norm]), *args.overrides]
        commands.append(shlex.join(["python", "tools/train_detection.py", "--config-file", config, *arguments]))
        print(f"\n$ {commands[-1]}", flush=True)
        tool = [sys.executable, str(ROOT / "tools" / "train_detection.py"), "--config-file", str(ROOT / config)]
        tools[norm] = [*tool, *arguments]
    run_side_by_side(tools)

    with user_errors():
        table = format_table(ap_table(runs))
    print(f"\nAverage precision on the validation images, in percent:\n\n{table}")
    facts = [
        "Mask R-CNN with a ResNet-18 FPN, trained from scratch at two images a batch. The two runs have the same seed "
        f"and differ in the norm alone. {len(train.images)} training images, {len(val.images)} validation images.",
        "This is a demonstration at reduced size, one run each: it shows that both train, not which is better.",
    ]
    report = output / "report.html"
    with user_errors():
        write_report(report, f"BN and FBN on {name}", facts, val, runs, commands)
    print(f"\nCurves and detections: {report}")


if __name__ == "__main__":
    main()
