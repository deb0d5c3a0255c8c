"""The study file: YAML that names a base config, variants, seeds, and what is compared with what. Everything in it is
checked before a job runs, each variant's config by the tool that is to train it.
"""

import itertools
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbn_plugin.engine.files.words import counted, hint, shown
from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.engine.run.cli import error_sentence
from fbn_plugin.engine.run.run_folder import norm_label
from fbn_plugin.engine.studies.claim_keys import Names, comparisons_of, read_claims, read_printed
from fbn_plugin.engine.studies.comparing import Comparing, variant_name
from fbn_plugin.engine.studies.engines import ENGINES, Engine
from fbn_plugin.engine.studies.metric_keys import metric_names, read_metrics_key, read_together
from fbn_plugin.engine.studies.outcomes import Combination, Study, Variant
from fbn_plugin.engine.studies.scales import at_scale, scales_of
from fbn_plugin.engine.studies.seeds import SEED_RULES, config_seed, parse_seeds
from fbn_plugin.engine.studies.study_keys import check_key, check_kinds, flat, group
from fbn_plugin.engine.studies.wanted_data import Wanted, read_wanted

__all__ = ["KEEP", "Described", "StudyFile", "read_study", "read_study_alone"]

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
    "TOGETHER": dict,
    "COMPARE": object,
    "ALPHA": float,
    "KEEP": str,
    "ID": str,
    "SOURCE": str,
    "PRINTED": dict,
    "CLAIMS": list,
    "COMBINE": dict,
    "DATA": dict,
    "NOT_RUN": str,
    "SCALES": dict,
}
_CROPS = (1, 10, 144)
_MOMENTS = ("", "population", "batch", "balanced")


_KINDS = {str: "text", dict: "a mapping", list: "a list", float: "a number"}


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it, with what running it needs.

    Attributes:
        path: the file.
        study: what it says.
        bases: variant -> its config file; of those that train, as the two that follow.
        overrides: variant -> ``[KEY, VALUE, ...]`` over it.
        configs: variant -> its whole config, each key with its dots; SEED and OUTPUT_DIR are the base's.
        imports: modules and files that each job imports first, see ``cli.import_modules``.
        keep: one of :data:`KEEP`.
        wanted: data and weights that its jobs read.
    """

    path: Path
    study: Study
    bases: dict[str, Path]
    overrides: dict[str, list[str]]
    configs: dict[str, dict[str, Any]]
    imports: list[str]
    keep: str
    wanted: list[Wanted]

    @property
    def engine(self) -> Engine:
        return ENGINES[self.study.tool]


def read_study(
    path: str | os.PathLike, root: str | os.PathLike = ".", imports: Sequence[str] = (), scale: str | None = None
) -> StudyFile:
    """Read and check a study file.

    Args:
        path: the file.
        root: folder of the project; what lies in it is named relative to it.
        imports: modules and files that each job imports first, and that this process has imported. The file itself
            cannot name any, as nothing in a config runs.
        scale: one of its SCALES, where it has some.

    Raises:
        FileNotFoundError, ValueError: one sentence that names what is wrong, and the variant where it is one's.
    """
    return _read(path, root, scale, lambda reading: reading.result(imports))


@dataclass(frozen=True)
class Described:
    """What a study file says, without the configs of its variants.

    Attributes:
        study: at one of its scales.
        wanted: data and weights that its jobs read.
        not_run: why it was not run; "" where the file does not say.
    """

    study: Study
    wanted: list[Wanted]
    not_run: str


def read_study_alone(path: str | os.PathLike, root: str | os.PathLike = ".", scale: str | None = None) -> Described:
    """Read a study file without asking its tool for the configs: for lists of many files.

    Args:
        path, root, scale: as of :func:`read_study`, and so are the errors.
    """
    return _read(
        path,
        root,
        scale,
        lambda reading: Described(reading.study, reading.wanted, reading.content.get("NOT_RUN", "")),
    )


def _read(path: str | os.PathLike, root: str | os.PathLike, scale: str | None, what: Callable) -> Any:
    path = Path(path)
    content = read_yaml(path)
    try:
        return what(_Reading(path, content, Path(root), scale))
    except (OSError, ValueError) as error:
        raise ValueError(f"study {path}: {error_sentence(error)}") from None


def _check_values(content: dict[str, Any], kinds: Mapping[str, type]) -> None:
    """Refuse unknown keys and values of a wrong type; whole numbers become those that are wanted."""
    for key, value in content.items():
        check_key("key", key, kinds)
        kind = kinds[key]
        if kind is float and type(value) is int:
            value = content[key] = float(value)
        if not isinstance(value, kind):
            raise ValueError(f"{key} must be {_KINDS[kind]}, got {shown(value)}")


class _Reading:
    """One file at one of its scales."""

    def __init__(self, path: Path, content: dict[str, Any], root: Path, scale: str | None):
        self.path, self.root = path, root
        _check_values(content, _KEYS)
        if "ID" in content and "SCALES" not in content:
            raise ValueError("it has the ID of a table or figure, and no SCALES")
        everywhere = [at_scale(content, name) for name in scales_of(content)] or [content]
        self.content = content = at_scale(content, scale)
        _check_values(content, {**_KEYS, "ONLY": object})
        for key in ("TOOL", "SEEDS"):
            if key not in content:
                raise ValueError(f"{key} is missing")
        self.tool = self._one_of("TOOL", tuple(ENGINES))
        self.engine = ENGINES[self.tool]
        self.keep = self._one_of("KEEP", KEEP)
        self.wanted = read_wanted(content.get("DATA", {}))
        self.study = self._study(scale, self._names_anywhere(everywhere))

    def _study(self, scale: str | None, anywhere: Names) -> Study:
        content = self.content
        settings = _settings("SET", content.get("SET", {}))
        factors, variants = self._variants()
        seeds = parse_seeds(content["SEEDS"])
        rule = self._one_of("SEED_RULE", SEED_RULES)
        _check_seeds(seeds, rule)
        metrics = read_metrics_key(content.get("METRICS"), self.engine)
        alpha = content.get("ALPHA", 0.05)
        if not 0 < alpha < 0.5:
            raise ValueError(f"ALPHA must be above 0 and below 0.5, got {alpha}")
        comparisons = list(dict.fromkeys(Comparing(content.get("COMPARE", []), factors, variants).all()))
        printed = read_printed(content.get("PRINTED", {}), anywhere)
        claims = read_claims(content.get("CLAIMS", []), Names(variants, factors, list(metrics)), anywhere, printed)
        comparisons += comparisons_of(claims, comparisons, variants)
        if "ONLY" in content:
            factors, variants = _only(content["ONLY"], factors, variants)
            comparisons = [each for each in comparisons if {each.variant, each.baseline} <= variants.keys()]
        _check_number(len(variants), len(seeds))
        return Study(
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
            comparisons=comparisons,
            alpha=alpha,
            id=_checked_id(content.get("ID", "")),
            source=content.get("SOURCE", ""),
            scale=scale or "",
            printed=printed,
            claims=claims,
            together=read_together(content.get("TOGETHER", {})),
        )

    def result(self, imports: Sequence[str]) -> StudyFile:
        """The study with the config of each variant, as its tool reads it."""
        trained = {name: each for name, each in self.study.variants.items() if each.combines is None}
        bases = {name: self._base(self._given_bases.get(name) or self.content.get("BASE")) for name in trained}
        overrides = {name: _overrides({**self.study.settings, **each.settings}) for name, each in trained.items()}
        configs = {name: self._config(name, bases[name], overrides[name]) for name in trained}
        _refuse_twins(configs)
        return StudyFile(self.path, self.study, bases, overrides, configs, list(imports), self.keep, self.wanted)

    def _names_anywhere(self, contents: Sequence[dict[str, Any]]) -> Names:
        """What the file names at any of its scales, so that a slip of the pen in a claim is told from what this scale
        has not."""
        parts = []
        for each in contents:
            factors = _factors(each["FACTORS"]) if "FACTORS" in each else {}
            names = [*(_product(factors) if factors else each.get("VARIANTS", {})), *each.get("COMBINE", {})]
            levels = {name: list(given) for name, given in factors.items()}
            parts.append(Names(dict.fromkeys(names), levels, metric_names(each.get("METRICS"), self.engine)))
        return Names.joined(parts)

    def _one_of(self, key: str, accepted: Sequence[str]) -> str:
        given = self.content.get(key, accepted[0])
        if given not in accepted:
            raise ValueError(f"{key} must be one of {', '.join(accepted)}, got {shown(given)}{hint(given, accepted)}")
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
        """A config as a report names it, and as a command in the project's root finds it: from there, or its whole path
        where that is what the file has."""
        inside = os.path.relpath(base, self.root)
        return os.fspath(base) if inside.startswith("..") and base.is_absolute() else inside

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
                rest = dict(group(f"variant {name!r}", given))
                if "BASE" in rest:
                    self._given_bases[name] = rest.pop("BASE")
                base = self._named(self._base(self._given_bases[name])) if name in self._given_bases else ""
                variants[name] = Variant({}, _settings(f"variant {name!r}", rest), base)
        if not variants:
            raise ValueError("it has no variants")
        variants |= self._combined(variants)
        _check_names(variants)
        trained = [name for name, each in variants.items() if each.combines is None]
        if "BASE" not in self.content and len(self._given_bases) < len(trained):
            raise ValueError("BASE is missing")
        return levels, variants

    def _combined(self, variants: Mapping[str, Variant]) -> dict[str, Variant]:
        """COMBINE: name -> which variants are evaluated together, by which crops and moments."""
        given = self.content.get("COMBINE", {})
        if given and ("FACTORS" in self.content or self.tool != "classification"):
            raise ValueError("COMBINE goes with VARIANTS and TOOL classification alone")
        found = {}
        for name, options in given.items():
            where = f"COMBINE {name!r}"
            options = group(where, options, "{of: [a, b], crops: 144}")
            check_kinds(where, options, {"of": object, "crops": int, "moments": str})
            parts = options.get("of")
            parts = parts if isinstance(parts, list) else [parts]
            if name in variants:
                raise ValueError(f"{where} is a variant, too")
            for part in parts:
                if not isinstance(part, str) or part not in variants:
                    raise ValueError(f"{where} is of {shown(part)}, which is none of {', '.join(variants)}")
            combination = Combination(parts, options.get("crops", 1), options.get("moments", ""))
            for key, value, known in (
                ("crops", combination.crops, _CROPS),
                ("moments", combination.moments, _MOMENTS),
            ):
                if value not in known:
                    accepted = ", ".join(str(each) for each in known if each != "")
                    raise ValueError(f"{key} of {where} must be one of {accepted}, got {shown(value)}")
            if len(set(parts)) < len(parts) or combination == Combination(parts[:1]):
                raise ValueError(f"{where} must be of different variants, or of one with other crops or moments")
            found[name] = Variant(combines=combination)
        return found

    def _config(self, name: str, base: Path, overrides: Sequence[str]) -> dict[str, Any]:
        try:
            return flat(self.engine.load(str(base), overrides))
        except (OSError, ValueError) as error:
            raise ValueError(f"variant {name!r}: {error_sentence(error)}") from None


def _settings(where: str, given: Any) -> dict[str, Any]:
    """Keys and values, without those that are the study's."""
    try:
        found = flat(group(where, given))
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
        if not group(f"factor {factor!r}", levels):
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
        name = variant_name(chosen)
        if name in variants:
            raise ValueError(
                f"the levels {list(variants[name].levels.values())} and {list(levels)} give two variants one name, "
                f"{name!r}; name a level otherwise"
            )
        variants[name] = Variant(chosen, settings)
    return variants


def _only(
    given: Any, factors: dict[str, list[str]], variants: dict[str, Variant]
) -> tuple[dict[str, list[str]], dict[str, Variant]]:
    """ONLY: the levels of factors, or the variants, that a scale keeps; a combination goes with its parts."""
    if factors:
        for factor, levels in group("ONLY", given, "{batch: ['4', '32']}").items():
            check_key("factor in ONLY", factor, factors)
            factors = {**factors, factor: _kept(f"ONLY of factor {factor!r}", levels, factors[factor])}
        kept = {
            name: each
            for name, each in variants.items()
            if all(level in factors[factor] for factor, level in each.levels.items())
        }
        return factors, kept
    trained = [name for name, each in variants.items() if each.combines is None]
    names = _kept("ONLY", given, trained)
    kept = {
        name: each
        for name, each in variants.items()
        if set(each.combines.of if each.combines else [name]) <= set(names)
    }
    return factors, kept


def _kept(where: str, given: Any, known: Sequence[str]) -> list[str]:
    """Those of the known names that a list has, in their own order."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} must be a list of names, got {shown(given)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has {shown(name)}, which is none of {', '.join(known)}{hint(name, known)}")
    return [name for name in known if name in given]


def _checked_id(given: str) -> str:
    """ID, one or several with commas between, such as ``P0.fig5``."""
    for each in given.split(",") if given else ():
        if not re.fullmatch(r"[A-Z][A-Z0-9]*\.\w+", each.strip()):
            raise ValueError(f"ID must be a paper and a table or figure in it, such as P0.fig5, got {shown(given)}")
    return ", ".join(each.strip() for each in given.split(",")) if given else ""


def _check_number(variants: int, seeds: int) -> None:
    """Refuse more jobs than anybody runs, before they are listed."""
    if variants * seeds > _MOST_JOBS:
        raise ValueError(
            f"{counted(variants, 'variant')} with {counted(seeds, 'seed')} are more than {counted(_MOST_JOBS, 'job')}"
        )


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
