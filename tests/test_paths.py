"""Rules about paths hold for paths that lead nowhere, too."""

from pathlib import Path

from umer1.paths import path_problems, same_place


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
