"""A reader follows a caption, a step, a run, a loss or an option through few files."""

from __future__ import annotations

import sys
from pathlib import Path

import journeys
import pytest

import capdistill as cd

LIMITS = {"caption": 16, "step": 13, "fit": 17, "loss_name": 16, "option": 13}


@pytest.mark.parametrize("name", LIMITS)
def test_a_journey_enters_few_files(name: str) -> None:
    files = journeys.JOURNEYS[name]()
    assert len(files) <= LIMITS[name], "\n".join([f"{name}: {len(files)} files", *files])


def test_every_journey_has_a_limit() -> None:
    assert LIMITS.keys() == journeys.JOURNEYS.keys()


# -- the tracer counts what it is for --------------------------------------------------------


def test_a_file_is_counted_once_and_tracing_ends_with_the_block() -> None:
    before = sys.gettrace()
    with journeys.Tracer() as tracer:
        cd.losses.create("token")
        cd.losses.create("token")
    cd.losses.create("feature")
    assert tracer.files[0] == "registry.py"
    assert tracer.files.count("losses/token.py") == 1
    assert "losses/feature.py" not in tracer.files
    assert sys.gettrace() is before


def test_the_body_of_a_module_that_is_imported_is_no_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "part.py").write_text("def call():\n    return 1\n\n\nONE = call()\n")
    monkeypatch.setattr(journeys, "PACKAGE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    journeys._file.cache_clear()
    try:
        with journeys.Tracer() as imported:
            import part
        with journeys.Tracer() as called:
            part.call()
    finally:
        journeys._file.cache_clear()
        sys.modules.pop("part")
    assert (imported.files, called.files) == ([], ["part.py"])


def test_what_a_leaf_calls_is_not_counted() -> None:
    with journeys.Tracer(leaves=[cd.losses.create.__func__]) as tracer:
        cd.losses.create("token")
    assert tracer.files == ["registry.py"]


def test_a_value_is_followed_through_variables_and_containers() -> None:
    holds = journeys.holding(["rate", 0.5], [cd.TokenKD])
    assert all(map(holds, [0.5, "rate", {"rate": 1}, [({"a": 0.5},)], cd.TokenKD, cd.TokenKD()]))
    assert not any(map(holds, [0.25, "rates", {"a": [1]}, cd.FeatureKD, object()]))
    with journeys.Tracer(carries=journeys.holding([0.25])) as tracer:
        cd.losses.create("token", temperature=0.25)
        cd.losses.create("feature")
    assert tracer.files[:2] == ["registry.py", "losses/token.py"]
    assert "losses/feature.py" not in tracer.files
