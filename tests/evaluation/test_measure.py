import pytest

from capdistill.errors import CapdistillError
from capdistill.evaluation.measure import Latency, cpu_memory, disk_bytes, time_in_turn


def test_p95_is_the_time_that_95_percent_do_not_exceed() -> None:
    found = Latency.of([k / 1000 for k in range(100, 0, -1)])
    assert (found.median, found.p95, found.n) == (50.5, 95.0, 100)


def test_a_slow_machine_ends_the_timing_after_five_images() -> None:
    found = time_in_turn([str], [range(100)], budget=0.0)
    assert found[0].n == 5


def test_warm_up_is_not_timed() -> None:
    calls: list[int] = []
    found = time_in_turn([calls.append], [[1, 2, 3, 4]])
    assert calls == [1, 2, 3, 1, 2, 3, 4]
    assert found[0].n == 4


def test_all_files_of_a_directory_count(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub" / "b").write_bytes(b"4567")
    assert disk_bytes(tmp_path) == 7


def test_a_model_that_cannot_be_loaded_elsewhere_says_why(tmp_path) -> None:
    with pytest.raises(CapdistillError, match=r"memory failed: .*captioner\.json"):
        cpu_memory(tmp_path)
