"""The study file: YAML that names a base config, variants, seeds, and what is compared with what. Everything in it is
checked before a job runs, each variant's config by the tool that is to train it.
"""

import difflib
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.files.words import counted, shown
from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.engine.run.cli import error_sentence
from fbn_plugin.engine.run.run_folder import norm_label
from fbn_plugin.engine.studies.engines import ENGINES, Engine
from fbn_plugin.engine.studies.outcomes import Comparison, Metric, Study, Variant
from fbn_plugin.engine.studies.seeds import SEED_RULES, config_seed, parse_seeds

__all__ = ["KEEP", "StudyFile", "flat", "read_study"]

# Which checkpoints of a finished job stay.
KEEP = ("none", "final", "all")

_OWNED = ("SEED", "OUTPUT_DIR")
_MOST_JOBS = 100_000
_LONGEST_NAME = 120  # of a variant, whose folder a file system must take

_KEYS = {
    "TITLE": str,
    "DESCRIPTION": str,
    "TOOL": str,
    "BASE": str,
    "SET": dict,
    "FACTORS": dict,
    "VARIANTS": dict,
    "SEEDS": object,
    "SEED_RULE": str,
    "METRICS": object,
    "COMPARE": object,
    "ALPHA": float,
    "KEEP": str,
}


_KINDS = {str: "text", dict: "a mapping", float: "a number"}


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it, with what running it needs.

    Attributes:
        path: the file.
        study: what it says.
        bases: variant -> its config file.
        overrides: variant -> ``[KEY, VALUE, ...]`` over it.
        configs: variant -> its whole config, each key with its dots; SEED and OUTPUT_DIR are the base's.
        imports: modules and files that each job imports first, see ``cli.import_modules``.
        keep: one of :data:`KEEP`.
    """

    path: Path
    study: Study
    bases: dict[str, Path]
    overrides: dict[str, list[str]]
    configs: dict[str, dict[str, Any]]
    imports: list[str]
    keep: str

    @property
    def engine(self) -> Engine:
        return ENGINES[self.study.tool]


def read_study(path: str | os.PathLike, root: str | os.PathLike = ".", imports: Sequence[str] = ()) -> StudyFile:
    """Read and check a study file.

    Args:
        path: the file.
        root: folder of the project; what lies in it is named relative to it.
        imports: modules and files that each job imports first, and that this process has imported. The file itself
            cannot name any, as nothing in a config runs.

    Raises:
        FileNotFoundError, ValueError: one sentence that names what is wrong, and the variant where it is one's.
    """
    path = Path(path)
    content = read_yaml(path)
    try:
        return _Reading(path, content, Path(root), imports).result()
    except (OSError, ValueError) as error:
        raise ValueError(f"study {path}: {error_sentence(error)}") from None


class _Reading:
    """One file."""

    def __init__(self, path: Path, content: dict[str, Any], root: Path, imports: Sequence[str]):
        self.path, self.content, self.root, self.imports = path, content, root, list(imports)
        for key, value in content.items():
            _check_key("key", key, _KEYS)
            kind = _KEYS[key]
            if kind is float and type(value) is int:
                value = content[key] = float(value)
            if not isinstance(value, kind):
                raise ValueError(f"{key} must be {_KINDS[kind]}, got {shown(value)}")
        for key in ("TOOL", "SEEDS"):
            if key not in content:
                raise ValueError(f"{key} is missing")
        self.tool = self._one_of("TOOL", tuple(ENGINES))
        self.engine = ENGINES[self.tool]

    def result(self) -> StudyFile:
        content = self.content
        settings = _settings("SET", content.get("SET", {}))
        factors, variants = self._variants()
        seeds = parse_seeds(content["SEEDS"])
        rule = self._one_of("SEED_RULE", SEED_RULES)
        _check_seeds(seeds, rule)
        _check_number(len(variants), len(seeds))
        metrics = self._metrics()
        alpha = content.get("ALPHA", 0.05)
        if not 0 < alpha < 0.5:
            raise ValueError(f"ALPHA must be above 0 and below 0.5, got {alpha}")
        study = Study(
            title=content.get("TITLE", self.path.stem),
            description=content.get("DESCRIPTION", ""),
            tool=self.tool,
            base=self._named(self._base(content["BASE"])) if "BASE" in content else "",
            settings=settings,
            factors=factors,
            variants=variants,
            seeds=seeds,
            seed_rule=rule,
            metrics=metrics,
            comparisons=list(dict.fromkeys(_Comparing(content.get("COMPARE", []), factors, variants).all())),
            alpha=alpha,
        )
        bases = {name: self._base(self._given_bases.get(name) or content.get("BASE")) for name in variants}
        overrides = {name: _overrides({**settings, **each.settings}) for name, each in variants.items()}
        configs = {name: self._config(name, bases[name], overrides[name]) for name in variants}
        _refuse_twins(configs)
        return StudyFile(self.path, study, bases, overrides, configs, self.imports, self._one_of("KEEP", KEEP))

    def _one_of(self, key: str, accepted: Sequence[str]) -> str:
        given = self.content.get(key, accepted[0])
        if given not in accepted:
            raise ValueError(f"{key} must be one of {', '.join(accepted)}, got {shown(given)}{_hint(given, accepted)}")
        return given

    def _base(self, given: Any) -> Path:
        if not isinstance(given, str) or not given:
            raise ValueError(f"BASE must be a config file, got {shown(given)}")
        base = Path(os.path.normpath(self.path.parent / os.path.expanduser(given)))
        if not base.exists():
            raise FileNotFoundError(f"BASE {base} is not there")
        if not base.is_file():
            raise ValueError(f"BASE {base} must be a config file; it is a folder, a pipe or a device")
        if "TOOL" in read_yaml(base):
            raise ValueError(f"BASE {base} is a study itself, and must be the config of a run")
        return base

    def _named(self, base: Path) -> str:
        """A config as a report names it: from the project's root, else from the study file's folder."""
        inside = os.path.relpath(base, self.root)
        return inside if not inside.startswith("..") else os.path.relpath(base, self.path.parent)

    def _variants(self) -> tuple[dict[str, list[str]], dict[str, Variant]]:
        self._given_bases: dict[str, str] = {}
        if ("FACTORS" in self.content) == ("VARIANTS" in self.content):
            raise ValueError("it must have either FACTORS, whose product are the variants, or VARIANTS")
        if "FACTORS" in self.content:
            factors = _factors(self.content["FACTORS"])
            variants = _product(factors)
            levels = {name: list(each) for name, each in factors.items()}
        else:
            levels, variants = {}, {}
            for name, given in self.content["VARIANTS"].items():
                rest = dict(_group(f"variant {name!r}", given))
                if "BASE" in rest:
                    self._given_bases[name] = rest.pop("BASE")
                base = self._named(self._base(self._given_bases[name])) if name in self._given_bases else ""
                variants[name] = Variant({}, _settings(f"variant {name!r}", rest), base)
        if not variants:
            raise ValueError("it has no variants")
        _check_names(variants)
        if "BASE" not in self.content and len(self._given_bases) < len(variants):
            raise ValueError("BASE is missing")
        return levels, variants

    def _metrics(self) -> dict[str, Metric]:
        known = self.engine.metrics
        given = self.content.get("METRICS", [next(iter(known))])
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            if twice := [name for name in given if given.count(name) > 1]:
                raise ValueError(f"METRICS has {twice[0]!r} twice")
            given = {name: {} for name in given}
        if not isinstance(given, dict) or not given:
            raise ValueError(f"METRICS must be a list of names or a mapping, such as top1: {{}}, got {shown(given)}")
        return {name: self._metric(name, options) for name, options in given.items()}

    def _metric(self, name: str, options: Any) -> Metric:
        options = {} if options is None else _group(f"metric {name!r}", options)
        kinds = {"higher_is_better": bool, "unit": str, "label": str}
        for key, value in options.items():
            _check_key(f"option of metric {name!r}", key, kinds)
            if not isinstance(value, kinds[key]):
                raise ValueError(f"{key} of metric {name!r} must be of type {kinds[key].__name__}, got {shown(value)}")
        default = self.engine.metric(name)
        if default is None:
            if "higher_is_better" not in options:
                names = tuple(self.engine.metrics)
                raise ValueError(
                    f"METRICS has {name!r}, of which higher_is_better must be said, as it is none of "
                    f"{', '.join(names)}{_hint(name, names)}"
                )
            default = Metric(higher_is_better=True, label=name)
        return Metric(**{key: options.get(key, getattr(default, key)) for key in kinds})

    def _config(self, name: str, base: Path, overrides: Sequence[str]) -> dict[str, Any]:
        try:
            return flat(self.engine.load(str(base), overrides))
        except (OSError, ValueError) as error:
            raise ValueError(f"variant {name!r}: {error_sentence(error)}") from None


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of keys as one mapping, each key with its dots and tuples as lists, as files have them.

    Raises:
        ValueError: a key is there twice, once with its dots and once in its group.
    """
    found: dict[str, Any] = {}
    for name, value in node.items():
        is_group = isinstance(value, Mapping) and value
        for key, each in (flat(value, f"{prefix}{name}.") if is_group else {prefix + name: _lists(value)}).items():
            if key in found:
                raise ValueError(f"{key} is there twice, once with its dots and once in its group")
            found[key] = each
    return found


def _lists(value: Any) -> Any:
    return [_lists(each) for each in value] if isinstance(value, tuple | list) else value


def _group(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping such as {{MODEL.NORM: FBN}}, got {shown(given)}")
    return given


def _settings(where: str, given: Any) -> dict[str, Any]:
    """Keys and values, without those that are the study's."""
    try:
        found = flat(_group(where, given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for key in _OWNED:
        if key in found:
            raise ValueError(f"{where} sets {key}, which the study itself gives each of its jobs")
    return found


def _factors(given: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Factor -> level -> settings."""
    if not given:
        raise ValueError("FACTORS has no factors")
    factors = {}
    for factor, levels in given.items():
        if not _group(f"factor {factor!r}", levels):
            raise ValueError(f"factor {factor!r} has no levels")
        factors[factor] = {
            level: _settings(f"level {level!r} of factor {factor!r}", settings) for level, settings in levels.items()
        }
    for (one, levels), (other, others) in itertools.combinations(factors.items(), 2):
        keys = {key for settings in levels.values() for key in settings}
        if shared := sorted(key for settings in others.values() for key in settings if key in keys):
            raise ValueError(f"factors {one!r} and {other!r} both set {shared[0]}; name such variants by VARIANTS")
    return factors


def _product(factors: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Variant]:
    """Each combination of levels by its name, the last factor's changing first."""
    _check_number(math.prod(map(len, factors.values())), 1)
    variants: dict[str, Variant] = {}
    for levels in itertools.product(*factors.values()):
        chosen = dict(zip(factors, levels))
        settings = {key: value for factor, level in chosen.items() for key, value in factors[factor][level].items()}
        name = _titles(chosen)
        if name in variants:
            raise ValueError(
                f"the levels {list(variants[name].levels.values())} and {list(levels)} give two variants one name, "
                f"{name!r}; name a level otherwise"
            )
        variants[name] = Variant(chosen, settings)
    return variants


def _check_number(variants: int, seeds: int) -> None:
    """Refuse more jobs than anybody runs, before they are listed."""
    if variants * seeds > _MOST_JOBS:
        raise ValueError(
            f"{counted(variants, 'variant')} with {counted(seeds, 'seed')} are more than {counted(_MOST_JOBS, 'job')}"
        )


def _titles(levels: Mapping[str, str]) -> str:
    """A combination's name: the levels, and before one without a letter its factor."""
    parts = (level if re.search(r"[^\W\d_]", level) else f"{factor} {level}" for factor, level in levels.items())
    return ", ".join(parts)


def _check_names(names: Mapping[str, Any]) -> None:
    """Refuse names of variants that are no folder's, or would be that of another one."""
    folders: dict[str, str] = {}
    for name in names:
        if not name.isprintable() or set(name) & set('/\\:*?"<>|') or name != name.strip() or name.startswith("."):
            raise ValueError(
                f"variant {shown(name)} must be usable as a folder's name: without / \\ : * ? \" < > | and line "
                "breaks, and without a dot or spaces around it"
            )
        if not name or len(name.encode()) > _LONGEST_NAME:
            raise ValueError(f"variant {shown(name)} must have a name of 1 to {_LONGEST_NAME} bytes")
        # Some file systems tell neither case apart nor the ways in which Unicode writes one letter.
        other = folders.setdefault(unicodedata.normalize("NFC", name.casefold()), name)
        if other != name:
            how = "case" if other.casefold() == name.casefold() else "the way Unicode writes a letter"
            raise ValueError(f"variants {other!a} and {name!a} differ in {how} alone, as names of folders may not")


def _check_seeds(seeds: Sequence[int], rule: str) -> None:
    """Refuse two seeds of one SEED, which would be one job twice."""
    given: dict[int, int] = {}
    for seed in seeds:
        other = given.setdefault(config_seed(seed, rule), seed)
        if other != seed:
            raise ValueError(f"SEEDS {other} and {seed} have the same SEED by the rule {rule}; leave one out")


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """``[KEY, VALUE, ...]`` as a command line has them."""
    return [text for key, value in settings.items() for text in (key, value if isinstance(value, str) else repr(value))]


def _refuse_twins(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse two variants of the same settings: their jobs would be the same."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        settings = {
            key: norm_label(value) if key.endswith("NORM") and isinstance(value, str) else value
            for key, value in config.items()
            if key not in _OWNED
        }
        other = seen.setdefault(repr(sorted(settings.items())), name)
        if other != name:
            raise ValueError(f"variants {other!r} and {name!r} have the same settings")


def _check_key(what: str, key: str, known: Mapping[str, Any]) -> None:
    if key not in known:
        raise ValueError(f"unknown {what} {shown(key)}{_hint(key, tuple(known))}; it has {', '.join(known)}")


def _hint(given: Any, known: Sequence[str]) -> str:
    lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(str(given).lower(), lower, n=1)
    return f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""


class _Comparing:
    """COMPARE: pairs; or a factor and the level that the others are compared with; or a variant that they are."""

    def __init__(self, given: Any, factors: Mapping[str, Sequence[str]], variants: Mapping[str, Variant]):
        self.given, self.factors, self.variants = given, factors, variants

    def all(self) -> Iterator[Comparison]:
        given = self.given if isinstance(self.given, list) else [self.given]
        for each in given:
            if isinstance(each, dict):
                yield from self._rule(each)
            elif isinstance(each, list) and len(each) == 2:
                variant, baseline = (self._known("a pair", name) for name in each)
                if variant == baseline:
                    raise ValueError(f"COMPARE: a pair compares {variant!r} with itself")
                yield Comparison(variant, baseline)
            else:
                raise ValueError(
                    f"COMPARE must be pairs [variant, baseline], or mappings with baseline and with, got {shown(each)}"
                )

    def _known(self, where: str, name: Any, known: Sequence[str] | None = None) -> str:
        known = tuple(self.variants if known is None else known)
        if name not in known:
            listed = ", ".join(known) if len(known) <= 10 else f"{counted(len(known), 'variant')}"
            raise ValueError(f"COMPARE: {where} names {shown(name)}, which is none of {listed}{_hint(name, known)}")
        return name

    def _rule(self, rule: dict[str, Any]) -> Iterator[Comparison]:
        for key in rule:
            _check_key("key of COMPARE", key, {"factor": str, "baseline": str, "with": object})
        if "baseline" not in rule:
            raise ValueError("COMPARE has no baseline")
        if "factor" not in rule:
            baseline = self._known("baseline", rule["baseline"])
            for name in self._chosen(rule, tuple(self.variants), baseline):
                yield Comparison(name, baseline)
            return
        if not self.factors:
            raise ValueError(f"COMPARE names the factor {shown(rule['factor'])}, and the study has no FACTORS")
        factor = self._known("factor", rule["factor"], tuple(self.factors))
        baseline = self._known("baseline", rule["baseline"], self.factors[factor])
        chosen = self._chosen(rule, self.factors[factor], baseline)
        by_levels = {tuple(each.levels.items()): name for name, each in self.variants.items()}
        for name, each in self.variants.items():
            if each.levels[factor] in chosen:
                other = by_levels[tuple({**each.levels, factor: baseline}.items())]
                rest = {key: level for key, level in each.levels.items() if key != factor}
                yield Comparison(name, other, _titles(rest))

    def _chosen(self, rule: dict[str, Any], known: Sequence[str], baseline: str) -> list[str]:
        """What ``with`` names, without the baseline; all by default."""
        given = rule.get("with", "all")
        names = known if given == "all" else given if isinstance(given, list) else [given]
        chosen = [name for each in names if (name := self._known("with", each, known)) != baseline]
        if not chosen:
            raise ValueError(f"COMPARE has nothing to compare with {baseline!r}: with has {shown(given)}")
        return chosen
