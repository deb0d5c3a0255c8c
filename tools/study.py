"""Studies: variants of a config times seeds from one file, run as independent jobs, with the statistics done.

    python tools/study.py run configs/experiments/digits.yaml --jobs 2
    python tools/study.py status configs/experiments/digits.yaml
    python tools/study.py report configs/experiments/digits.yaml
    python tools/study.py run configs/experiments/p0_fig5.yaml --scale cpu
    python tools/study.py report --from output/digits/report/study.json --to output/digits/again
    python tools/study.py report --from benchmarks/digits.json --markdown docs/digits.md
    python tools/study.py run configs/experiments/digits.yaml --executor slurm --executor-option slurm_partition=gpu

The file names a base config, variants, seeds, and what is compared with what: see docs/studies.md. Each job trains in
a folder of its own below --output (output/NAME OF THE FILE by default, with the scale behind it). `run` goes on where
it was stopped: what is done is not run again, and a job that was stopped continues from its checkpoint. It ends with 1
where a job failed.
`report` writes study.json, from which alone it can be written again, Markdown, HTML and plots.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import RUN_ERRORS, add_import, import_modules, stoppable, user_errors
from fbn_plugin.engine.studies.scales import folder_name

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the default of ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | status | report")
    run = commands.add_parser("run", help="run the jobs that are not done")
    status = commands.add_parser("status", help="say how far the study is")
    for each in (run, status):
        each.add_argument("file", metavar="FILE", type=Path, help="the study file")
        each.add_argument("--output", metavar="FOLDER", type=Path, help="default: output/NAME OF THE FILE[-SCALE]")
        each.add_argument("--jobs", metavar="N", type=int, help="jobs at a time; default: GPUs, or cores / --threads")
        each.add_argument("--threads", metavar="N", type=int, default=1, help="threads of a job (1)")
    run.add_argument("--retry", action="store_true", help="try jobs that failed again, too")
    run.add_argument(
        "--start",
        choices=("fork", "new"),
        help="how a job becomes a process: forked from one that has imported everything (default on Linux without "
        "GPUs), or started anew",
    )
    run.add_argument(
        "--executor", choices=("slurm", "local", "debug"), help="submit the jobs by submitit, not start them here"
    )
    run.add_argument(
        "--executor-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="of submitit's update_parameters, such as slurm_partition=gpu or timeout_min=240; may be repeated",
    )
    report = commands.add_parser("report", help="write tables, tests and plots")
    add_report_arguments(report)
    for each in (run, status, report):
        each.add_argument("--scale", metavar="NAME", help="of the study file, where it has SCALES: paper, cpu, smoke")
        add_import(each)
    args = parser.parse_args(argv)
    if args.command == "report":
        if (args.file is None) == (not args.sources):
            parser.error("report wants a study file, or --from with a study.json")
        if args.markdown and (args.file or args.to):
            parser.error("--markdown makes a page of what --from names: it goes with neither a study file nor --to")
        if args.scale and args.sources:
            parser.error("--scale is of a study file, and --from names none")
        if len(args.sources) > 1 and not args.markdown:
            parser.error("several --from make one page, which --markdown names")
        if args.sources and args.sources[0].name != "study.json" and not (args.to or args.markdown):
            parser.error(f"a report of --from {args.sources[0]} wants a folder, named by --to")
    if args.file is not None:
        args.output = args.output or Path("output", folder_name(args.file, args.scale))
    return args


def add_report_arguments(report: argparse.ArgumentParser) -> None:
    """What ``report`` takes, but for what all commands do."""
    report.add_argument("file", metavar="FILE", type=Path, nargs="?", help="the study file")
    report.add_argument(
        "--output", metavar="FOLDER", type=Path, help="of the study; default: output/NAME OF THE FILE[-SCALE]"
    )
    report.add_argument(
        "--from",
        dest="sources",
        metavar="JSON",
        type=Path,
        action="append",
        default=[],
        help="a study.json, in place of FILE; with --markdown there may be several",
    )
    report.add_argument(
        "--markdown", metavar="PAGE", type=Path, help="write one short page of what --from names, with SVG beside it"
    )
    report.add_argument("--title", metavar="TEXT", help="of that page; default: that of the first study")
    report.add_argument(
        "--to",
        metavar="FOLDER",
        type=Path,
        help="of the report; default: report in that of the study, or that of a study.json",
    )


def read_options(given: Sequence[str]) -> dict[str, object]:
    """``KEY=VALUE`` pairs; ValueError where one is none."""
    from fbn_plugin.engine.files.literals import literal

    options = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--executor-option must be KEY=VALUE, got {pair!r}")
        options[key] = literal(value)
    return options


def run(args: argparse.Namespace) -> int:
    """Run what is not done; the exit code."""
    with user_errors():
        from fbn_plugin.engine.studies.cluster import run_on_cluster
        from fbn_plugin.engine.studies.running import resources, run_study
        from fbn_plugin.engine.studies.study_file import read_study

        import_modules(args.imports)
        study = read_study(args.file, ROOT, args.imports, args.scale)
        shared = resources(study, args.jobs, args.threads)
        options = read_options(args.executor_option)
        script = ROOT / "tools" / study.engine.script
    with user_errors(*RUN_ERRORS, ValueError):
        if args.executor:
            outcomes = run_on_cluster(study, args.output, script, shared, args.executor, options, args.retry, say)
        else:
            forks = {"fork": True, "new": False}.get(args.start)
            outcomes = run_study(study, args.output, script, shared, args.retry, forks, say)
    states = [each.state for each in outcomes]
    failed = states.count("failed")
    rest = f", {failed} failed: see status; run --retry tries them again" if failed else ""
    print(f"{states.count('done')} of {len(states)} jobs done{rest}")
    return int(states.count("done") < len(states))


def say(line: str) -> None:
    """Print a line at once, as whoever waits for hours reads it."""
    print(line, flush=True)


def status(args: argparse.Namespace) -> int:
    """Print how far the study is."""
    with user_errors():
        from fbn_plugin.engine.studies.running import outcomes_of, resources
        from fbn_plugin.engine.studies.status import status_text
        from fbn_plugin.engine.studies.study_file import read_study

        import_modules(args.imports)
        study = read_study(args.file, ROOT, args.imports, args.scale)
        shared = resources(study, args.jobs, args.threads)
        text = status_text(study.study, outcomes_of(study, args.output), shared.at_once)
    print(text)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report."""
    with user_errors():
        from fbn_plugin.engine.studies.outcomes import read_outcomes
        from fbn_plugin.engine.studies.report import write_docs, write_report
        from fbn_plugin.engine.studies.running import outcomes_of
        from fbn_plugin.engine.studies.study_file import read_study

        if args.markdown:
            write_docs(args.sources, args.markdown, args.title)
            print(f"written to {args.markdown}")
            return 0
        if args.sources:
            study, outcomes = read_outcomes(args.sources[0])
            folder = args.to or args.sources[0].parent
        else:
            import_modules(args.imports)
            file = read_study(args.file, ROOT, args.imports, args.scale)
            study, outcomes = file.study, outcomes_of(file, args.output)
            folder = args.to or args.output / "report"
        write_report(study, outcomes, folder)
    print(f"written to {folder}")
    return 0


@stoppable()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    return {"run": run, "status": status, "report": report}[args.command](args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
