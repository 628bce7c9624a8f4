"""What `capdistill score` finds in COCO's files, as plain data: one system, or two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from capdistill.errors import DataError
from capdistill.metrics import CaptionScorer, Scores, diversity, read_coco_results
from capdistill.metrics.captions import first
from capdistill.metrics.significance import paired

SCHEMA = "capdistill.scores/1"


def score_files(
    references: str,
    results: str,
    metrics: Sequence[str] | None,
    against: str | None = None,
    samples: int = 1000,
) -> dict[str, Any]:
    """What the JSON says of the files, scores of each image included.

    Args:
        references: A COCO captions file.
        results: The captions to score.
        metrics: As for `CaptionScorer`.
        against: Another system's captions of the same images.
        samples: Of the images, for the intervals of the two systems.

    Raises:
        DataError: as `read_coco_results`; or the two results are not of the same images.
    """
    read = read_coco_results(references, results)
    other = read_coco_results(references, against).captions if against else None
    if other is not None:
        _require_same_images(results, read.captions, str(against), other)
    scorer = CaptionScorer(read.references, metrics=metrics)
    scores = scorer(read.captions)
    found = {
        "schema": SCHEMA,
        "images": len(read.captions),
        "images_without_result": len(read.without),
        "notes": list(scores.notes),
        **_system(read.captions, scores),
    }
    if other is not None:
        systems = {"results": (read.captions, scores), "against": (other, scorer(other))}
        found["against"] = _system(*systems["against"])
        found |= _differences(read.references, systems, samples)
    return found


def _system(captions: Mapping[str, str], scores: Scores) -> dict[str, Any]:
    return {
        "scores": dict(scores),
        "health": diversity(captions).to_json(),
        "per_image": {name: dict(each) for name, each in scores.per_image.items()},
    }


def _differences(
    references: Mapping[str, list[str]], systems: Mapping[str, tuple[Any, Scores]], samples: int
) -> dict[str, Any]:
    """The results' scores minus the other's, in the words of a comparison's rows."""
    drawn = paired(references, systems, [("against", "results")], samples)[0]
    settings = drawn.to_json()
    return {
        "bootstrap": {key: settings[key] for key in ("samples", "seed", "confidence", "notes")},
        "intervals": {
            name: {"results": list(each.b_interval), "against": list(each.a_interval)}
            for name, each in drawn.items()
        },
        "differences": {
            name: {
                "difference": each.difference,
                "interval": list(each.interval),
                "p_value": each.p_value,
            }
            for name, each in drawn.items()
        },
    }


def _require_same_images(
    results: str, ours: Mapping[str, str], against: str, theirs: Mapping[str, str]
) -> None:
    here = [image for image in ours if image not in theirs]
    there = [image for image in theirs if image not in ours]
    if here or there:
        raise DataError(
            f"{results} and {against} are not of the same images, so their scores can not be "
            f"compared. Only in the first: {first(here)}. Only in the second: {first(there)}. Give "
            "both one caption for each of the same images; '' is a caption."
        )
