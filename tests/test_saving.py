"""The directory of a saved captioner: it loads alone and exactly, or says why not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import capdistill as cd
from capdistill import decoders, encoders
from capdistill.captioner import Captioner
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels
from capdistill.files import temporary_name
from capdistill.tokenizer import WordTokenizer
from tests.toy_captioner import WORDS, LetterTokenizer, Patches, batch_of, pictures, tokenizer, toy

FILES = ["captioner.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    toy().save(tmp_path / "toy")
    return tmp_path / "toy"


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def edit(directory: Path, change) -> None:
    path = directory / "captioner.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


# Round trip


def test_a_captioner_comes_back_bit_for_bit_and_says_the_same(saved):
    captioner, again = toy(), Captioner.load(saved)
    assert sorted(path.name for path in saved.iterdir()) == FILES
    assert same_tensors(captioner, again)
    assert again.caption(pictures()) == captioner.caption(pictures())
    assert (again.tokenizer, again.name) == (captioner.tokenizer, "toy")
    assert not any(part.training for part in again.modules())


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")])
def test_loading_depends_on_no_setting_of_torch_and_changes_none(saved, around):
    captioner, state = toy(), torch.get_rng_state()
    torch.set_default_dtype(torch.float16)  # as another library may have left it
    try:
        with around():
            again = Captioner.load(saved)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_tensors(captioner, again)
    assert not any(value.is_inference() for value in again.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_captioner_is_saved_as_it_was(saved, tmp_path):
    Captioner.load(str(saved)).save(str(tmp_path / "again"))
    mine, theirs = (
        json.loads((d / "captioner.json").read_text()) for d in (saved, tmp_path / "again")
    )
    assert theirs["encoder"]["kwargs"].pop("weights") is False
    assert mine == theirs
    for name in FILES[1:]:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_changes_nothing_and_may_be_repeated(tmp_path):
    captioner = toy().train()
    before = {key: value.clone() for key, value in captioner.state_dict().items()}
    for _ in range(2):
        captioner.save(tmp_path / "deep" / "toy")
    assert all(part.training for part in captioner.modules())
    assert all(torch.equal(before[key], value) for key, value in captioner.state_dict().items())
    assert same_tensors(Captioner.load(tmp_path / "deep" / "toy"), captioner)


def test_loading_leaves_the_callers_chance_of_captions_alone(saved):
    """What is loaded does not depend on the random state it was loaded in."""
    torch.manual_seed(5)
    first = Captioner.load(saved)
    torch.manual_seed(6)
    assert same_tensors(first, Captioner.load(saved))


@pytest.mark.parametrize("preset", ["debug_teacher", "debug_student"])
def test_presets_come_back(preset, tmp_path):
    torch.manual_seed(0)
    captioner = Captioner.create(preset, tokenizer=tokenizer())
    captioner.save(tmp_path / preset)
    again = Captioner.load(tmp_path / preset)
    assert same_tensors(captioner, again)
    assert again.caption(pictures(2, 40)) == captioner.caption(pictures(2, 40))


# How parts are made again


def test_weights_are_never_asked_for_again(saved):
    assert toy().encoder.asked_for is True
    assert Captioner.load(saved).encoder.asked_for is False


@pytest.mark.parametrize("flag", [True, "no/such/file.pt", Path("no/such/file.pt")])
def test_weights_that_were_given_are_never_read_again(flag, tmp_path):
    toy(encoder=encoders.create("toy-patches", weights=flag)).save(tmp_path)
    assert Captioner.load(tmp_path).encoder.asked_for is False


def test_a_switch_that_hides_in_free_arguments_is_turned_off_too(tmp_path, monkeypatch):
    class Free(Patches):
        hub_arguments = ("pretrained",)

        def __init__(self, **options):
            super().__init__(options["dim"])
            self.options = options

    monkeypatch.setitem(encoders.registry._decorated, "free", [Free])
    toy(encoder=encoders.create("free", dim=8, pretrained=True)).save(tmp_path)
    assert Captioner.load(tmp_path).encoder.options == {"dim": 8, "pretrained": False}


@pytest.mark.parametrize("value", ["softmax", True, [3.0, 4.0], "no/such/file.pt"])
@pytest.mark.parametrize("argument", ["weights", "pretrained"])
def test_an_argument_that_only_has_such_a_name_is_kept(tmp_path, monkeypatch, argument, value):
    class Weighed(Patches):
        hub_arguments = ()

        def __init__(self, weights="none", pretrained="none"):
            super().__init__()
            self.given = {"weights": weights, "pretrained": pretrained}

    monkeypatch.setitem(encoders.registry._decorated, "weighed", [Weighed])
    toy(encoder=encoders.create("weighed", **{argument: value})).save(tmp_path)
    assert Captioner.load(tmp_path).encoder.given[argument] == value


def test_a_users_encoder_names_no_weights_unless_it_says_so():
    assert cd.Encoder.hub_arguments == cd.Decoder.hub_arguments == ()
    assert encoders.get("timm").hub_arguments == ("weights",)
    assert encoders.get("torchvision").hub_arguments == ("weights",)


def test_a_decoder_may_name_its_pretrained_weights_too(tmp_path, monkeypatch):
    base = decoders.get("lstm")

    class Fetched(base):
        hub_arguments = ("checkpoint",)

        def __init__(self, dim, *, weights="softmax", checkpoint=None):
            super().__init__(dim=dim, embed=6, hidden=8, layers=1, heads=2)
            self.given = weights, checkpoint

    monkeypatch.setitem(decoders.registry._decorated, "fetched", [Fetched])
    decoder = decoders.create("fetched", dim=8, weights="sigmoid", checkpoint="hub")
    encoder = encoders.create("toy-patches")
    Captioner(encoder, decoder, tokenizer()).save(tmp_path)
    assert Captioner.load(tmp_path).decoder.given == ("sigmoid", False)


def test_hub_arguments_that_are_one_text_are_refused():
    with pytest.raises(ConfigError, match=r"must be a tuple of names: \('weights',\)"):
        type("Mine", (Patches,), {"hub_arguments": "weights"})


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        (Path("a") / "b", os.path.join("a", "b")),
        ([Path("c")], ["c"]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.arange(3), [0, 1, 2]),
        ({"a": (1, np.int8(2))}, {"a": [1, 2]}),
        ("ünï 狗", "ünï 狗"),
        (None, None),
    ],
)
def test_paths_and_numpy_values_are_kept_as_plain_ones(argument, kept, tmp_path):
    toy(encoder=encoders.create("toy-patches", note=argument)).save(tmp_path)
    note = Captioner.load(tmp_path).encoder.note
    assert note == kept
    assert type(note) is type(kept)


@pytest.mark.parametrize("argument", [{1, 2}, b"x", object(), nn.Identity()])
def test_arguments_that_no_file_can_hold_are_refused_before_anything_is_written(argument, tmp_path):
    captioner = toy(encoder=encoders.create("toy-patches", note=argument))
    with pytest.raises(ConfigError, match="arguments of the encoder do not fit in JSON"):
        captioner.save(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_part_that_no_registry_made_is_refused_before_anything_is_written(tmp_path):
    message = (
        r"the encoder Patches was not made by a registry.*Register its class "
        r"\(capdistill\.encoders\.register\).*or save with allow_unregistered=True and give the "
        r"part to Captioner\.load\(directory, encoder=\.\.\.\)"
    )
    with pytest.raises(ConfigError, match=message):
        toy(encoder=Patches()).save(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def test_a_part_that_no_registry_made_is_saved_on_request_and_given_back(tmp_path):
    captioner = toy(encoder=Patches())
    captioner.save(tmp_path, allow_unregistered=True)
    with pytest.raises(CheckpointError, match=r"unregistered encoder.*load\(directory, encoder="):
        Captioner.load(tmp_path)
    again = Captioner.load(tmp_path, encoder=Patches())
    assert same_tensors(captioner, again)
    assert again.caption(pictures()) == captioner.caption(pictures())


def test_parts_that_are_given_take_the_place_of_those_described(saved):
    edit(saved, lambda content: content["encoder"].update(name="of a plugin that is gone"))
    message = r"encoder 'of a plugin that is gone' of this captioner cannot be made here: There is"
    with pytest.raises(CheckpointError, match=message + r".*Install.*load\(directory, encoder="):
        Captioner.load(saved)
    mine = Patches()
    assert Captioner.load(saved, encoder=mine).encoder is mine
    assert same_tensors(Captioner.load(saved, encoder=mine), toy())


def test_arguments_that_a_part_no_longer_has_are_named(saved):
    edit(saved, lambda content: content["decoder"]["kwargs"].update(speed=3))
    with pytest.raises(CheckpointError, match=r"decoder 'lstm' .* cannot be made here: .*speed"):
        Captioner.load(saved)


def test_parts_that_do_not_fit_are_refused(saved):
    with pytest.raises(IncompatibleModels, match="width 6 but the decoder reads width 8"):
        Captioner.load(saved, encoder=Patches(dim=6))
    other = decoders.create("lstm", dim=8, embed=6, hidden=9, layers=1, heads=2)
    with pytest.raises(CheckpointError, match=r"has \(8, 14\), the model \(9, 15\)|has \(32"):
        Captioner.load(saved, decoder=other)


# Tokenizers


def test_a_foreign_tokenizer_must_be_given_and_then_all_is_the_same(tmp_path):
    captioner = toy(LetterTokenizer())
    captioner.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[:2]
    message = (
        r"of the class tests\.toy_captioner\.LetterTokenizer, "
        r".*load\(directory, tokenizer=\.\.\.\)"
    )
    with pytest.raises(CheckpointError, match=message):
        Captioner.load(tmp_path)
    again = Captioner.load(tmp_path, tokenizer=LetterTokenizer())
    assert same_tensors(captioner, again)
    assert again.caption(pictures()) == captioner.caption(pictures())


def test_the_save_method_of_a_foreign_tokenizer_is_not_taken_for_ours(tmp_path):
    class Saves(LetterTokenizer):
        def save(self, path):
            raise AssertionError("it may write anything, anywhere")

    toy(Saves()).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"Saves.*load\(directory, tokenizer="):
        Captioner.load(tmp_path)


def test_an_older_tokenizer_in_the_directory_is_not_taken_for_the_foreign_one(saved):
    toy(LetterTokenizer()).save(saved)
    assert (saved / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="LetterTokenizer"):
        Captioner.load(saved)


@pytest.mark.parametrize("words", [(*WORDS[1:], WORDS[0]), (*WORDS[:-1], "blue"), WORDS[:-1]])
def test_a_vocabulary_of_other_words_or_order_is_refused(saved, words):
    message = (
        r"vocabulary of the WordTokenizer .* is not the one that the captioner in .* was saved"
    )
    with pytest.raises(CheckpointError, match=message):
        Captioner.load(saved, tokenizer=WordTokenizer(words))
    WordTokenizer(words).save(saved / "tokenizer.json")
    with pytest.raises(CheckpointError, match=message):
        Captioner.load(saved)


def test_a_directory_without_word_of_its_tokenizer_still_loads(saved):
    """As the first versions wrote it."""
    edit(saved, lambda content: content.pop("tokenizer"))
    assert same_tensors(Captioner.load(saved), toy())


# Case 13: names in the weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_case_13_wrapper_prefixes_are_removed_and_every_tensor_is_equal(saved, prefix):
    rewrite(saved, lambda state: {prefix + key: value for key, value in state.items()})
    again = Captioner.load(saved)
    assert same_tensors(again, toy())
    assert again.caption(pictures()) == toy().caption(pictures())


KEY = "decoder.output.weight"


def renamed(state):
    return {("decoder.out.weight" if key == KEY else key): value for key, value in state.items()}


def removed(state):
    return {key: value for key, value in state.items() if key != KEY}


def reshaped(state):
    return {**state, KEY: torch.zeros(6, 17)}


def encoder_only(state):
    return {key: value for key, value in state.items() if key.startswith("encoder.")}


def bare_encoder(state):
    return {k.removeprefix("encoder."): v for k, v in encoder_only(state).items()}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            renamed,
            [rf"1 missing: {KEY} \(6, 16\)", r"1 unexpected: decoder\.out\.weight \(6, 16\)"],
        ),
        (removed, [rf"1 missing: {KEY} \(6, 16\)"]),
        (reshaped, [rf"{KEY}: the file has \(6, 17\), the model \(6, 16\)"]),
        (encoder_only, [r"14 missing: decoder\.bias \(10,\)"]),
        (
            bare_encoder,
            [r"missing: encoder\.backbone\.0\.weight", r"9 unexpected: .*backbone\.0\.bias"],
        ),
    ],
)
def test_case_13_what_does_not_fit_is_refused_with_names_and_shapes(saved, change, messages):
    rewrite(saved, change)
    for message in messages:
        with pytest.raises(CheckpointError, match=message) as caught:
            Captioner.load(saved)
        assert str(saved / "model.safetensors") in str(caught.value)


def train_a_step(model: nn.Module) -> None:
    batch = batch_of(tokenizer(), ["a dog", "cat"], pictures(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch).logits.square().mean().backward()
    optimizer.step()


def wholly(captioner: Captioner) -> nn.Module:
    return torch.compile(captioner, backend="eager")


def in_part(captioner: Captioner) -> nn.Module:
    captioner.encoder = torch.compile(captioner.encoder, backend="eager")
    captioner.decoder = torch.compile(captioner.decoder, backend="eager")
    return captioner


def in_place(captioner: Captioner) -> nn.Module:
    captioner.compile(backend="eager")
    return captioner


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # torch.compile's own
@pytest.mark.parametrize("compiled", [wholly, in_part, in_place])
def test_case_13_a_compiled_model_is_saved_without_prefixes(compiled, tmp_path):
    captioner = toy()
    model = compiled(captioner)
    train_a_step(model)
    model.save(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(toy().state_dict())
    again = Captioner.load(tmp_path)
    assert torch.equal(again.decoder.output.weight, captioner.decoder.output.weight)
    assert not torch.equal(again.decoder.output.weight, toy().decoder.output.weight)
    assert again.caption(pictures()) == captioner.caption(pictures())


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(captioner: Captioner) -> nn.Module:
    return nn.parallel.DistributedDataParallel(captioner)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(
    "wrap",
    [
        distributed,
        lambda captioner: distributed(wholly(captioner)),
        lambda captioner: wholly(distributed(captioner)),
        lambda captioner: distributed(in_part(captioner)),
    ],
)
def test_case_13_a_distributed_model_is_saved_without_prefixes(wrap, tmp_path, one_process):
    captioner = toy()
    model = wrap(captioner)
    train_a_step(model)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    captioner.save(tmp_path / "toy")
    assert sorted(load_file(tmp_path / "toy/model.safetensors")) == sorted(toy().state_dict())
    again = Captioner.load(tmp_path / "toy")
    assert again.caption(pictures()) == captioner.eval().caption(pictures())
    save_file(state, tmp_path / "toy/model.safetensors")  # the wrapper's own names
    assert any("module" in key for key in state)
    assert same_tensors(Captioner.load(tmp_path / "toy"), again)


# Files that are not ours, or damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"format": "another/1"}', "format 'another/1'"),
        ('{"format": "capdistill.captioner/1"}', "KeyError: 'name'"),
        ('{"format": "capdistill.captioner/1", "name": 3}', "its name is not a string"),
        ('{"format": "capdistill.captioner/1", "name": "a"}', "KeyError: 'encoder'"),
        (
            '{"format": "capdistill.captioner/1", "name": "a", "encoder": {"name": "x"}}',
            "KeyError: 'kwargs'",
        ),
        (
            '{"format": "capdistill.captioner/1", "name": "", "encoder": {"name": 1, "kwargs": 2}}',
            "its encoder has no name and arguments",
        ),
    ],
)
def test_a_description_that_is_none_is_refused_by_name(saved, content, message):
    (saved / "captioner.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"captioner\.json does not describe.*{message}"):
        Captioner.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Captioner.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Captioner.load(saved)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no directory .*nowhere\. .*captioner\.json"):
        Captioner.load(tmp_path / "nowhere")


def test_the_best_of_a_run_is_named_where_the_run_itself_was_given(saved, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(saved, run / "best")
    with pytest.raises(CheckpointError, match=r"run holds no .*captioner\. Give .*run.best"):
        Captioner.load(run)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "toy").write_text("mine")
    with pytest.raises(ConfigError, match="Cannot write"):
        toy().save(tmp_path / "toy")
    assert (tmp_path / "toy").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_disk_that_is_full_leaves_the_captioner_that_was_there(saved):
    import resource

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file may grow past 1,000 bytes
    try:
        with pytest.raises(ConfigError, match=os.strerror(errno.EFBIG)):
            toy(seed=1).save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


# A saved captioner is one unit


WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def killed_while_saving(captioner: Captioner, directory: Path, event: int) -> bool:
    """Save in a child that dies just before its nth change of the file system."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    count = 0

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        count += name in WRITING or bool(writes)
        if count == event:
            os._exit(9)

    try:
        sys.addaudithook(watch)
        captioner.save(directory)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_a_writer_killed_at_any_point_leaves_the_old_captioner_or_the_new_one(tmp_path):
    other = WordTokenizer(("a", "dog", "barks", "loud", "red", "at"), max_length=6)
    old, new = toy(), toy(other, seed=1)
    seen = []
    for event in range(1, 60):
        directory = tmp_path / str(event)
        old.save(directory)
        (directory / "notes.txt").write_text("mine")
        killed = killed_while_saving(new, directory, event)
        found = Captioner.load(directory)
        is_new = found.tokenizer == new.tokenizer
        assert same_tensors(found, new if is_new else old)
        seen.append(is_new)
        old.save(directory)  # the next writer removes what the dead one left
        assert sorted(path.name for path in directory.iterdir()) == sorted([*FILES, "notes.txt"])
        assert same_tensors(Captioner.load(directory), old)
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen)  # old up to some point, new from then on
    assert seen.count(False) > 3
    assert seen.count(True) > 3


def test_a_failure_while_saving_leaves_the_old_captioner(saved, monkeypatch):
    def fail(self, path):
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(WordTokenizer, "save", fail)
    with pytest.raises(ConfigError, match=r"Cannot write .*toy: No space left.*as it was"):
        toy(seed=1).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_files_of_two_captioners_are_refused_by_name(saved, tmp_path):
    toy(seed=1).save(tmp_path / "other")
    (saved / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    message = r"toy/model\.safetensors and .*toy/captioner\.json were not saved together"
    with pytest.raises(CheckpointError, match=message):
        Captioner.load(saved)
    (saved / "captioner.json").write_bytes((tmp_path / "other/captioner.json").read_bytes())
    assert same_tensors(Captioner.load(saved), toy(seed=1))


def test_temporary_files_of_dead_writers_are_removed_and_others_are_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = temporary_name("captioner")
    alive = temporary_name("captioner").replace(f"-{os.getpid()}-", "-1-")
    gone = [name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"), name[:-15] + "ffffff-00000000"]
    elsewhere = ".x.tmp-ffffff-1-ffffff-00000000"
    for each in (*gone, name, alive, elsewhere, ".x.tmp-notes", "x.tmp"):
        (tmp_path / each).mkdir()
        (tmp_path / each / "file").write_text("x")
    os.utime(tmp_path / elsewhere)
    toy().save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *FILES,
        name,
        alive,
        elsewhere,
        ".x.tmp-notes",
        "x.tmp",
    }
    os.utime(tmp_path / elsewhere, (0, 0))
    toy().save(tmp_path)
    assert not (tmp_path / elsewhere).exists()


# Case 15: elsewhere

ELSEWHERE = """
    import json, os, socket, sys
    attempts, written = [], []
    def refuse(*a, **k):
        attempts.append(str(a[-1:]))
        raise OSError("network is off")
    socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    def watch(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & WRITES:
            written.append(str(args[0]))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink"):
            written.append(event + " " + str(args[0]))
    sys.addaudithook(watch)

    import capdistill as cd
    captioner = cd.Captioner.load(sys.argv[1])
    caption = captioner.caption(sys.argv[2])
    names = [cd.encoders.names(), cd.decoders.names(), cd.losses.names()]
    connections = list(attempts)
    try:
        cd.encoders.create("timm", name="vit_small_patch16_224")
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    print(json.dumps([caption, connections, written, names, refused]))
"""


@pytest.mark.slow
def test_case_15_a_saved_captioner_needs_no_network_no_home_and_no_place_to_write(tmp_path):
    torch.manual_seed(0)
    captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer())
    folder, photo = tmp_path / "student", tmp_path / "dog.png"
    captioner.save(folder)
    edit(folder, lambda content: content["encoder"]["kwargs"].update(weights=True))
    Image.fromarray(pictures(1, 40)[0].permute(1, 2, 0).numpy()).save(photo)
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & ~0o222)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    nowhere = dict.fromkeys(
        ("XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR"), "/proc/none"
    )
    environment = {
        **os.environ,
        **nowhere,
        "HOME": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(temporary),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(folder), str(photo)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    caption, connections, written, names, refused = json.loads(done.stdout.splitlines()[-1])
    assert caption == captioner.caption(photo)
    assert connections == []
    allowed = {os.devnull, f"os.mkdir {temporary}"}  # PyTorch's, when torchvision is imported
    assert set(written) <= allowed
    assert all(names)
    assert refused.startswith("CheckpointError")
    assert "vit_small_patch16_224" in refused
    assert "weights=" in refused
