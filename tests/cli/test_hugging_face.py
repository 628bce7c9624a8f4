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


@pytest.mark.parametrize("trimmed", [False, True])
def test_it_teaches_a_student(trimmed, blip, tmp_path, capsys, monkeypatch):
    whole = cd.data.sample()
    few = cd.data.Splits(
        {"train": whole.train.subset(4), "val": whole.val.subset(2)}, name="sample"
    )
    monkeypatch.setattr(cd.data, "sample", lambda: few)
    out = tmp_path / "student"
    sets = ["train.epochs=1", "train.batch_size=2", "train.progress=false", 'losses={"token": {}}']
    sets += ["tokenizer.name=teacher", "tokenizer.max_length=30"] if trimmed else []
    monkeypatch.chdir(blip.parent)
    teacher = f"hf:{blip.name}"  # of a directory, it means the same
    words = ["distill", "--teacher", teacher, "--student", "debug_student", "--out", str(out)]
    words += ["--data", "sample", "--device", "cpu", *(w for s in sets for w in ("--set", s))]
    assert main(words) == 0, capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["teacher"] == str(blip)
    student, theirs = cd.Captioner.load(out / "best"), cd.teachers.load(blip)
    expected = theirs.trimmed(few.train.captions, 30) if trimmed else theirs.tokenizer
    assert student.tokenizer == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["tokenizer.name=teacher", "tokenizer.min_count=3"],
            "'min_count' is an option of the tok",
        ),
        (["tokenizer.name=teacher", "tokenizer.end=a"], "'end' is an option of the tokenizer 'hug"),
        (["tokenizer.name=teacher"], "it has a WordTokenizer. Leave the section out"),
    ],
)
def test_only_a_teacher_of_pieces_gives_them(options, message, tmp_path, capsys):
    cd.Captioner.create("debug_teacher", tokenizer=cd.WordTokenizer(["a"])).save(tmp_path / "t")
    words = ["distill", "--teacher", str(tmp_path / "t"), "--student", "debug_student"]
    words += ["--data", "sample", "--out", str(tmp_path / "out")]
    assert main([*words, *(w for each in options for w in ("--set", each))]) == 1
    assert message in capsys.readouterr().err


def test_a_name_on_the_hub_has_a_prefix(monkeypatch, tmp_path, capsys):
    names = []

    def load(name_or_path_or_module):
        names.append(name_or_path_or_module)
        raise ConfigError("not reached")

    monkeypatch.setattr(loading, "from_pretrained", load)
    with pytest.raises(ConfigError, match="not reached"):
        cd.teachers.load("hf:some/blip")
    words = ["--student", "debug_student", "--data", "sample", "--out", str(tmp_path / "out")]
    for teachers in (["hf:some/blip"], ["hf:some/git", "hf:other"]):
        main(["distill", "--teacher", *teachers, *words])
        assert "not reached" in capsys.readouterr().err
    assert names == ["some/blip", "some/blip", "some/git"]


def test_a_run_is_not_taken_for_one(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "train"}')
    with pytest.raises(cd.errors.CheckpointError, match=r"captioner\.json"):
        cd.teachers.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="no captioner that is supported"):
        cd.teachers.load(tmp_path)
