"""Draw ground truth beside what one run or several detected: boxes, masks, class names, scores.

    python tools/visualize_predictions.py runs/fbn
    python tools/visualize_predictions.py runs/bn runs/fbn --num-images 12 --threshold 0.7 --output bn_fbn.png
    python tools/visualize_predictions.py runs/fbn --images 000000000139.jpg 000000000285.jpg

RUN_DIR is the OUTPUT_DIR of tools/train_net.py (detectron2) or tools/train_detection.py (torchvision); the detections
are those of its last evaluation, inference/coco_instances_results.json. The images are spread evenly over the data set.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.cli import add_import, check_outputs, import_modules, stoppable, user_errors

MOST_IMAGES = 100


@stoppable()
def main(argv: Sequence[str] | None = None) -> Path:
    """Run the command line; return the picture's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="a run's OUTPUT_DIR")
    parser.add_argument("--dataset", metavar="NAME", help="one of DATASETS.TEST, needed where there are several")
    parser.add_argument("--num-images", type=int, default=6, metavar="N", help=f"1 to {MOST_IMAGES} (default: 6)")
    parser.add_argument("--images", metavar="FILE", nargs="+", help="names or ids of the images to draw")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score that is drawn (default: 0.5)")
    parser.add_argument("--output", metavar="FILE.png", type=Path, help="default: predictions.png in the first RUN_DIR")
    add_import(parser)
    args = parser.parse_args(argv)
    output = args.output or args.run_dirs[0] / "predictions.png"
    with user_errors():
        check_outputs(output)
        if output.suffix.lower() != ".png":
            raise ValueError(f"--output must end in .png, the one format that is written, got {str(output)!r}")
        if not 1 <= args.num_images <= MOST_IMAGES:
            raise ValueError(f"--num-images must be from 1 to {MOST_IMAGES}, got {args.num_images}")
        if not 0 <= args.threshold <= 1:
            raise ValueError(f"--threshold must be from 0 to 1, got {args.threshold}")
        import_modules(args.imports)

        from fbn_plugin.engine.data.named_sets import resolve_dataset
        from fbn_plugin.engine.files.disk import atomic_write
        from fbn_plugin.engine.reports.evaluation import read_detections
        from fbn_plugin.engine.reports.pictures import draw_detections, find_images, spread_images
        from fbn_plugin.engine.run.run_folder import read_run, run_titles

        runs = [read_run(folder) for folder in args.run_dirs]
        names = [args.dataset] if args.dataset else runs[0].test_sets
        if len(names) != 1:
            raise ValueError(f"name one data set with --dataset, of {', '.join(names) or 'none in DATASETS.TEST'}")
        data = resolve_dataset(names[0])
        images = find_images(data, args.images) if args.images else spread_images(data, args.num_images)
        detections = {
            title: read_detections(run.detections(data.name), data) for title, run in zip(run_titles(runs), runs)
        }
        atomic_write(output, draw_detections(data, detections, images, args.threshold))
    what = f"{counted(len(images), 'image')} of {data.name}"
    print(f"{what}, detections of score {args.threshold:.0%} and above: {output}")
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
