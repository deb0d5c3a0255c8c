"""Time filtered batch normalization against native BatchNorm: layers, and training steps of whole models.

    python tools/benchmark.py --output benchmark.json --plot benchmark.png
    python tools/benchmark.py --models resnet50 --seconds-per-row 300
    python tools/benchmark.py --targets --device cuda --output benchmarks/gpu.json --plot benchmarks/gpu.png
    python tools/benchmark.py --from benchmark.json --plot benchmark.png

Prints tables in Markdown: medians, quartiles and ratios of peers that take turns in one run, and what of the targets is
met. Without --layers and --models it does both. The output file is rewritten after each row, so an interrupted run
keeps what it has.

--targets measures all that the targets of a GPU ask for, within --minutes (7.5), compilation included: first whether
the kernels are right, then steps, layers, the host, the first step and compiled steps. What fails is a note, and what
the time does not suffice for is skipped, the least important rows first. --from without a file prints the targets.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import add_import, import_modules, stoppable, user_errors


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.lower().split("x")))
    except ValueError:
        raise ValueError(f"a shape must be N x C x H x W, such as 16x64x56x56, got {text!r}") from None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="time single layers")
    parser.add_argument("--norms", nargs="+", metavar="SPEC", help="time these norms among the layers too")
    models = "vgg16 resnet50 mask_rcnn_R_50_FPN (without NAME these), mask_rcnn_X_101_32x8d_FPN"
    parser.add_argument("--models", nargs="*", metavar="NAME", help=f"time models: {models}")
    parser.add_argument("--shapes", nargs="+", metavar="NxCxHxW", help="of the layers' inputs")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="contiguous, channels_last")
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", help="float32, float16, bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU; default: PyTorch's choice")
    parser.add_argument("--seconds-per-row", type=float, metavar="S", help="default: 5 for layers, 60 for models")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of the models; default: each model's own")
    parser.add_argument("--compile", action="store_true", help="time the naive form under torch.compile too")
    parser.add_argument("--targets", action="store_true", help="measure what the targets ask for")
    parser.add_argument("--minutes", type=float, metavar="M", help="all rows share them; default: 7.5 with --targets")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that everything runs")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results")
    parser.add_argument(
        "--from", dest="source", type=Path, nargs="*", metavar="FILE.json", help="show these, measure nothing"
    )
    add_import(parser)
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.source is not None and (idle := given - {"source", "plot", "imports"}):
        raise ValueError(f"--from measures nothing, so --{min(idle).replace('_', '-')} has no meaning with it")
    chosen = given & {"layers", "norms", "models", "shapes", "layouts", "dtypes", "batch_size", "compile"}
    if args.targets and chosen:
        raise ValueError(
            f"--targets says what is measured, so --{min(chosen).replace('_', '-')} has no meaning with it"
        )
    if args.source is not None and len(args.source) != 1 and args.plot is not None:
        raise ValueError(f"--plot draws one file, --from gives {len(args.source)}")
    return args


@stoppable()
def main(argv: Sequence[str] | None = None) -> dict | list[dict]:
    """Run the command line; return the results, those of ``--from`` as a list."""
    with user_errors():
        args = parse_args(argv)
        import_modules(args.imports)

        from fbn_plugin.engine import benchmark
        from fbn_plugin.engine.files.disk import WriteError, atomic_write

        for path, suffix in ((args.output, ".json"), (args.plot, ".png")):
            if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path}: a file ending in {suffix} in a folder that exists is needed")
        if args.source is None:
            settings = _settings(args)
        else:
            files = [benchmark.load(path) for path in args.source]
    if args.source is None:

        def on_row(results: dict, name: str, measured) -> None:
            print(_progress(name, measured), file=sys.stderr, flush=True)
            if args.output is not None:
                atomic_write(args.output, (json.dumps(results, indent=1) + "\n").encode())

        with user_errors(WriteError):
            files = [benchmark.run(settings, on_row)]
    print(benchmark.markdown(*files))
    if args.plot is not None:
        with user_errors():
            atomic_write(args.plot, benchmark.plot(files[0]))
    return files[0] if args.source is None else files


def _settings(args: argparse.Namespace):
    from fbn_plugin.engine import benchmark

    both = not args.layers and args.models is None
    models = benchmark.DEFAULT_MODELS if both or args.models == [] else tuple(args.models or ())
    return benchmark.Settings(
        device=args.device,
        threads=args.threads,
        layers=args.layers or both,
        norms=tuple(args.norms or ()),
        models=models,
        shapes=None if args.shapes is None else tuple(map(_shape, args.shapes)),
        layouts=args.layouts,
        dtypes=args.dtypes,
        seconds_per_row=args.seconds_per_row,
        batch_size=args.batch_size,
        compiled=args.compile,
        quick=args.quick,
        targets=args.targets,
        minutes=7.5 if args.targets and args.minutes is None else args.minutes,
    )


def _progress(name: str, measured) -> str:
    peers = [peer for row in measured.rows for peer in row.get("peers", {}).items()]
    ratios = ", ".join(f"{peer} {found['ratio'][1]:.3g}" for peer, found in peers if peer != found["to"])
    lines = [f"{name} ({measured.seconds:.1f} s){': ' if ratios else ''}{ratios}"]
    return "\n".join([*lines, *(f"  {note}" for note in measured.notes)])


if __name__ == "__main__":
    main(sys.argv[1:])
