import json

import pytest

from harness.bench.ratios import Comparison, Pair, parts_of_whole


def row(*pairs, count=1):
    return Comparison("get_regs", "local", "C", count, pairs=[Pair(*pair) for pair in pairs])


def test_a_share_is_of_speed_so_twice_the_time_is_half_of_it():
    assert Pair(ours_s=2.0, theirs_s=1.0).share == 0.5


def test_the_share_is_the_median_of_the_pairs_and_not_the_ratio_of_two_medians():
    # Load comes and goes: a pair is measured under the same one, two medians are not.
    assert row((2.0, 1.0), (10.0, 5.0), (100.0, 1.0)).share == 0.5


def test_one_spoilt_repetition_moves_the_spread_and_not_the_share():
    spoilt = row((2.0, 1.0), (2.0, 1.0), (2.0, 1.0), (50.0, 1.0), (2.0, 10.0))
    assert spoilt.share == 0.5
    assert spoilt.spread == (0.02, 5.0)


def test_what_load_leaves_of_many_is_the_share_of_the_least_times():
    assert row((2.0, 9.0), (50.0, 1.0), (3.0, 7.0)).share_of_least == 0.5
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = row().share_of_least


def test_times_are_per_round():
    measured = row((4.0, 2.0), (6.0, 2.0), (5.0, 2.0), count=1000)
    assert measured.ours_us == pytest.approx(5000)
    assert measured.theirs_us == pytest.approx(2000)


def test_without_a_repetition_there_is_no_share():
    with pytest.raises(ValueError, match="get_regs on local: nothing was measured"):
        _ = row().share
    with pytest.raises(ValueError, match="nothing was measured"):
        _ = row().spread


def test_json_has_all_repetitions_and_survives_a_round_trip():
    measured = row((2.0, 1.0), (4.0, 1.0), count=7)
    data = json.loads(json.dumps(measured.as_json()))
    assert data["share"] == pytest.approx(0.375)
    assert (data["share_min"], data["share_max"]) == (0.25, 0.5)
    assert (data["ours_s"], data["theirs_s"]) == ([2.0, 4.0], [1.0, 1.0])
    assert data["share_of_least"] == 0.5
    assert data["count"] == 7
    assert data["is_part"] is False
    assert "details" not in data


def test_parts_of_a_whole_add_up_in_every_run():
    runs = [{"start": 1.0, "rest": 3.0}, {"start": 3.0, "rest": 1.0}]
    parts = parts_of_whole("emulated", "memory", runs)
    assert [part.name for part in parts] == ["memory_start", "memory_rest"]
    assert all(part.is_part for part in parts)
    assert [part.shares() for part in parts] == [[0.25, 0.75], [0.75, 0.25]]
    for number in range(len(runs)):
        assert sum(part.shares()[number] for part in parts) == pytest.approx(1)
