"""From a directory, from a module; what cannot be loaded is refused with the fix."""

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

import capdistill as cd
from capdistill.cli.common import captioner_directory
from capdistill.errors import CheckpointError, ConfigError, MissingExtra
from tests.teachers.huggingface import tiny
from tests.teachers.huggingface.conftest import batch_of, made

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def save(family, directory):
    module, processor, tokenizer = tiny.make(family)
    for part in (module, processor, tokenizer):
        part.save_pretrained(directory)
    return module


def test_a_saved_model_is_the_same_teacher(family, teacher, batch, tmp_path):
    save(family, tmp_path / "model")
    loaded = cd.teachers.from_pretrained(tmp_path / "model")
    assert loaded.name == "model"
    assert loaded.tokenizer == teacher.tokenizer
    assert loaded.adapter.prompt_ids.tolist() == teacher.adapter.prompt_ids.tolist()
    loaded.use_cache = teacher.use_cache
    with torch.no_grad():
        assert_close(loaded(batch).logits, teacher(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["blip", "qwen2_vl"])
def test_weights_in_half_precision_teach_almost_the_same(family, teacher, batch):
    module, processor, tokenizer = tiny.make(family)
    half = cd.teachers.from_pretrained(module, tokenizer, processor, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        one, other = teacher(batch).logits, half(batch, frozenset({"logits", "hidden"})).logits
    assert other.dtype == torch.bfloat16
    assert half.use_cache
    assert float((one - other).std()) < 0.1 * float(one.std())
    assert len(half.generate(batch, max_length=3, beam_size=2)) == 2


def test_the_dtype_reaches_what_is_loaded(tmp_path):
    save("blip", tmp_path)
    teacher = cd.teachers.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}


def test_a_device_map_is_passed_on_or_names_the_package_it_needs(tmp_path):
    save("blip", tmp_path)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="accelerate"):
            cd.teachers.from_pretrained(tmp_path, device_map="auto")
    else:
        teacher = cd.teachers.from_pretrained(tmp_path, device_map={"": "cpu"})
        assert {parameter.device.type for parameter in teacher.parameters()} == {"cpu"}


@pytest.mark.parametrize("family", ["blip", "git", "blip2_opt", "vision_encoder_decoder"])
def test_the_caption_continues_the_prompt(family, teacher):
    module, processor, tokenizer = tiny.make(family)
    prompted = cd.teachers.from_pretrained(module, tokenizer, processor, prompt="a red dog")
    ids = tokenizer.encode("a red dog", add_special_tokens=False)
    plain = teacher.adapter.prompt_ids.tolist()
    assert prompted.adapter.prompt_ids.tolist() == [*plain, *ids]
    prompted.use_cache = teacher.use_cache
    batch = batch_of(teacher, ("a red dog runs", "a red dog"), images=1)
    short = batch_of(teacher, ("runs", ""), images=1)
    with torch.no_grad():
        whole = teacher(batch).logits[0, len(ids)]
        found = prompted(short).logits[0, 0]
    if "Ġa" in tokenizer.get_vocab():  # the first word stands behind a space
        assert_close(found[tokenizer.convert_tokens_to_ids("a")], whole[tokenizer.vocab["Ġa"]])
        whole = whole[prompted.adapter.first_words]
    assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_what_is_no_part_of_a_captioner_is_refused_with_what_to_give():
    module, processor, tokenizer = tiny.make("blip")
    load = cd.teachers.from_pretrained
    with pytest.raises(ConfigError, match=r"tokenizer of Blip.* is str; expected a fast tokenizer"):
        load(module, "bert", processor)
    with pytest.raises(ConfigError, match="is HuggingFace; expected a fast tokenizer of trans"):
        load(module, made("blip")[0].tokenizer, processor)
    with pytest.raises(ConfigError, match=r"which reads no images. Give image_processor=AutoPro"):
        load(module, tokenizer, tokenizer)
    with pytest.raises(ConfigError, match="prompt is 3; expected text"):
        load(module, tokenizer, processor, prompt=3)
    with pytest.raises(ConfigError, match=r"dtype='bfloat' is unknown. Did you mean 'bfloat16'"):
        load(module, tokenizer, processor, dtype="bfloat")
    assert load(module, tokenizer, processor, dtype="float64").module.dtype == torch.float64
    module, processor, tokenizer = tiny.make("qwen2_vl")
    with pytest.raises(ConfigError, match=r"images alone; a prompted model needs the whole proc"):
        load(module, tokenizer, processor.image_processor)
    with pytest.raises(ConfigError, match=r"the task '<CAPTIONS>' is no .* mean '<CAPTION>'"):
        load(*tiny.make("florence2")[::2], made("florence2")[1], "<CAPTIONS>")


@pytest.mark.parametrize("family", ["blip", "qwen2_vl"])
def test_a_processor_of_another_model_is_named_before_any_work(family):
    module, _, tokenizer = tiny.make(family)
    image = hf.BlipImageProcessor(size={"height": 40, "width": 40})
    teacher = cd.teachers.from_pretrained(module, tokenizer, hf.BlipProcessor(image, tokenizer))
    with pytest.raises(
        ConfigError, match=r"cannot read what its processor \(BlipProcessor\) makes"
    ):
        teacher.spec()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    module, processor, _ = tiny.make("blip")
    other = tiny.words_tokenizer("[SEP]", bos_token="[SEP]", eos_token="[SEP]")
    with pytest.raises(ConfigError, match=r"has 3\d\d ids, but Blip.* has a vocabulary of 69"):
        cd.teachers.from_pretrained(module, other, processor)
    module.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)  # AutoTokenizer makes one of nothing
    with pytest.raises(ConfigError, match=r"tokenizer (has \d ids|cannot be loaded)"):
        cd.teachers.from_pretrained(tmp_path)


def test_weights_that_are_cut_and_no_name_are_refused(tmp_path):
    save("blip", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])
    with pytest.raises(ConfigError, match=r"BlipForCond\w+ cannot be loaded from .*header"):
        cd.teachers.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="an empty name was given"):
        cd.teachers.from_pretrained("hf:")


def test_weights_without_a_head_are_refused(tmp_path):
    save("git", tmp_path)
    tiny.make("git")[0].git.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no language-model head \(output.bias, output.weight\)"):
        cd.teachers.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"prompt": "a red", "dtype": torch.bfloat16}])
def test_a_teacher_is_saved_by_name_and_made_again(options, tmp_path, monkeypatch):
    save("blip", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    teacher = cd.teachers.from_pretrained("model", **options)
    teacher.save("saved")
    cd.teachers.Ensemble({"one": teacher, "other": teacher}).save("both")
    monkeypatch.chdir("/")  # a directory is the same one wherever it is read
    again, both = (cd.teachers.load(tmp_path / name) for name in ("saved", "both"))
    batch = batch_of(teacher)
    with torch.no_grad():
        expected = teacher(batch).logits
        assert_close(again(batch).logits, expected, rtol=0, atol=0)
        assert_close(both.members["other"](batch).logits, expected, rtol=0, atol=0)
    assert again.name == "model"
    assert captioner_directory(str(tmp_path / "saved")) == tmp_path / "saved"
    assert sum(path.stat().st_size for path in (tmp_path / "saved").iterdir()) < 1000
    with pytest.raises(ConfigError, match="holds a saved teacher of Hugging Face"):
        cd.Captioner.create("debug_student", tokenizer=cd.WordTokenizer(["a"])).save(
            tmp_path / "saved"
        )


def test_a_teacher_of_objects_says_how_they_are_saved(tmp_path):
    teacher = made("blip")[0]
    for model in (teacher, cd.teachers.Ensemble([teacher])):
        with pytest.raises(ConfigError, match=r"Write each with its save_pretrained\(directory\)"):
            model.save(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "content", [{"name_or_path_or_module": 3}, {"dtype": "x"}, {"prompt": 1}, {"format": "other"}]
)
def test_a_damaged_file_of_a_teacher_is_refused(content, tmp_path):
    whole = {"format": "capdistill.pretrained/1", "name_or_path_or_module": "a", "prompt": None}
    if "dtype" in content:
        del whole["name_or_path_or_module"]
    (tmp_path / "pretrained.json").write_text(json.dumps({**whole, **content}))
    with pytest.raises(CheckpointError, match="does not describe a teacher of Hugging Face"):
        cd.teachers.load(tmp_path)


def test_size_and_memory_of_a_teacher_are_those_of_its_weights(tmp_path):
    save("blip", tmp_path)
    teacher = cd.teachers.from_pretrained(tmp_path)
    photos = cd.data.sample().val.subset(1)
    found = cd.evaluate(teacher, photos, metrics=["bleu"], max_length=3, device="cpu")
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert abs(found.disk_bytes - weights) < 12_000  # the file has a header
    assert found.memory.peak > 0
    assert found.notes == ()
    assert found.parameters == teacher.num_parameters()


def test_a_task_of_florence_is_read_in_its_words():
    module, processor, tokenizer = tiny.make("florence2")
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor, prompt="<DETAILED_CAPTION>")
    image = torch.zeros(3, 16, 16, dtype=torch.uint8).permute(1, 2, 0).numpy()
    theirs = processor(images=image, text="<DETAILED_CAPTION>", return_tensors="pt").input_ids[0]
    assert theirs[theirs != 3].tolist() == teacher.adapter.task_ids
    assert teacher.adapter.prompt_ids.tolist() == [2, 0]


def test_the_prompt_of_a_chat_model_is_a_request_in_its_template():
    module, processor, tokenizer = tiny.make("smolvlm")
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor, prompt="What is it?")
    assert teacher.adapter.text == "User:<image>What is it?<end_of_utterance>\nAssistant:"
    own = cd.teachers.from_pretrained(module, tokenizer, processor, prompt="<image>A photo of")
    assert own.adapter.text == "<image>A photo of"


def test_the_processor_may_hold_the_tokenizer():
    module, processor, _ = tiny.make("blip")
    teacher = cd.teachers.from_pretrained(module, image_processor=processor)
    assert teacher.tokenizer == made("blip")[0].tokenizer


def test_several_end_tokens_end_a_caption():
    teacher = made("qwen2_vl")[0]
    assert (teacher.tokenizer.end_id, teacher.adapter.end_ids()) == (2, [2, 0])
    decoder, encoded = teacher.decoding(batch_of(teacher))
    state = decoder.start(encoded)
    raw = state.row["logits"].clone()
    logits, _ = decoder.step(torch.zeros(2, dtype=torch.int64), state)
    assert torch.isneginf(logits[:, 0]).all()
    assert_close(logits[:, 2].exp(), raw[:, 0].exp() + raw[:, 2].exp())


def test_ids_that_the_model_suppresses_are_not_generated():
    module, processor, tokenizer = tiny.make("vision_encoder_decoder")
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor)
    batch = batch_of(teacher)
    first = teacher.generate(batch, max_length=2)[0].tokens
    module.generation_config.suppress_tokens = [first[1]]
    module.generation_config.begin_suppress_tokens = [first[0]]
    again = teacher.generate(batch, max_length=2)[0].tokens
    assert again[0] != first[0]
    assert first[1] not in again


def test_a_model_without_a_tokenizer_is_refused():
    module, processor, tokenizer = tiny.make("vision_encoder_decoder")
    with pytest.raises(ConfigError, match=r"does not know its tokenizer. Give tokenizer=AutoTok"):
        cd.teachers.from_pretrained(module, image_processor=processor)
    with pytest.raises(ConfigError, match=r"its image processor. Give image_processor=AutoProc"):
        cd.teachers.from_pretrained(module, tokenizer)


@pytest.mark.parametrize(
    "given", [hf.BertModel(hf.BertConfig(**tiny.vision(), vocab_size=9)), torch.nn.Linear(1, 1)]
)
def test_a_model_of_another_kind_is_refused_with_those_that_are_supported(given):
    with pytest.raises(ConfigError) as error:
        cd.teachers.from_pretrained(given)
    message = str(error.value)
    assert "Supported are blip, blip-2, florence2, git, vision-encoder-decoder" in message
    assert "AutoModelForImageTextToText" in message
    assert "capdistill.teachers.wrap" in message


def test_a_model_without_a_head_is_not_a_captioner():
    module, processor, tokenizer = tiny.make("git")
    with pytest.raises(ConfigError, match="GitModel is not a captioner; of this family, GitForCau"):
        cd.teachers.from_pretrained(module.git, tokenizer, processor)
    inner = tiny.make("paligemma")[0].model
    with pytest.raises(ConfigError, match="PaliGemmaModel is not a captioner"):
        cd.teachers.from_pretrained(inner, tokenizer, processor)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"AutoConfig cannot be loaded from '.*nothing'"):
        cd.teachers.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="expected a name on the Hub, a directory, or a model"):
        cd.teachers.from_pretrained(7)


def test_a_device_map_for_a_module_is_refused():
    module, processor, tokenizer = tiny.make("git")
    with pytest.raises(ConfigError, match="device_map places what is loaded"):
        cd.teachers.from_pretrained(module, tokenizer, processor, device_map="auto")


def test_a_missing_or_old_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r'pip install "capdistill\[hf\]"'):
        cd.teachers.from_pretrained("any/name")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(MissingExtra, match=r"4\.57\.1 is too old"):
        cd.teachers.from_pretrained("any/name")


def test_an_adapter_is_one_short_file():
    from capdistill.teachers import huggingface

    for name in huggingface.names():
        source = Path(inspect.getsourcefile(huggingface.get(name)))
        assert len(source.read_text().splitlines()) < 60, source.name


def test_an_adapter_of_ones_own_is_registered_by_the_type_of_the_model(monkeypatch):
    from capdistill.teachers.huggingface import registry
    from capdistill.teachers.huggingface.git import Git

    monkeypatch.setattr(registry, "_decorated", {})

    @registry.register("git", override=True)
    class Mine(Git):
        prefix_tokens = None

    module, processor, tokenizer = tiny.make("git")
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor)
    assert isinstance(teacher.adapter, Mine)
