"""The pages of docs/: their snippets run as they are printed, and their tables leave nothing out."""

import functools
import operator
import re
from pathlib import Path

import pytest
from documentation import run_snippet, snippets

import fbn_plugin
from fbn_plugin.engine.studies.document import anchor

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("snippet", [snippet for page in PAGES for snippet in snippets(page)])
def test_snippet_runs(snippet):
    run_snippet(snippet)


def test_every_file_that_is_named_exists():
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, ROOT / "README.md", *ROOT.glob("tools/*.py"))]
    configs = {name for text in texts for name in re.findall(r"configs/[\w/-]+\.yaml", text)}
    others = {name for text in texts for name in re.findall(r"(?:tools|examples)/\w+\.py\b", text)}
    assert len(configs) > 3 and len(others) > 8
    assert [name for name in sorted(configs | others) if not (ROOT / name).is_file()] == []


def test_links_lead_to_files_and_headings_that_are_there():
    """By the rule of GitHub, and of MyST, for the anchors of headings."""
    found = 0
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.md")]:
        for name, mark, heading in re.findall(
            r"\]\((?!\w+:)([^)#\s]*)(#?)([^)\s]*)\)", page.read_text(encoding="utf-8")
        ):
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {name}"
            if mark and target.suffix == ".md":
                found += 1
                assert heading in headings_of(target), f"{page.name}: {name}#{heading}"
    assert found > 60


@functools.cache
def headings_of(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {anchor(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)) for line in lines}


def test_shell_examples_quote_what_a_shell_reads_otherwise():
    """Brackets above all, as in specs: unquoted they are a syntax error."""
    files = [*PAGES, *ROOT.glob("*.md"), *ROOT.glob("configs/**/*.md"), ROOT / "fbn_plugin" / "__main__.py"]
    files += [path for folder in ("tools", "examples") for path in (ROOT / folder).glob("*.py")]
    commands = []
    for path in files:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        # at the begin of a line, in a block or a docstring, or between backticks
        found = re.findall(
            r"(?:^ *|`)((?:[A-Z_]+=\S+ )*(?:[\w./]*python3?|torchrun|make|pip) [^\n`]*)", text, re.MULTILINE
        )
        commands += [f"{path.relative_to(ROOT)}: {command}" for command in found if " = " not in command]
    bare = {command: re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition(" #")[0]) for command in commands}
    assert len(commands) > 60
    assert not [command for command, rest in bare.items() if set("()<>;&|") & set(rest)]
    assert any("FBN(t_sigma=4)" in command for command in commands)


def test_the_table_of_norms_is_the_registry():
    table = re.findall(r"^\| (`.*?) \|", text_of("norms"), re.MULTILINE)
    assert {name for name, _ in fbn_plugin.NORMS} <= set(re.findall(r"`([\w-]+)`", "".join(table)))


def test_the_api_page_has_every_public_name():
    documented = set(re.findall(r"fbn_plugin\.((?:ops\.)?\w+)$", text_of("api"), re.MULTILINE))
    public = {*fbn_plugin.__all__, *(f"ops.{name}" for name in fbn_plugin.ops.__all__)} - {"ops"}
    assert documented == public


def flatten(cfg, prefix: str = "") -> dict:
    keys = {}
    for name, value in cfg.items():
        group = isinstance(value, dict) and value  # an empty one is the user's to fill
        keys |= flatten(value, f"{prefix}{name}.") if group else {prefix + name: value}
    return keys


def keys_of(part: str) -> dict[str, str]:
    """Key -> value in the tables between a heading and the next of its rank."""
    section = re.search(rf"^## {part}$(.*?)(?=^## |\Z)", text_of("config-keys"), re.DOTALL | re.MULTILINE)[1]
    return dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", section, re.MULTILINE))


@pytest.mark.parametrize("part", ["Detection", "Classification"])
def test_every_config_key_is_there_with_its_default(part):
    if part == "Detection":
        from fbn_plugin.engine.run.detection_keys import detection_config as defaults
    else:
        pytest.importorskip("timm")
        from fbn_plugin.engine.classification.config import classification_config as defaults
    assert keys_of(part) == {key: repr(value) for key, value in flatten(defaults()).items()}


def test_the_table_against_timms_script_names_its_arguments_once_and_keys_that_exist():
    pytest.importorskip("timm")
    from fbn_plugin.engine.classification.config import classification_config

    page = text_of("classification")
    rows = re.findall(
        r"^\| (.*?) \| (.*) \|$", page.partition("## Against")[2].partition("### Only here")[0], re.MULTILINE
    )
    arguments = re.findall(r"`(--[\w-]+|data)`", " ".join(row[0] for row in rows))
    assert len(arguments) == len(set(arguments)) == 173  # of timm 1.0.31
    answers = [answer for argument, answer in rows if argument.startswith("`")]
    assert all(answer.startswith("no") or "`" in answer or "always" in answer for answer in answers)
    named = set(re.findall(r"`([A-Z][A-Z_]*(?:\.[A-Z_]+)+|LOGGERS|SEED|OUTPUT_DIR)`", page))
    assert len(named) > 80
    for key in named:
        functools.reduce(operator.getitem, key.split("."), classification_config())


def test_the_config_page_names_the_keys_that_detectron2_is_given():
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg

    from fbn_plugin.engine.detectron2.config import add_config

    cfg = get_cfg()
    plain = set(flatten(cfg))
    add_config(cfg)
    added = set(flatten(cfg)) - plain
    assert added and added <= set(re.findall(r"`([\w.]+)`", text_of("config-keys").split("###")[0]))
