"""A directory of Hugging Face transformers stands where a captioner's directory may."""

import json

import pytest

pytest.importorskip("transformers")

import torch

import capdistill as cd
from capdistill.cli import main
from capdistill.errors import ConfigError
from capdistill.teachers.huggingface import loading
from tests.teachers.huggingface import tiny


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("blip")
    module, processor, tokenizer = tiny.make("blip")
    with torch.no_grad():
        module.text_decoder.get_output_embeddings().bias[3] = 9.0  # captions end
    for part in (module, processor, tokenizer):
        part.save_pretrained(directory)
    return directory


@pytest.fixture
def photo():
    return str(cd.data.sample().train.examples[0].path)


def test_it_captions_photos(blip, photo, capsys):
    options = ["--min-length", "2", "--max-length", "8"]
    assert main(["caption", str(blip), photo, "--json", "--device", "cpu", *options]) == 0
    [row] = json.loads(capsys.readouterr().out)
    expected = cd.teachers.load(blip).caption(photo, min_length=2, max_length=8)
    assert row["caption"] == expected


def test_it_teaches_a_student(blip, tmp_path, capsys, monkeypatch):
    whole = cd.data.sample()
    few = cd.data.Splits(
        {"train": whole.train.subset(4), "val": whole.val.subset(2)}, name="sample"
    )
    monkeypatch.setattr(cd.data, "sample", lambda: few)
    out = tmp_path / "student"
    sets = ["train.epochs=1", "train.batch_size=2", "train.progress=false", 'losses={"token": {}}']
    words = ["distill", "--teacher", str(blip), "--student", "debug_student", "--out", str(out)]
    words += ["--data", "sample", "--device", "cpu", *(w for s in sets for w in ("--set", s))]
    assert main(words) == 0, capsys.readouterr().err
    student = cd.Captioner.load(out / "best")
    assert list(student.tokenizer.vocabulary) == list(cd.teachers.load(blip).tokenizer.vocabulary)


def test_a_name_on_the_hub_has_a_prefix(monkeypatch):
    names = []
    monkeypatch.setattr(
        loading, "from_pretrained", lambda name: names.append(name) or torch.nn.Module()
    )
    cd.teachers.load("hf:some/blip")
    assert names == ["some/blip"]


def test_a_run_is_not_taken_for_one(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "train"}')
    with pytest.raises(cd.errors.CheckpointError, match=r"captioner\.json"):
        cd.teachers.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="no captioner that is supported"):
        cd.teachers.load(tmp_path)
