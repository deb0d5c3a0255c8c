#!/usr/bin/env python
"""Run the own tests of detectron2, timm or torchvision as they are, and again with this plugin, and compare them test
by test.

    python tools/check_peer_tests.py detectron2 path/to/detectron2/tests
    python tools/check_peer_tests.py timm path/to/pytorch-image-models/tests/test_models.py --route convert norm_layer
    python tools/check_peer_tests.py torchvision path/to/vision/test/test_models.py --models resnet18,fcos_resnet50_fpn

The tests are those of a checkout, and what they test is the package that is installed. "register" only calls
fbn_plugin.register(); "convert" converts the batch normalizations of each model that is built to FBN besides, and
"norm_layer" builds timm's and torchvision's models with norm_layer=, those where that does not put FBN in the place of
each batch normalization by conversion. Of the tests that take each of timm's or torchvision's models, one for each
family is run: the smallest model that has batch normalization. Arguments that are not known here go to pytest, such as
-k "not export".

Exits with 1 if any test ends otherwise with the plugin than without; tests that fail in both are the framework's own
matter, and are counted.
"""

import argparse
import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import interruption  # noqa: F401

ROUTES = ("register", "convert", "norm_layer")
# How this file, loaded by pytest as a plugin, is told what to do.
ROUTE, SPEC, MODELS = "FBN_PLUGIN_ROUTE", "FBN_PLUGIN_SPEC", "FBN_PLUGIN_MODELS"


# --- in pytest's process ----------------------------------------------------------------------------------------------


def pytest_configure(config) -> None:
    """Bring the plugin in, before the tests are imported."""
    if (route := os.environ.get(ROUTE)) is None:
        return
    import fbn_plugin

    framework = config.getoption("framework")
    assert framework in fbn_plugin.register()
    if route != "register":
        WRAPPERS[framework](route, os.environ[SPEC])


def pytest_addoption(parser) -> None:
    parser.addoption("--framework")


def pytest_collection_modifyitems(config, items: list) -> None:
    """Of the tests that are parametrized with models, keep those of the models that were named."""
    models = set(os.environ.get(MODELS, "").split(","))
    if models == {""}:
        return
    kept = [item for item in items if _model_of(item) in models | {None}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _model_of(item) -> str | None:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    model = parameters.get("model_name", parameters.get("model_fn"))
    return getattr(model, "__name__", model)


def _with_norm(build: Callable, route: str, norm_layer, spec: str) -> Callable:
    """A builder of models whose batch normalizations are what ``spec`` says."""
    import warnings

    import torch

    import fbn_plugin
    from fbn_plugin.engine.classification.smallest_models import batch_norms
    from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin

    @functools.wraps(build)
    def built(*args, **kwargs):
        state = torch.get_rng_state()
        model = build(*args, **kwargs)
        if route == "norm_layer":
            torch.set_rng_state(state)  # the same weights
            try:
                other = build(*args, **{"norm_layer": norm_layer, **kwargs})
            except (TypeError, ValueError):
                other = model
            norms = batch_norms(other)
            everywhere = all(isinstance(norm, FilteredBatchNormMixin) for norm in norms.values())
            if norms.keys() == batch_norms(model).keys() and everywhere:
                return other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model may have no batch normalization
            return fbn_plugin.convert_norm(model, spec)

    return built


def _wrap_timm(route: str, spec: str) -> None:
    import timm

    timm.create_model = timm.models.create_model = _with_norm(timm.create_model, route, spec.lower(), spec)


def _wrap_torchvision(route: str, spec: str) -> None:
    from torchvision import models

    import fbn_plugin

    found, factory = models.get_model_builder, fbn_plugin.norm_factory(spec)
    models.get_model_builder = lambda name: _with_norm(found(name), route, factory, spec)


def _wrap_detectron2(route: str, spec: str) -> None:
    from detectron2 import model_zoo, modeling

    # A builder of its own may be another's, so each module's is looked up and put back by name.
    modeling.build_model = modeling.meta_arch.build_model = _with_norm(modeling.build_model, route, spec, spec)
    model_zoo.get = _with_norm(model_zoo.get, route, spec, spec)


WRAPPERS = {"detectron2": _wrap_detectron2, "timm": _wrap_timm, "torchvision": _wrap_torchvision}


# --- in the tool's process --------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a test ended."""

    kind: str  # passed, failed, error or skipped
    message: str = ""  # of an exception, the first line


def outcomes(framework: str, tests: Path, arguments: Sequence[str], **environment: str) -> dict[str, Outcome]:
    """How each test ends, in a process of its own.

    Raises:
        ValueError: pytest did not get so far as to run tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        root = tests if tests.is_dir() else tests.parent
        options = [
            "-q",
            "--tb=line",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            "-p",
            Path(__file__).stem,
        ]
        options += ["--framework", framework, f"--junitxml={report}", f"--rootdir={root.parent}", "-o", "addopts="]
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pytest", *options, str(tests), *arguments]
        done = subprocess.run(
            command,
            cwd=root.parent,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        if done.returncode not in (0, 1) or not report.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise ValueError(f"pytest ended with {done.returncode} on {tests}: {last}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}.{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> Outcome:
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            lines = (child.get("message") or "").splitlines() or [""]
            return Outcome({"failure": "failed"}.get(child.tag, child.tag), lines[0])
    return Outcome("passed")


def smallest_models(framework: str, at_most: float) -> list[str]:
    """The smallest model with batch normalization of each of the framework's families, if it has no more parameters
    than ``at_most``; of detectron2, whose tests name their models, none."""
    from fbn_plugin.engine.classification.smallest_models import smallest_model

    families: dict[str, list[str]] = {}
    if framework == "timm":
        import timm

        build = timm.create_model
        families = {family: timm.list_models(module=family) for family in timm.list_modules()}
    elif framework == "torchvision":
        from torchvision import models

        def build(name: str):
            builder = models.get_model_builder(name)
            return builder(**({"weights_backbone": None} if "backbone" in str(inspect.signature(builder)) else {}))

        for name in models.list_models():
            families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    found = [smallest_model(build, names, at_most) for names in families.values()]
    return sorted(name for name in found if name is not None)


def _counted(found: Iterable[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in found)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print what they have in common and what not; return the exit status."""
    from fbn_plugin.engine.run.cli import stoppable

    with stoppable():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    from fbn_plugin.engine.run.cli import user_errors

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=sorted(WRAPPERS), help="whose tests they are; it is installed")
    parser.add_argument("tests", type=Path, help="a folder or file of tests in a checkout of the framework")
    parser.add_argument("--route", nargs="+", choices=ROUTES, default=["register"], help="default: register")
    parser.add_argument("--norm", default="FBN", help="what batch normalization is converted to (default: FBN)")
    parser.add_argument("--models", help="timm's or torchvision's models to test: names with commas, or 'all'")
    parser.add_argument(
        "--largest", type=float, default=30, help="millions of parameters of a family's smallest model (default: 30)"
    )
    args, rest = parser.parse_known_args(argv)
    with user_errors():
        import fbn_plugin

        spec = str(fbn_plugin.parse_spec(args.norm))
        if not args.tests.exists():
            raise FileNotFoundError(f"{args.tests} is no file or folder")
        models = args.models or ",".join(smallest_models(args.framework, args.largest * 1e6))
        environment = {} if models == "all" else {MODELS: models}
        run = functools.partial(outcomes, args.framework, args.tests.resolve(), rest, **environment)
        plain = run()
        print(f"without the plugin: {_counted(plain.values())}", flush=True)
        differing = 0
        for route in args.route:
            differing += compare(route, plain, run(**{ROUTE: route, SPEC: spec}))
    return 1 if differing else 0


def compare(route: str, plain: dict[str, Outcome], plugged: dict[str, Outcome]) -> int:
    """Print what a route's run has otherwise; return of how many tests."""
    print(f"with the plugin, {route}: {_counted(plugged.values())}")
    differing = 0
    for test in sorted(plain.keys() | plugged.keys()):
        without, having = (found.get(test, Outcome("not run")) for found in (plain, plugged))
        if without.kind != having.kind:
            differing += 1
            message = f" ({having.message or without.message})" if having.message or without.message else ""
            print(f"{test}: {without.kind} without, {having.kind} with the plugin{message}")
    print(f"{differing} of {len(plain)} tests end otherwise with the plugin", flush=True)
    return differing


if __name__ == "__main__":
    sys.exit(main())
