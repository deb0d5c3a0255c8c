"""Studies as finished ones are, with figures that are drawn: norms times batch sizes times data sets, or variants that
are named one by one."""

import dataclasses
import itertools
import math

import numpy as np

from fbn_plugin.engine.studies.outcomes import Comparison, Metric, Outcome, Study, Variant

NORMS = ("BN", "FBN, T=2", "FBN, T=3", "FBN, T=5", "FBN, T=2, gaussian", "GN", "FGN", "ScaledBN")
BATCHES = ("2", "4", "8", "16", "32", "128")
TOP1 = Metric(higher_is_better=True, unit="%", label="top-1 accuracy")
LOSS = Metric(higher_is_better=False, label="validation loss")


def product_study(norms=NORMS, batches=BATCHES, sets=("CIFAR-10", "Tiny ImageNet 20"), seeds=5, metrics=None) -> Study:
    """Every norm against the first one at every batch size, and on every set where there are more than one."""
    factors = {"norm": list(norms), "batch": list(batches)} | ({"data": list(sets)} if len(sets) > 1 else {})
    variants, comparisons = {}, []
    for others in itertools.product(*list(factors.values())[1:]):
        shared = dict(zip(list(factors)[1:], others))
        group = ", ".join(f"{key} {level}" for key, level in shared.items())
        for norm in norms:
            variants[f"{norm}, {group}"] = Variant({"norm": norm} | shared, {"SOLVER.IMS_PER_BATCH": shared["batch"]})
            if norm != norms[0]:
                comparisons.append(Comparison(f"{norm}, {group}", f"{norms[0]}, {group}", group))
    return Study(
        title="Small batches",
        description="Which norm at which batch size. Reduced: a quarter of the width, 20 epochs.",
        tool="classification",
        base="configs/experiments/small_batches.yaml",
        settings={"SOLVER.BASE_LR": 0.1},
        factors=factors,
        variants=variants,
        seeds=list(range(1, seeds + 1)),
        seed_rule="md5",
        metrics=metrics or {"top1": TOP1},
        comparisons=comparisons,
    )


def plain_study(variants=("BN", "FBN, T=3", "FBN, T=5", "GN"), seeds=15, group="") -> Study:
    """Variants without factors, each against the first."""
    return dataclasses.replace(
        product_study(sets=("one",), seeds=seeds),
        title="Table I, reduced",
        tool="torchvision",
        factors={},
        variants={name: Variant() for name in variants},
        metrics={"segm/AP": Metric(True, "%", "mask AP")},
        comparisons=[Comparison(name, variants[0], group) for name in variants[1:]],
    )


def effect(levels: dict[str, str], name: str) -> float:
    """True mean: BN suffers at small batches, filtered ones less, GN never."""
    batch, norm = float(levels.get("batch", 4)), levels.get("norm", name)
    loss = {"BN": 16, "GN": 0, "FGN": 0, "ScaledBN": 14}.get(norm, 9) / batch
    base = {"GN": 68, "FGN": 69.5, "ScaledBN": 72}.get(norm, 72.5)
    return base - loss - (28 if levels.get("data", "").startswith("Tiny") else 0)


def draw(study: Study, seed: int = 0, sd: float = 0.8, mean=effect, iterations: int = 20) -> list[Outcome]:
    """A finished run for every job; runs of one seed are alike, as those with the same first weights are."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=max(study.seeds) + 1)
    outcomes = []
    for variant, described in study.variants.items():
        for number in study.seeds:
            noise = 0.6 * shared[number] + 0.8 * generator.normal()
            final = mean(described.levels, variant) + sd * noise
            steps = [500 * (i + 1) for i in range(iterations)]
            wobble = generator.normal(size=iterations)
            points = [final * (1 - math.exp(-5 * (i + 1) / iterations)) + sd * wobble[i] for i in range(iterations)]
            points[-1:] = [final] * bool(points)
            outcomes.append(
                Outcome(
                    variant=variant,
                    levels=described.levels,
                    seed=number,
                    config_seed=1_000 + number,
                    state="done",
                    metrics={name: final if m.higher_is_better else final / 50 for name, m in study.metrics.items()},
                    curves={
                        name: [(at, y if m.higher_is_better else y / 50) for at, y in zip(steps, points)]
                        for name, m in study.metrics.items()
                    },
                    seconds=60.0 + number,
                    command=f"python tools/train_{study.tool}.py --config-file {study.base} SEED {1_000 + number}",
                    hardware="Some CPU, 1 thread",
                    versions={"fbn_plugin": "0.1.0", "torch": "2.11.0"},
                )
            )
    return outcomes


def changed(outcomes: list[Outcome], variant: str, seed: int, **changes) -> list[Outcome]:
    """The same outcomes, but for one job."""
    return [
        dataclasses.replace(each, **changes) if (each.variant, each.seed) == (variant, seed) else each
        for each in outcomes
    ]
