"""Put FBN into the smallest model with batch normalization of every family (``timm.models`` module) of timm, and check
that it is the same network: ``python tools/check_timm_families.py`` prints a row a family and how many of how many.

A family is entered through ``norm_layer=`` if that puts FBN exactly where batch normalization was, and by
``fbn_plugin.convert_norm`` otherwise. No weights are downloaded; sizes are found without allocating them.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import interruption  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fbn_plugin
from fbn_plugin.engine.classification.smallest_models import batch_norms, smallest_model
from fbn_plugin.engine.run.cli import stoppable, user_errors
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin

with user_errors():
    import timm
    from timm.models import list_modules
    from tqdm import tqdm

SPEC = "FBN(t_sigma=2)"
ROUTES: dict[str, Callable] = {
    f'norm_layer="{SPEC.lower()}"': lambda: SPEC.lower(),
    f'norm_layer=norm_factory("{SPEC}")': lambda: fbn_plugin.norm_factory(SPEC),
}
CONVERT = f'convert_norm(model, "{SPEC}")'


@dataclass
class Result:
    """What came out for one model: how FBN got in, how many norms it has, and what is wrong."""

    model: str
    route: str = CONVERT
    norms: int = 0
    problems: list[str] = field(default_factory=list)


def _build(name: str, **kwargs) -> nn.Module:
    return timm.create_model(name, num_classes=10, **kwargs)


def _image_size(model: nn.Module) -> tuple[int, int, int]:
    config = model.pretrained_cfg
    if config.get("fixed_input_size"):
        return config["input_size"]
    return config.get("min_input_size") or (3, 96, 96)


def _output(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else torch.stack(output)  # distilled models have two heads


def _randomize(model: nn.Module, images: Tensor) -> None:
    """Give every scale, shift and running statistic a value, so that no branch is silenced by a zero or tiny one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.squeeze().ndim <= 1:
                parameter.uniform_(-0.5, 0.5) if name.endswith("bias") else parameter.uniform_(0.5, 1.5)
        momenta = {module: module.momentum for module in batch_norms(model).values()}
        for module in momenta:
            module.momentum = 1.0
        model.train()(images)
        for module, momentum in momenta.items():
            module.momentum = momentum


def _other_modules(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules() if not isinstance(m, _BatchNorm)}


def _through_norm_layer(name: str, norms: set[str]) -> tuple[str, nn.Module] | None:
    """The route and the model, if ``norm_layer`` puts FBN at the places ``norms`` and nowhere else."""
    for route, norm_layer in ROUTES.items():
        try:
            model = _build(name, norm_layer=norm_layer())
        except TypeError:  # takes no such argument, or no strings
            continue
        built = batch_norms(model)
        if built.keys() == norms and all(isinstance(module, FilteredBatchNormMixin) for module in built.values()):
            return route, model
    return None


def check(name: str) -> Result:
    """Put FBN into a timm model and compare it with the model that it was: names of parameters and buffers, all other
    modules, output in evaluation with the same random weights and statistics; and run one training step.

    Args:
        name: a timm model with batch normalization.
    """
    result = Result(name)
    torch.manual_seed(0)
    original = _build(name)
    images = torch.randn(2, *_image_size(original))
    _randomize(original, images)
    norms, others = batch_norms(original).keys(), _other_modules(original)
    state = original.state_dict()
    with torch.no_grad():
        expected = _output(original.eval(), images)

    found = _through_norm_layer(name, set(norms))
    if found is None:
        filtered = fbn_plugin.convert_norm(original, SPEC)
    else:
        result.route, filtered = found
        del original
    built = batch_norms(filtered)
    result.norms = len(built)

    def require(condition: bool, problem: str) -> None:
        if not condition:
            result.problems.append(problem)

    plain = [key for key, module in built.items() if not isinstance(module, FilteredBatchNormMixin)]
    require(not plain, f"plain batch normalization is left: {plain}")
    require(built.keys() == set(norms), "norms are at other places")
    require(all(getattr(m, "t_sigma", None) == 2 for m in built.values()), "the option t_sigma is lost")
    require(filtered.state_dict().keys() == state.keys(), "state_dict keys differ")
    changed = {key for key, _ in others.items() ^ _other_modules(filtered).items()}
    require(not changed, f"other modules changed: {sorted(changed)}")
    if result.problems:
        return result

    filtered.load_state_dict(state)
    with torch.no_grad():
        output = _output(filtered.eval(), images)
    difference = (output - expected).abs().max() / expected.abs().max()
    require(bool(difference < 1e-5), f"evaluation differs by {difference:.2g}")

    output = _output(filtered.train(), images)
    output.square().mean().backward()
    require(bool(output.isfinite().all()), "training output is not finite")
    gradients = {key: p.grad for key, p in filtered.named_parameters() if p.grad is not None}
    require(all(bool(g.isfinite().all()) for g in gradients.values()), "gradients are not finite")
    missing = [f"{n}.{key}" for n, m in built.items() for key, _ in m.named_parameters(recurse=False)]
    missing = [key for key in missing if key not in gradients]
    require(not missing, f"no gradient reaches {missing}")
    return result


@stoppable()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("family", nargs="*", help="timm.models modules, such as resnet; default: all")
    families = parser.parse_args().family or list_modules()
    with user_errors():
        unknown = sorted(set(families) - set(list_modules()))
        if unknown:
            raise ValueError(f"timm has no family {', '.join(unknown)}: accepted are {', '.join(list_modules())}")
    fbn_plugin.register()
    results = {}
    for family in tqdm(families, unit="family", leave=False, disable=None):
        name = smallest_model(timm.create_model, timm.list_models(module=family))
        if name is not None:
            results[family] = result = check(name)
            verdict = "; ".join(result.problems) or "same network"
            tqdm.write(f"{family:26} {name:26} {result.norms:4} FBN  {result.route:44} {verdict}", file=sys.stdout)

    good = [result for result in results.values() if not result.problems]
    print(f"\n{len(good)} of {len(results)} timm {timm.__version__} families with batch normalization run with FBN:")
    for route in (*ROUTES, CONVERT):
        print(f"  {sum(result.route == route for result in good):3} through {route}")
    print(f"families without batch normalization: {len(families) - len(results)}")
    sys.exit(len(good) < len(results))


if __name__ == "__main__":
    main()
