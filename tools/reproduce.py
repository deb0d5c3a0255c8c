"""The tables and figures of the papers: what there is to run, how far it is, and what came out.

    python tools/reproduce.py list
    python tools/reproduce.py run P0.fig8 --scale cpu
    python tools/reproduce.py run P0.fig4 P0.fig8 --scale cpu --jobs 2
    python tools/reproduce.py run all --scale smoke
    python tools/reproduce.py keep P0.fig8 --scale cpu
    python tools/reproduce.py report

Each is a study, see docs/reproducing.md and docs/studies.md: a file in configs/experiments with an ID, at the scales
paper (the printed setting), cpu (hours on two cores) and smoke (seconds). An ID may be written in any way (p0.fig5);
`P0` means all of that paper, `all` all of them. `run` is `tools/study.py run` of each, in output/FILE-SCALE, and goes
on where it was stopped. `keep` puts the figures of a study that has ended into benchmarks/papers, and `report` makes
docs/results of all that is kept there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import stoppable, user_errors

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "configs" / "experiments"
_STOPPED = (130, 143)  # the codes of a run that a signal has ended


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiments", metavar="FOLDER", type=Path, default=EXPERIMENTS, help="of study files (configs/experiments)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | keep | report")
    listing = commands.add_parser("list", help="every id with its scales, how far each is, and the data that it wants")
    listing.add_argument("ids", metavar="ID", nargs="*", default=["all"], help="default: all")
    run = commands.add_parser("run", help="run what is not done")
    keep = commands.add_parser("keep", help="keep the figures of studies that have ended in benchmarks/papers")
    for each in (run, keep):
        each.add_argument("ids", metavar="ID", nargs="+", help="such as P0.fig5, P0 or all")
        each.add_argument(
            "--scale", metavar="NAME", required=True, help="paper, cpu, smoke, or another that `list` shows"
        )
    keep.add_argument(
        "--again",
        action="store_true",
        help="of what is kept already, without its run folders: with the titles, comparisons and claims of today",
    )
    run.add_argument("--jobs", metavar="N", type=int, help="jobs at a time; default: GPUs, or cores")
    run.add_argument("--threads", metavar="N", type=int, default=1, help="threads of a job (1)")
    run.add_argument("--retry", action="store_true", help="try jobs that failed again, too")
    report = commands.add_parser("report", help="make docs/results of what is kept")
    for each in (listing, keep, report):
        each.add_argument("--root", metavar="FOLDER", type=Path, default=ROOT, help="of benchmarks/ and docs/")
    return parser.parse_args(argv)


def show(args: argparse.Namespace) -> int:
    """Print the table of all experiments."""
    with user_errors():
        from fbn_plugin.engine.data.locations import data_root
        from fbn_plugin.engine.studies.catalog import data_text, find_experiments, output_of, progress, read_catalog
        from fbn_plugin.engine.studies.document import Table, markdown
        from fbn_plugin.engine.studies.results_pages import read_kept

        catalog = read_catalog(args.experiments, ROOT)
        if not args.root.is_dir():
            raise FileNotFoundError(f"--root {args.root} is not there")
        kept = read_kept(catalog, args.root)
        chosen = find_experiments(catalog, args.ids)
        scales = list(dict.fromkeys(scale for each in chosen for scale in each.scales))
        rows = [["id", "what", *scales, "data"]]
        for each in chosen:
            states = []
            for scale in scales:
                if scale not in each.scales:
                    states.append("-")
                    continue
                found = progress(each.scales[scale].study, output_of(each, scale))
                is_kept = (each.id, scale) in kept
                states.append("kept" if is_kept and found.untouched else f"{found}{', kept' if is_kept else ''}")
            rows.append([", ".join(each.ids), each.study.title, *states, data_text(each)])
    print(markdown([Table(rows, (0, 1, len(rows[0]) - 1))]))
    print("Kept: figures of the scale lie in benchmarks/papers, and docs/results shows them. Else: jobs done.")
    print(f"Data are looked for here and below $DETECTRON2_DATASETS ({data_root()}).")
    return 0


def run(args: argparse.Namespace) -> int:
    """Run studies one after another; the highest of their exit codes, but a signal ends it at once."""
    import study

    with user_errors():
        from fbn_plugin.engine.studies.catalog import find_experiments, output_of, read_catalog

        catalog = read_catalog(args.experiments, ROOT)
        for name in args.ids:  # of a paper those that have the scale
            named = find_experiments(catalog, [name])
            if not any(args.scale in each.scales for each in named):
                scales = dict.fromkeys(scale for each in named for scale in each.scales)
                raise ValueError(f"{name} has no scale {args.scale!r}; it has {', '.join(scales)}")
        chosen = find_experiments(catalog, args.ids)
        if without := [each.id for each in chosen if args.scale not in each.scales]:
            print(f"without a scale {args.scale}, and left out: {'; '.join(without)}")
        chosen = [each for each in chosen if args.scale in each.scales]
    options = ["--scale", args.scale, "--threads", str(args.threads)]
    options += ["--jobs", str(args.jobs)] if args.jobs is not None else []
    options += ["--retry"] if args.retry else []
    codes = []
    for each in chosen:
        print(each.scales[args.scale].study.heading, flush=True)
        try:
            codes.append(study.main(["run", str(each.path), *options]))
        except SystemExit as stop:
            if stop.code in _STOPPED:
                raise
            codes.append(stop.code if isinstance(stop.code, int) else 1)
        if not codes[-1]:
            file, output = os.path.relpath(each.path), output_of(each, args.scale)
            print(f"figures lie in {output}; their report: python tools/study.py report {file} --scale {args.scale}")
    if len(codes) > 1:
        print(f"{codes.count(0)} of {len(codes)} experiments are done")
    return max(codes, default=0)


def keep(args: argparse.Namespace) -> int:
    """Keep the figures of studies."""
    with user_errors():
        from fbn_plugin.engine.studies.catalog import find_experiments, output_of, read_catalog
        from fbn_plugin.engine.studies.jobs import all_jobs, check_settings
        from fbn_plugin.engine.studies.kept import keep_again, keep_study, kept_file
        from fbn_plugin.engine.studies.running import outcomes_of
        from fbn_plugin.engine.studies.study_file import read_study

        for each in find_experiments(read_catalog(args.experiments, ROOT), args.ids):
            file, output = read_study(each.path, ROOT, scale=args.scale), output_of(each, args.scale)
            target = kept_file(args.root, each.path, args.scale)
            if args.again:
                keep_again(file.study, target)
            else:
                check_settings(file, all_jobs(file, output))
                keep_study(file.study, outcomes_of(file, output), target)
            print(f"{each.id}: kept in {target}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Make the pages."""
    with user_errors():
        from fbn_plugin.engine.studies.catalog import read_catalog
        from fbn_plugin.engine.studies.kept import KEPT
        from fbn_plugin.engine.studies.results_pages import read_kept, strays, write_results

        catalog = read_catalog(args.experiments, ROOT)
        if not (args.root / KEPT).is_dir():  # all pages would say that nothing was run
            raise FileNotFoundError(f"--root {args.root} has no {KEPT.as_posix()}, where figures are kept")
        folder = args.root / "docs" / "results"
        kept = read_kept(catalog, args.root)
        files = write_results(catalog, kept, folder)
    print(f"{len(files)} files written to {folder}")
    if left := strays(args.root, {each.name for each in kept.values()}):
        print(f"warning: of no study and scale in {args.experiments}, and left out: {', '.join(left)}")
    return 0


@stoppable()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    return {"list": show, "run": run, "keep": keep, "report": report}[args.command](args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
