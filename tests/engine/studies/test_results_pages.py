"""The pages of docs/results: those of the project are what is generated, and what they say of kept studies."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from synthetic_study import TOP1, draw, plain_study, product_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.catalog import Experiment, read_catalog
from fbn_plugin.engine.studies.document import anchor
from fbn_plugin.engine.studies.kept import keep_again, keep_study, kept_file
from fbn_plugin.engine.studies.outcomes import Claim, KernelDensity, LayerRange, Printed
from fbn_plugin.engine.studies.results_pages import read_kept, render_results, write_results
from fbn_plugin.engine.studies.study_file import Described, read_study
from fbn_plugin.engine.studies.wanted_data import Wanted

ROOT = Path(__file__).parents[3]


def test_the_pages_of_this_project_are_those_that_are_generated():
    catalog = read_catalog(ROOT / "configs/experiments", ROOT)
    expected = render_results(catalog, read_kept(catalog, ROOT))
    folder = ROOT / "docs" / "results"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.keys() == expected.keys(), "python tools/reproduce.py report"
    assert [name for name, content in expected.items() if found[name] != content] == []


def test_every_kept_file_is_of_an_experiment():
    catalog = read_catalog(ROOT / "configs/experiments", ROOT)
    known = {kept_file(ROOT, each.path, scale) for each in catalog for scale in each.scales}
    assert set((ROOT / "benchmarks/papers").glob("*.json")) <= known


def test_kept_files_have_the_words_and_comparisons_of_their_study_files(tmp_path):
    catalog = read_catalog(ROOT / "configs/experiments", ROOT)
    paths = {kept_file(ROOT, each.path, scale): (each.path, scale) for each in catalog for scale in each.scales}
    for path in (ROOT / "benchmarks/papers").glob("*.json"):
        file, scale = paths[path]
        copied = shutil.copy(path, tmp_path)
        keep_again(read_study(file, ROOT, scale=scale).study, copied)
        assert Path(copied).read_bytes() == path.read_bytes(), "python tools/reproduce.py keep ID --scale NAME --again"


@pytest.fixture
def catalog(monkeypatch):
    """P0.fig5, which is run at the scale cpu, and P2.tab1, which is not."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)

    def experiment(name, title, not_run=""):
        study = dataclasses.replace(
            plain_study(("BN", "FBN"), seeds=4),
            title=title,
            id=name,
            source="A paper, Fig. 5",
            metrics={"top1": TOP1},
            printed={"top1": {"BN": Printed(82.0), "FBN": Printed(84.0)}},
            claims=[Claim("higher", "top1", "FBN", "BN")],
        )
        wanted = [Wanted("imagenet", "ImageNet 2012")]
        scales = {
            scale: Described(dataclasses.replace(study, scale=scale), wanted, not_run)
            for scale in ("paper", "cpu", "smoke")
        }
        return Experiment(Path(f"{name.replace('.', '_').lower()}.yaml"), [name], scales)

    return [experiment("P0.fig5", "Accuracy"), experiment("P2.tab1", "Scales", "Two weeks of eight GPUs.")]


def kept_at(root, experiment, scale, means):
    study = experiment.scales[scale].study
    outcomes = draw(study, sd=0.1, mean=lambda levels, name: means[name])
    keep_study(study, outcomes, kept_file(root, experiment.path, scale))


def test_many_variants_are_told_by_what_is_compared(catalog, tmp_path):
    study = product_study(norms=("BN", "FBN"), batches=("2", "4", "8", "16"), sets=("one",), seeds=4)
    study = dataclasses.replace(study, id="P0.fig5", scale="cpu", factors=dict(reversed(study.factors.items())))
    catalog[0].scales["cpu"] = dataclasses.replace(catalog[0].scales["cpu"], study=study)
    means = {"2": 60.0, "4": 63.0, "8": 70.0, "16": 66.0}
    outcomes = draw(study, sd=0.01, mean=lambda levels, _: means[levels["batch"]] + 10 * (levels["norm"] == "FBN"))
    keep_study(study, outcomes, kept_file(tmp_path, catalog[0].path, "cpu"))
    index = render_results(catalog, read_kept(catalog, tmp_path))["index.md"].decode()
    cell = next(line for line in index.splitlines() if "P0.fig5" in line).split("|")[5].strip()
    ends = [
        float(number)
        for number in re.fullmatch(r"top-1 accuracy: BN: (.+) to (.+); FBN: (.+) to (.+) \(%\)", cell).groups()
    ]
    assert ends == pytest.approx([60, 70, 70, 80], abs=2)


def test_what_a_paper_says_is_read_from_the_study_file_of_today(catalog, tmp_path):
    kept_at(tmp_path, catalog[0], "cpu", {"BN": 70.0, "FBN": 60.0})
    described = catalog[0].scales["cpu"]
    claims, printed = [Claim("lower", "top1", "FBN", "BN")], {"top1": {"BN": Printed(71.0)}}
    study = dataclasses.replace(described.study, claims=claims, printed=printed, description="other words")
    catalog[0].scales["cpu"] = dataclasses.replace(described, study=study)
    kept = read_kept(catalog, tmp_path)["P0.fig5", "cpu"].study
    assert (kept.claims, kept.printed, kept.description) == (claims, printed, described.study.description)
    row = next(
        line
        for line in render_results(catalog, read_kept(catalog, tmp_path))["index.md"].decode().splitlines()
        if "P0.fig5" in line
    )
    assert "BN: 71 (%)" in row and "| reproduced on the reduced setting: 1 of 1 claim reproduced |" in row


def test_an_index_of_all_with_verdicts_and_reasons(catalog, tmp_path):
    kept_at(tmp_path, catalog[0], "cpu", {"BN": 70.0, "FBN": 60.0})
    files = render_results(catalog, read_kept(catalog, tmp_path))
    index = files["index.md"].decode()
    row = next(line for line in index.splitlines() if "P0.fig5" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    link = "[P0.fig5](p0.md#p0fig5-accuracy-cpu-scale-reduced)"
    assert cells[:4] == [link, "Accuracy", "cpu, reduced", "BN: 82; FBN: 84 (%)"]
    assert "## P0.fig5: Accuracy (cpu scale, reduced)" in files["p0.md"].decode()
    assert (
        re.fullmatch(r"top-1 accuracy: BN: 70\.\d+ ± 0\.\d+; FBN: 60\.\d+ ± 0\.\d+ \(%\)", cells[4]) and cells[5] == "4"
    )
    assert (
        cells[6] == "< 0.001" and cells[7] == "not reproduced on the reduced setting: 0 of 1 claim reproduced"
    )  # negative results like others
    assert cells[8] == "[picture](p0_fig5-cpu-top1-by-variant.svg)" and "p0_fig5-cpu-top1-by-variant.svg" in files
    assert cells[9] == "`python tools/reproduce.py run P0.fig5 --scale cpu`"
    row = next(line for line in index.splitlines() if "P2.tab1" in line)
    assert "not run: Two weeks of eight GPUs" in row and "BN: 82; FBN: 84" in row
    heading = next(line for line in files["p2.md"].decode().splitlines() if line.startswith("## P2.tab1"))
    assert f"(p2.md#{anchor(heading.strip('# '))})" in row
    assert "## P2: Revisiting Batch Norm Initialization" in index and "```{toctree}\n:hidden:\n\np0\np2\n```" in index

    page = files["p0.md"].decode()
    assert "## P0.fig5: Accuracy (cpu scale, reduced)" in page and "benchmarks/papers/p0_fig5-cpu.json" in page
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert "p0_fig5-cpu-top1-curves.svg" in pictures and set(pictures) == {name for name in files if ".svg" in name}
    assert "**Not reproduced**, at a reduced scale." in page and "imagenet: ImageNet 2012" in page
    assert "**Not run**: Two weeks of eight GPUs." in files["p2.md"].decode()


def test_two_scales_are_two_rows_and_the_full_one_is_not_called_reduced(catalog, tmp_path):
    for scale in ("cpu", "paper"):
        kept_at(tmp_path, catalog[0], scale, {"BN": 60.0, "FBN": 70.0})
    index = render_results(catalog, read_kept(catalog, tmp_path))["index.md"].decode()
    rows = [line for line in index.splitlines() if "P0.fig5" in line]
    assert len(rows) == 2 and "**reproduced: 1 of 1 claim reproduced**" in rows[0]
    assert "reduced" not in rows[0] and "--scale paper" in rows[0]
    assert "reproduced on the reduced setting: 1 of 1 claim reproduced" in rows[1]


def test_old_pages_go_and_a_file_of_another_study_is_refused(catalog, tmp_path):
    kept_at(tmp_path, catalog[0], "cpu", {"BN": 60.0, "FBN": 70.0})
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("p7.md", "p0_fig5-cpu-old-by-variant.svg"):
        (folder / name).touch()
    own = [folder / name for name in ("notes.md", "picture.svg", "p0.txt")]
    for path in own:
        path.touch()
    files = write_results(catalog, read_kept(catalog, tmp_path), folder)
    assert sorted(folder.iterdir()) == sorted([*files, *own])
    kept_file(tmp_path, catalog[0].path, "cpu").rename(kept_file(tmp_path, catalog[1].path, "cpu"))
    with pytest.raises(ValueError, match=r"is of P0\.fig5: Accuracy .*, and not of P2\.tab1 at the scale cpu"):
        read_kept(catalog, tmp_path)


def test_the_picture_of_the_papers_form_comes_first(catalog, tmp_path):
    kept_at(tmp_path, catalog[0], "cpu", {"BN": 60.0, "FBN": 70.0})
    kept = read_kept(catalog, tmp_path)
    ((key, entry),) = kept.items()
    kernel = KernelDensity("conv1", 3, 2.0, 10, 7, [-3.0, 0.0, 3.0], [0.1, 0.2])
    for changes, picture in (
        ({"layers": [LayerRange("conv1", -4.0, 5.0, 0.25, {"50": (-0.5, 0.5)})]}, "layers"),
        ({"kernels": [kernel]}, "kernels"),
    ):
        outcomes = [dataclasses.replace(each, **changes) for each in entry.outcomes]
        files = render_results(catalog, {key: dataclasses.replace(entry, outcomes=outcomes)})
        assert f"[picture](p0_fig5-cpu-{picture}.svg)" in files["index.md"].decode()
        assert f"p0_fig5-cpu-{picture}.svg" in files
