#!/usr/bin/env python
"""Run detectron2's own unit tests twice, as they are and with this plugin registered, and compare them test by test.

    python tools/check_detectron2_tests.py path/to/detectron2/tests
    python tools/check_detectron2_tests.py path/to/detectron2/tests -k "not export"

Arguments after the folder go to pytest. Exits with 1 if any test ends otherwise with the plugin than without; tests
that fail in both are detectron2's own matter, and are counted.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fbn_plugin.engine.run.cli import user_errors

RUN = {
    "without the plugin": "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
    "with the plugin": "import sys, pytest, fbn_plugin\n"
    "assert 'detectron2' in fbn_plugin.register()\n"
    "sys.exit(pytest.main(sys.argv[1:]))",
}


def outcomes(tests: Path, code: str, arguments: Sequence[str]) -> dict[str, str]:
    """How each test of detectron2's ends in a process of its own: passed, failed, error or skipped.

    Raises:
        ValueError: pytest did not get so far as to run tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--tb=no", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-c", code, *options, f"--rootdir={tests.parent}", str(tests), *arguments]
        done = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise ValueError(f"pytest ended with {done.returncode} on {tests}: {last}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found = {}
        for case in cases:
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            name = f"{case.get('classname')}.{case.get('name')}"
            found[name] = {"failure": "failed"}.get(kind := min(kinds, default="passed"), kind)
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print what they have in common and what not; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder tests/ of a checkout of detectron2, which is installed")
    args, rest = parser.parse_known_args(argv)
    results = {}
    with user_errors():
        if not args.tests.is_dir():
            raise FileNotFoundError(f"{args.tests} is not a folder")
        for name, code in RUN.items():
            results[name] = outcomes(args.tests.resolve(), code, rest)
            counts = Counter(results[name].values())
            print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), flush=True)
    plain, plugged = results.values()
    differing = sorted(test for test in plain.keys() | plugged.keys() if plain.get(test) != plugged.get(test))
    for test in differing:
        print(f"{test}: {plain.get(test, 'not run')} without, {plugged.get(test, 'not run')} with the plugin")
    print(f"{len(differing)} of {len(plain)} tests end otherwise with the plugin")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
