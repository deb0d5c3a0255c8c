"""Studies: variants of a config times seeds from one file, run as independent jobs, with the statistics done.

    python tools/study.py run configs/studies/digits.yaml --jobs 2
    python tools/study.py status configs/studies/digits.yaml
    python tools/study.py report configs/studies/digits.yaml

The file names a base config, variants, seeds, and what is compared with what: see docs/studies.md. Each job trains in
a folder of its own below --output (output/NAME OF THE FILE by default). `run` goes on where it was stopped: what is
done is not run again, and a job that was stopped continues from its checkpoint. It ends with 1 where a job failed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import interruption  # noqa: F401

from fbn_plugin.engine.run.cli import RUN_ERRORS, stoppable, user_errors

ROOT = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the default of ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | status | report")
    run = commands.add_parser("run", help="run the jobs that are not done")
    status = commands.add_parser("status", help="say how far the study is")
    for each in (run, status):
        each.add_argument("file", metavar="FILE", type=Path, help="the study file")
        each.add_argument("--output", metavar="FOLDER", type=Path, help="default: output/NAME OF THE FILE")
        each.add_argument("--jobs", metavar="N", type=int, help="jobs at a time; default: GPUs, or cores / --threads")
        each.add_argument("--threads", metavar="N", type=int, default=1, help="threads of a job (1)")
    run.add_argument("--retry", action="store_true", help="try jobs that failed again, too")
    run.add_argument(
        "--start",
        choices=("fork", "new"),
        help="how a job becomes a process: forked from one that has imported everything (default on Linux without "
        "GPUs), or started anew",
    )
    args = parser.parse_args(argv)
    args.output = args.output or Path("output", args.file.stem)
    return args


@stoppable()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    with user_errors():
        from fbn_plugin.engine.studies.running import outcomes_of, resources, run_study
        from fbn_plugin.engine.studies.status import status_text
        from fbn_plugin.engine.studies.study_file import read_study

        study = read_study(args.file, ROOT)
        shared = resources(study, args.jobs, args.threads)
    if args.command == "status":
        with user_errors():
            print(status_text(study.study, outcomes_of(study, args.output), shared.at_once))
        return 0
    with user_errors(*RUN_ERRORS, ValueError):
        forks = {"fork": True, "new": False}.get(args.start)
        script = ROOT / "tools" / study.engine.script
        outcomes = run_study(
            study, args.output, script, shared, args.retry, forks, lambda line: print(line, flush=True)
        )
    states = [each.state for each in outcomes]
    failed = states.count("failed")
    print(f"{states.count('done')} of {len(states)} jobs done" + (f", {failed} failed: see status" if failed else ""))
    return int(states.count("done") < len(states))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
