"""Bounds of numbers; rules about paths hold for paths that lead nowhere, too."""

from pathlib import Path
from types import SimpleNamespace

from umer1.rules import bound_problems, path_problems, same_place


def test_each_number_below_its_bound_is_a_violation():
    settings = SimpleNamespace(lines=0, words=1, letters=None, pages=-1)
    names = ("lines", "words", "letters", "pages")
    assert bound_problems(settings, 1, *names) == ["lines=0 must be 1 or above", "pages=-1 must be 1 or above"]
    assert bound_problems(settings, 0, *names) == ["pages=-1 must be 0 or above"]


def test_a_rule_is_one_violation_whatever_the_system_says(tmp_path):
    assert path_problems("load", None, Path.is_dir, "is no folder") == []
    assert path_problems("load", tmp_path, Path.is_dir, "is no folder") == []
    assert path_problems("load", tmp_path / "x", Path.is_dir, "is no folder") == [f"load={tmp_path}/x is no folder"]
    refused = tmp_path / ("x" * 300)
    wanted = [f"load={refused} cannot be looked at: File name too long"]
    assert path_problems("load", str(refused), Path.is_dir, "is no folder") == wanted


def test_places_are_compared_behind_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert same_place(tmp_path / "link" / "new", tmp_path / "new")
    assert not same_place(tmp_path / "circle", tmp_path / ("x" * 300))
