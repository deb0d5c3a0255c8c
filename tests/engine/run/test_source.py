"""The commit that a package runs from: clean, changed, not tracked, no checkout."""

import os
import subprocess

import pytest

from fbn_plugin.engine.run.source import source_commit


def git(folder, *arguments):
    names = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *names, "-C", folder, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_and_what_is_none(tmp_path, monkeypatch):
    try:
        git(tmp_path, "init", "--quiet")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    package, installed = tmp_path / "package", tmp_path / "lib/package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    git(tmp_path, "add", "package")
    assert source_commit(package) is None  # nothing is committed yet
    git(tmp_path, "commit", "--quiet", "--message", "first")
    source_commit.cache_clear()
    monkeypatch.setenv("GIT_DIR", os.fspath(tmp_path / "elsewhere"))  # as git's hooks have it
    assert source_commit(package) == (git_head(tmp_path), False)
    assert source_commit(installed) is None  # in a checkout, and no part of it
    source_commit.cache_clear()
    (package / "__init__.py").write_text("changed = True")
    assert source_commit(package) == (git_head(tmp_path), True)
    monkeypatch.setenv("PATH", "")
    source_commit.cache_clear()
    assert source_commit(package) is None


def git_head(folder):
    return (folder / ".git" / (folder / ".git/HEAD").read_text().split()[1]).read_text().strip()
