"""How far a network's activations go: bands of every layer over a set of images, and the images that pass some
deviations in a kernel (figures 1 to 3 and S1 to S6 of "Filtered batch normalization").

    python tools/analyze_activations.py --model timm:vgg16_bn --pretrained --images imagenet/val --output out
    python tools/analyze_activations.py --model runs/fbn --kernel features.conv5_3.norm:453 --output out
    python tools/analyze_activations.py --model torchvision:maskrcnn_resnet50_fpn --weights mask_rcnn.pth \\
        --images coco_2017_val --max-images 200 --output out
    python tools/analyze_activations.py --model configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml \\
        --weights model_final.pth --images photos --output out

Norms are measured before scale and shift, in evaluation; layers without a norm are normalized by mean and deviation of
each of their units over the images, and marked. Into the folder --output go `activations.json`, `bands.png` and a
picture of each --kernel. Without weights the network is untrained, and that is said. Runs in one process.
"""

import argparse
import math
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
    stoppable,
    user_errors,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        metavar="MODEL",
        required=True,
        help="timm:NAME, torchvision:NAME, a config file of a classifier or of detectron2, or a run folder",
    )
    parser.add_argument("--weights", metavar="FILE", default="", help="checkpoint; of a run: default its last one")
    parser.add_argument("--pretrained", action="store_true", help="timm's or torchvision's own weights")
    parser.add_argument("--num-classes", type=int, default=0, metavar="N", help="of weights for timm: or torchvision:")
    parser.add_argument(
        "--images",
        metavar="IMAGES",
        help="a folder, a tar archive, NAME:ROOT of a classification set, or a set in COCO's format; default: a run's "
        "validation images",
    )
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="so many, spread over the set; 0: all")
    parser.add_argument("--image-size", type=int, default=0, metavar="N", help="pixels that a classifier sees")
    parser.add_argument("--batch-size", type=int, default=0, metavar="N", help="default: 32, of detectors 1")
    parser.add_argument("--layers", metavar="PATTERN", nargs="+", default=[], help="only these, such as 'layer4.*'")
    parser.add_argument(
        "--sigmas", metavar="K", type=float, nargs="+", default=[3.0, 5.0, 7.0, 10.0, 15.0], help="count beyond these"
    )
    parser.add_argument("--t-sigma", metavar="K", type=float, default=14.0, help="images pass beyond it; default 14")
    parser.add_argument(
        "--kernel", metavar="LAYER:INDEX", action="append", default=[], help="density and gallery; may be repeated"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that load images")
    parser.add_argument(
        "--opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, default=[], help="config overrides; come last"
    )
    add_import(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError for arguments that are out of range or do not go together."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file, not a folder")
    for name in ("num_classes", "max_images", "image_size", "batch_size", "workers"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")
    for flag, values in (("--sigmas", args.sigmas), ("--t-sigma", [args.t_sigma])):
        if wrong := [value for value in values if not 0 < value < math.inf]:
            raise ValueError(f"{flag} must be above 0, got {wrong[0]}")
    if args.pretrained and args.weights:
        raise ValueError("--pretrained and --weights both name weights: give one of them")
    if not args.images and not Path(args.model).is_dir():
        raise ValueError("--images is needed: only a run folder has images of its own")


def kernel_of(text: str):
    """A layer and one of its units, from ``LAYER:INDEX`` or ``LAYER[INDEX]``; ValueError where it is neither."""
    from fbn_plugin.analysis.layer_names import parse_layer_name

    layer, colon, index = text.rpartition(":")
    found = parse_layer_name(f"{layer}[{index}]" if colon and index.isdecimal() else text)
    if found.unit is None or found.side:
        raise ValueError(f"--kernel must be LAYER:INDEX, got {text!r}")
    return found


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; return the main figures."""
    args = parse_args(argv)
    with user_errors():
        check_args(args)
        import_modules(args.imports)
        import torch

        from fbn_plugin.engine.inspection.activation_run import bands_of, layer_rows
        from fbn_plugin.engine.inspection.image_sources import find_images, spread
        from fbn_plugin.engine.inspection.model_sources import ModelOptions, find_model
        from fbn_plugin.engine.run.activation_files import band_figures, kernel_sentence, write_activations

        kernels = [kernel_of(text) for text in args.kernel]
        options = ModelOptions(args.weights, args.pretrained, args.num_classes, args.image_size, args.opts)
        found = find_model(args.model, options, wants_images=not args.images)
        images, dataset = find_images(args.images, found.mode) if args.images else (found.images, found.dataset)
        if images is None:
            raise ValueError(f"{args.model} has no images of its own: name some by --images")
        images = spread(images, args.max_images)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        batch_size = args.batch_size or (1 if found.forward else 32)
    with user_errors(ValueError, *RUN_ERRORS):
        measured = {"layers": args.layers, "sigmas": sorted({*args.sigmas, args.t_sigma}), "kernels": kernels}
        bands = bands_of(found, images, device, batch_size=batch_size, workers=args.workers, **measured)
        command = shlex.join(["python", "tools/analyze_activations.py", *(sys.argv[1:] if argv is None else argv)])
        trained = "" if found.weights else ", random weights"
        files = write_activations(
            args.output,
            bands,
            model=found.title,
            weights=found.weights,
            images=dataset,
            device=device,
            title=f"{found.title}{trained}: {bands.images:,} images of {dataset}",
            sigma=args.t_sigma,
            image_of=lambda number: (images.name_of(number), images[number][0]),
            command=command,
            details={"notes": found.notes},
        )
    print(f"{found.title} on {bands.images:,} images of {dataset}; weights: {found.weights or 'none'}\n")
    rows = layer_rows(bands, args.t_sigma)
    print(f"{format_table(rows)}\n")
    if any("*" in cell for row in rows for cell in row):
        print("* no norm: each unit is normalized by its mean and deviation over the images")
    if found.weights is None:
        print("note: the network is untrained, its weights are random: --weights or --pretrained gives it others")
    odd = [layer.name for layer in bands.layers if layer.nan or layer.infinite]
    notes = [*found.notes, *([f"there is NaN or infinity in {', '.join(odd)}"] if odd else [])]
    if bands.unreached:
        notes.append(f"no image reaches {', '.join(bands.unreached)}")
    for note in notes:
        print(f"note: {note}")
    for kernel in bands.kernels:
        print(kernel_sentence(kernel, args.t_sigma))
    print(f"\nwritten to {', '.join(map(str, files))}")
    return band_figures(bands)


if __name__ == "__main__":
    main(sys.argv[1:])
