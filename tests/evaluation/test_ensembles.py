"""An ensemble is evaluated, measured and compared like any other captioner."""

from __future__ import annotations

import pytest

import capdistill as cd
from capdistill.teachers import Ensemble


@pytest.fixture(scope="module")
def data():
    return cd.data.sample().val.subset(3)


@pytest.fixture(scope="module")
def ensemble(data) -> Ensemble:
    tokenizer = cd.WordTokenizer.train(data.captions, min_count=1)
    roles = ("teacher", "student")
    members = {r: cd.Captioner.create(f"debug_{r}", tokenizer=tokenizer) for r in roles}
    return Ensemble(members).eval()


def test_size_and_time_are_those_of_all_members(data, ensemble, monkeypatch):
    options = {"metrics": ["bleu"], "device": "cpu", "precision": "fp32", "progress": False}
    found = cd.evaluate(ensemble, data, **options)
    monkeypatch.setattr("capdistill.evaluation.measure.cpu_memory", lambda *_, **__: found.memory)
    each = [cd.evaluate(member, data, **options) for member in ensemble.members.values()]
    assert found.name == "ensemble of 2: teacher, student"
    assert found.parameters == sum(one.parameters for one in each)
    assert found.disk_bytes == pytest.approx(sum(one.disk_bytes for one in each), abs=1000)
    assert found.memory is not None
    assert found.latency_ms.n == 3
    assert found.time_comparable
    shown = " ".join(str(found).split())
    assert "2 models (teacher, student) that caption together: parameters, size" in shown
    assert found.to_json()["notes"] == list(found.notes)


def test_an_ensemble_is_compared_with_its_student(data, ensemble, tmp_path):
    student = ensemble.members["student"]
    options = {"metrics": ["bleu"], "measure": False, "device": "cpu", "progress": False}
    found = cd.compare(ensemble, student, data, beam_size=2, precision="fp32", **options)
    assert found.models["teacher"]["captions"] == {
        image.image_id: text
        for image, text in zip(
            data.examples,
            ensemble.caption([example.path for example in data.examples], beam_size=2),
            strict=True,
        )
    }
    page = found.save(tmp_path).read_text()
    assert "ensemble of 2: teacher, student" in page
    assert "caption together" in page


def test_attention_maps_leave_an_ensemble_out(data, ensemble):
    pytest.importorskip("matplotlib")
    student = ensemble.members["student"]
    options = {"metrics": ["bleu"], "measure": False, "device": "cpu", "progress": False}
    found = cd.compare(ensemble, student, data, attention=1, **options)
    assert [title.split(":")[0] for title in found.pictures] == ["student"]
