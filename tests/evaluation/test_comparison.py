import html.parser
import json
import math
import re
import subprocess
import sys

import pytest

from capdistill.errors import CheckpointError, ConfigError, DataError, IncompatibleModels
from capdistill.evaluation import measure
from capdistill.evaluation.comparison import Comparison, compare
from capdistill.evaluation.report import STYLE
from capdistill.evaluation.table import (
    EXPECTED_FLOOR,
    comparison_table,
    evaluation_table,
    table_rows,
)
from capdistill.metrics import Metric, paired_bootstrap
from tests.evaluation.tiny_captioner import TinyCaptioner, batch_of

OPTIONS = {"metrics": ("bleu",), "measure": False, "device": "cpu"}
BATCHES = [batch_of([0, 1, 3])]
SHORT = ("a dog", "a red bus", "", "two children")


@pytest.fixture
def found() -> Comparison:
    teacher, student = TinyCaptioner("big"), TinyCaptioner("small", SHORT)
    return compare(teacher, student, BATCHES, baseline=TinyCaptioner("plain"), **OPTIONS)


def test_the_students_score_is_a_share_of_the_teachers(found: Comparison) -> None:
    row = next(row for row in found.rows if row.key == "bleu_1")
    share = 100 * row.values["student"] / row.values["teacher"]
    assert row.relation == f"{share:.1f} % of the teacher's"
    assert row.expected == "85-95 % of the teacher's"
    assert row.reached is (share >= 85)


def test_an_expectation_that_is_not_met_is_shown(found: Comparison) -> None:
    row = next(row for row in found.rows if row.key == "parameters")
    assert (row.expected, row.reached) == ("3 times smaller", False)
    assert "not reached" in str(found)


def test_a_teacher_that_scores_nothing_gives_no_verdict() -> None:
    silent = TinyCaptioner("silent", ("x", "x", "x", "x"))
    row = compare(silent, TinyCaptioner(), BATCHES, **OPTIONS).rows[0]
    assert (row.relation, row.reached) == ("the teacher's score is near 0", None)


def test_what_was_not_measured_is_neither_reached_nor_missed(found: Comparison) -> None:
    row = next(row for row in found.rows if row.key == "latency_ms")
    assert row.reached is None
    assert row.relation == ""


def test_times_are_measured_in_turn_which_is_fair_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "cpu_memory", lambda *_, **__: None)  # a process a model
    order = []

    class Named(TinyCaptioner):
        def generate(self, batch):
            order.append(self.name)
            return super().generate(batch)

    options = {"metrics": ("bleu",), "device": "cpu"}
    compare(Named("t"), Named("s"), BATCHES, **options)
    assert order[-6:] == ["t", "s"] * 3


def test_the_report_can_be_read_back(found: Comparison, tmp_path) -> None:
    found.save(tmp_path)
    again = Comparison.load(tmp_path)
    assert json.dumps(again.to_json()) == json.dumps(found.to_json())
    assert str(again) == str(found)


def test_json_has_its_schema_and_no_nan(found: Comparison, tmp_path) -> None:
    found.save(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=refuse)
    assert content["schema"] == "capdistill.comparison/1"
    assert set(content) == {"schema", "rows", "samples", "models", "bootstrap", "pictures"}
    assert set(content["models"]) == {"teacher", "student", "baseline"}


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_fetches_nothing(found: Comparison, tmp_path) -> None:
    text = found.save(tmp_path).read_text("utf-8")
    page = _Page(text)
    assert page.open == []
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert len(addresses) == 3
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    assert "@import" not in text


def test_the_table_has_headers_for_screen_readers(found: Comparison, tmp_path) -> None:
    tags = _Page(found.save(tmp_path).read_text("utf-8")).tags
    heads = [attrs["scope"] for tag, attrs in tags if tag == "th"]
    assert heads.count("row") == len(found.rows)
    assert heads.count("col") == 7
    assert all(attrs["alt"] for tag, attrs in tags if tag == "img")


def test_a_caption_cannot_put_markup_into_the_page(tmp_path) -> None:
    evil = "<script>alert(1)</script>\" onerror='x' {style}"
    model = TinyCaptioner(evil, (evil,) * 4)
    text = compare(model, model, BATCHES, **OPTIONS).save(tmp_path).read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{style}" in text


def test_an_empty_caption_is_shown_as_such(tmp_path) -> None:
    model = TinyCaptioner()
    text = compare(model, model, [batch_of([2, 0])], **OPTIONS).save(tmp_path).read_text("utf-8")
    assert "(empty)" in text


def test_a_foreign_report_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "other/1"}')
    with pytest.raises(CheckpointError, match="other/1"):
        Comparison.load(tmp_path)


# -- several students -------------------------------------------------------------------------


def students(**sayings: tuple[str, ...]) -> dict[str, TinyCaptioner]:
    return {name: TinyCaptioner(name, each) for name, each in sayings.items()}


def test_several_students_are_each_compared_with_the_teacher(tmp_path) -> None:
    four = students(a=SHORT, b=SHORT[::-1], c=("a dog runs",) * 4, d=SHORT)
    found = compare(TinyCaptioner("big"), four, BATCHES, bootstrap=20, **OPTIONS)
    assert list(found.models) == ["teacher", "a", "b", "c", "d"]
    row = found.rows[0]
    assert list(row.differences) == ["a", "b", "c", "d"]
    for name in four:
        gap = row.values[name] - row.values["teacher"]
        assert row.differences[name]["difference"] == pytest.approx(gap)
    assert set(row.intervals) == set(found.models)
    assert (row.relation, row.expected, row.reached) == ("", "", None)
    for shown in (str(found), found.save(tmp_path).read_text("utf-8")):
        assert "student" not in shown.lower()
        assert "verdict" not in shown.lower()
    assert "difference from teacher" in str(found)
    assert "d minus teacher" in found._repr_html_()
    assert str(Comparison.load(tmp_path)) == str(found)
    assert "3 images; 5 models" in repr(found)


def test_students_without_a_teacher_are_compared_with_the_first() -> None:
    found = compare(None, students(a=SHORT, b=SHORT), BATCHES, bootstrap=20, **OPTIONS)
    assert list(found.models) == ["a", "b"]
    assert found.rows[0].differences["b"]["p_value"] == 1


def test_with_a_student_of_that_name_the_others_are_what_it_is_compared_with() -> None:
    found = compare(
        TinyCaptioner("big"), students(student=SHORT, other=SHORT), BATCHES, bootstrap=20, **OPTIONS
    )
    assert list(found.rows[0].differences) == ["teacher", "other"]
    assert found.rows[0].reached is True


@pytest.mark.parametrize("named", [{}, {"": 1}, {3: 1}, {"teacher": 1}, {"baseline": 1}])
def test_names_that_cannot_be_those_of_students_are_refused(named: dict) -> None:
    given = {name: TinyCaptioner() for name in named}
    with pytest.raises(ConfigError, match=r"cannot name a student|two models or more"):
        compare(TinyCaptioner(), given, BATCHES, **OPTIONS)
    with pytest.raises(ConfigError, match="two models or more"):
        compare(None, TinyCaptioner(), BATCHES, **OPTIONS)


def test_a_one_shot_iterator_is_refused() -> None:
    with pytest.raises(ConfigError, match="one-shot iterator"):
        compare(TinyCaptioner(), TinyCaptioner(), iter(BATCHES), **OPTIONS)


def test_models_that_saw_different_images_are_not_compared() -> None:
    class Turning:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return iter([batch_of([0], first=self.rounds)])

    with pytest.raises(IncompatibleModels, match="different images"):
        compare(TinyCaptioner(), TinyCaptioner(), Turning(), **OPTIONS)


def test_an_unwritable_directory_is_an_error_that_names_it(found: Comparison, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        found.save(tmp_path / "file")


TEACHER, STUDENT = TinyCaptioner("big"), TinyCaptioner("small", SHORT)
MANY = [batch_of([0, 1, 3, 1, 0]), batch_of([3, 3, 0, 2], first=5)]
EVERY = {**OPTIONS, "metrics": ("bleu", "rouge_l", "cider_d")}


@pytest.fixture(scope="module")
def drawn() -> Comparison:
    """The baseline is as good as the student on every image, and the data come in batches."""
    baseline = TinyCaptioner("plain", SHORT)
    return compare(TEACHER, STUDENT, MANY, baseline, bootstrap=200, **EVERY)


def test_scores_have_the_intervals_of_the_paired_bootstrap(drawn: Comparison) -> None:
    teacher, student = drawn.models["teacher"], drawn.models["student"]
    captions = teacher["captions"], student["captions"]
    expected = paired_bootstrap(teacher["references"], *captions, EVERY["metrics"], samples=200)
    rows = {row.key: row for row in drawn.rows if row.unit == "score"}
    assert set(rows) == set(expected)
    for key, row in rows.items():
        each = expected[key]
        assert row.intervals["teacher"] == list(each.a_interval)
        assert row.intervals["student"] == list(each.b_interval)
        assert row.differences["teacher"] == {
            "difference": each.difference,
            "interval": list(each.interval),
            "p_value": each.p_value,
        }


def test_the_student_is_also_set_against_the_baseline(drawn: Comparison) -> None:
    row = drawn.rows[0]
    nothing = {"difference": 0, "interval": [0, 0], "p_value": 1}
    assert row.differences["baseline"] == nothing
    assert row.intervals["baseline"] == row.intervals["student"]


def test_without_samples_there_are_no_intervals(found: Comparison) -> None:
    assert found.bootstrap is None
    assert not any(row.intervals or row.differences for row in found.rows)
    assert "minus" not in str(found)


def test_costs_have_no_interval(drawn: Comparison) -> None:
    assert not any(row.intervals or row.differences for row in drawn.rows if row.unit != "score")


def test_the_table_shows_intervals_and_what_they_are(drawn: Comparison) -> None:
    text = comparison_table(drawn.to_json(), width=200)
    table, differences, remarks = text.split("\n\n")
    row = drawn.rows[0]
    low, high = row.intervals["teacher"]
    assert f"{row.values['teacher']:.4f} [{low:.4f}, {high:.4f}]" in table.splitlines()[1]
    head, first, *others = differences.splitlines()
    assert head.split() == ["student", "minus", "teacher", "baseline"]
    assert f"{row.differences['teacher']['difference']:+.4f} [" in first
    assert first.endswith("+0.0000 [0.0000, 0.0000], p = 1.000")
    assert len(others) == 5
    assert "95 % intervals from 200 paired bootstrap samples" in remarks


def test_the_page_shows_intervals_under_their_figures(drawn: Comparison, tmp_path) -> None:
    text = drawn.save(tmp_path).read_text("utf-8")
    row = drawn.rows[0]
    low, high = row.intervals["teacher"]
    assert f"<td>{row.values['teacher']:.4f}<small>[{low:.4f}, {high:.4f}]</small></td>" in text
    assert "<td>+0.0000<small>[0.0000, 0.0000], p = 1.000</small></td>" in text
    assert "95 % intervals from 200 paired bootstrap samples" in text
    page = _Page(text)
    assert page.open == []
    cells = [tag for tag, _ in page.tags if tag in ("td", "th")]
    assert len(cells) == 9 * (1 + len(drawn.rows))


def test_a_report_with_intervals_can_be_read_back(drawn: Comparison, tmp_path) -> None:
    drawn.save(tmp_path)
    again = Comparison.load(tmp_path)
    assert json.dumps(again.to_json()) == json.dumps(drawn.to_json())
    assert str(again) == str(drawn)
    assert again.bootstrap == {"samples": 200, "seed": 0, "confidence": 0.95, "notes": []}


def test_a_report_from_before_there_were_intervals_can_be_read(found: Comparison, tmp_path) -> None:
    content = found.to_json()
    del content["bootstrap"]
    for row in content["rows"]:
        del row["intervals"], row["differences"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert str(Comparison.load(tmp_path)) == str(found)


def test_a_score_that_cannot_be_resampled_is_a_remark() -> None:
    def most(references: dict, hypotheses: dict) -> dict:
        each = {image: len(text) for image, text in hypotheses.items()}
        return {"longest": (max(each.values()), each)}

    metric = Metric(most, {"longest": "higher"})
    options = {**OPTIONS, "metrics": ["rouge_l", metric]}
    drawn = compare(TEACHER, STUDENT, MANY, bootstrap=20, **options)
    assert not drawn.rows[1].intervals
    assert "longest has no interval" in str(drawn)


@pytest.mark.parametrize("samples", [-5, True, 1e3, "10", None, math.nan])
def test_what_is_no_number_of_samples_is_refused_before_the_work(samples) -> None:
    with pytest.raises(ConfigError, match=f"compare: bootstrap={samples!r} was given"):
        compare(None, None, None, bootstrap=samples)


def evaluated(**changed: object) -> dict:
    """An evaluation as plain dicts."""
    found = compare(TEACHER, STUDENT, BATCHES, **OPTIONS).models["student"]
    costs = {
        "scores": {"bleu_1": 0.6, "bleu_2": 0.4, "cider_d": 0.5},
        "images": 100,
        "parameters": 1000,
        "latency_ms": {"median": 10.0, "p95": 20.0, "n": 20},
        "memory_bytes": {"peak": 10**6, "baseline": 10**8},
    }
    return {**found, **costs, **changed}


def verdicts(teacher: dict, student: dict) -> dict[str, tuple[str, bool | None]]:
    rows = table_rows({"teacher": teacher, "student": student})
    return {row.key: (row.relation, row.reached) for row in rows}


def test_a_teacher_whose_score_is_near_0_gives_no_verdict() -> None:
    untrained = evaluated(scores={"bleu_1": 0.02, "bleu_2": EXPECTED_FLOOR - 1e-9, "cider_d": 1e-4})
    found = verdicts(untrained, evaluated())
    for key in ("bleu_1", "bleu_2", "cider_d"):
        assert found[key] == ("the teacher's score is near 0", None)
    assert verdicts(evaluated(), untrained)["bleu_1"] == ("3.3 % of the teacher's", False)


def test_the_time_of_a_wrapped_teacher_gives_no_verdict() -> None:
    wrapped = evaluated(time_comparable=False, latency_ms={"median": 999.0, "p95": 999.0, "n": 20})
    found = verdicts(wrapped, evaluated())
    assert found["latency_ms"] == ("not comparable", None)
    assert found["latency_p95_ms"] == ("", None)
    table = evaluation_table({"teacher": wrapped, "student": evaluated()}, width=500)
    assert "time of teacher is not comparable" in table


@pytest.mark.parametrize("zero", [0, None, math.nan])
def test_costs_that_were_not_measured_give_no_verdict(zero: object) -> None:
    nothing = evaluated(
        parameters=zero,
        latency_ms={"median": zero, "p95": zero, "n": 20},
        memory_bytes={"peak": zero, "baseline": 0},
        disk_bytes=zero,
        scores={"bleu_1": zero, "bleu_2": math.nan, "cider_d": math.inf},
    )
    for pair in ((nothing, evaluated()), (nothing, nothing)):
        assert not any(reached for _, reached in verdicts(*pair).values())
    for relation, reached in verdicts(evaluated(), nothing).values():
        assert reached is not True
        assert "nan" not in relation
        assert "inf" not in relation
    assert "nan" not in evaluation_table({"model": nothing}, width=200)


def test_a_single_image_gives_no_verdict_on_scores_and_times() -> None:
    alone = evaluated(images=1, latency_ms={"median": 1.0, "p95": 1.0, "n": 1})
    found = verdicts(evaluated(latency_ms=alone["latency_ms"]), alone)
    assert {found[key][1] for key in ("bleu_1", "bleu_2", "latency_ms")} == {None}


def test_a_model_compared_with_itself_is_equal() -> None:
    found = verdicts(evaluated(), evaluated())
    assert found["parameters"] == ("equal", False)
    assert found["bleu_1"] == ("100.0 % of the teacher's", True)


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal_without_breaking_a_number(
    width: int, drawn: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.__stdout__", None)
    text = str(drawn)
    assert max(map(len, text.splitlines())) <= width
    wide = comparison_table(drawn.to_json(), width=1000)
    for number in re.findall(r"[\d.,]*\d[\d.,]*", wide):
        assert number in text
    for row in drawn.rows:
        assert row.expected in text
        assert row.relation in text


def test_off_a_terminal_a_table_has_80_columns(drawn: Comparison, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)
    assert str(drawn) == comparison_table(drawn.to_json(), width=80)


def _print_rules() -> dict[str, str]:
    """Selector -> declarations, of the print style sheet."""
    block = STYLE[STYLE.index("@media print") :]
    found: dict[str, str] = {}
    for selectors, rules in re.findall(r"^  ([^@\n]+?) \{ (.*?) \}", block, re.MULTILINE):
        for selector in selectors.split(","):
            found[selector.strip()] = found.get(selector.strip(), "") + rules
    return found


def test_a_printed_report_is_light_and_loses_no_column() -> None:
    rules = _print_rules()
    assert "color-scheme: light" in rules[":root"]
    assert "@media screen and (prefers-color-scheme: dark)" in STYLE  # not on paper
    assert "overflow: visible" in rules[".wide"]
    for cell in ("th", "td"):
        assert "white-space: normal" in rules[cell]


def test_a_printed_report_keeps_headings_with_their_content_and_breaks_tables() -> None:
    rules = _print_rules()
    for heading in ("h1", "h2", "h3", "caption"):
        assert "break-after: avoid" in rules[heading]
    for whole in ("tr", "figure"):
        assert "break-inside: avoid" in rules[whole]
    assert "break-inside" not in rules[".wide"]  # else a long table leaves page 1 empty
    assert "break-inside" not in rules["table"]
    assert "table-header-group" in rules["thead"]


def test_a_comparison_has_one_line_for_a_prompt_and_a_table_for_a_notebook(
    found: Comparison,
) -> None:
    line = repr(found)
    assert line.startswith("Comparison(teacher 'big', student 'small', baseline 'plain': 3 images")
    assert len(line) < 150
    page = _Page(found._repr_html_())
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("tr") == 1 + len(found.rows)


def test_an_unknown_option_is_suggested_before_the_work() -> None:
    for wrong, near in (("metric", "metrics"), ("bootstap", "bootstrap"), ("beam", "beam_size")):
        with pytest.raises(ConfigError, match=rf"compare: .* '{wrong}' .*Did you mean '{near}'"):
            compare(TEACHER, STUDENT, BATCHES, **{wrong: 3})


def test_metrics_from_an_iterator_serve_every_model() -> None:
    options = {**OPTIONS, "metrics": iter(["bleu_1"])}
    models = compare(TEACHER, STUDENT, BATCHES, **options).models
    assert models["student"]["scores"].keys() == {"bleu_1"}


def test_a_missing_history_is_named_before_the_work(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=r"There is no history in .*history\.jsonl"):
        compare(TEACHER, STUDENT, None, histories={"student": tmp_path})


def test_on_a_narrow_terminal_figures_stand_side_by_side_and_intervals_below(
    drawn: Comparison,
) -> None:
    head, first, *_ = comparison_table(drawn.to_json(), width=80).splitlines()
    assert head.split() == ["teacher", "student", "baseline"]
    assert first.split() == ["BLEU-1", *(f"{drawn.rows[0].values[r]:.4f}" for r in drawn.models)]


WITHOUT_HOME = """
import os, pwd, sys
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
    os.environ.pop(name, None)
assert os.path.expanduser("~") == "~"
import capdistill as cd
data = cd.data.sample()
tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
student = cd.Captioner.create("debug_student", tokenizer=tokenizer)
found = cd.compare(student, student, data.val.subset(2), max_length=3, bootstrap=5)
assert "meteor_nltk" in found.models["student"]["scores"]
assert found.models["student"]["memory_bytes"], found.models["student"]["notes"]
found.save("report")
"""


def test_models_are_compared_without_a_home_directory(tmp_path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_HOME], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"report"}
