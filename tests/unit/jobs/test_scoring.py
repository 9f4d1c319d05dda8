from __future__ import annotations

import pytest

from coordinator.jobs.scoring import Score, ScoreReport, score
from plutino.errors import DataError

TRUTH = '{"intent":"PlayMusic","slots":{"artist":["Abba","Cher"],"year":"1980"}}'


def json_score(answer: str, truth: str = TRUTH) -> Score:
    return score("json_slots", [answer], [truth])


def test_exact_match_ignores_outer_white_space_and_nothing_else() -> None:
    result = score("exact_match", ["a b \n", "A b", "a  b", "a b"], ["a b"] * 4)

    assert result.exact_match == 0.5
    assert result.headline == 0.5


def test_json_slots_equal_answer_in_another_order_is_right() -> None:
    result = json_score('{"slots": {"year": " 1980", "artist": ["Cher", "Abba"]}, "intent": "PlayMusic"}')

    assert (result.exact_match, result.valid_json, result.intent_accuracy, result.slot_f1) == (1, 1, 1, 1)


def test_json_slots_partly_right_answer_counts_pairs() -> None:
    result = json_score('{"intent":"PlayMusic","slots":{"artist":"Abba","year":"1990"}}')

    assert (result.exact_match, result.intent_accuracy) == (0, 1)
    assert result.slot_f1 == pytest.approx(2 * 1 / (2 + 3))
    assert result.headline == result.slot_f1


def test_json_slots_pair_given_twice_counts_once_where_true_once() -> None:
    result = json_score('{"intent":"x","slots":{"year":["1980","1980"]}}')

    assert result.intent_accuracy == 0
    assert result.slot_f1 == pytest.approx(2 * 1 / (2 + 3))


@pytest.mark.parametrize("answer", ["", "{", "[]", '{"intent":"PlayMusic"}', '{"intent":1,"slots":{}}', "[" * 100_000])
def test_json_slots_answer_of_another_form_is_wrong_and_not_valid(answer: str) -> None:
    result = json_score(answer)

    assert (result.valid_json, result.intent_accuracy, result.slot_f1, result.exact_match) == (0, 0, 0, 0)


def test_json_slots_slot_that_is_no_text_is_not_valid() -> None:
    assert json_score('{"intent":"PlayMusic","slots":{"year":1980}}').valid_json == 0


def test_json_slots_f1_is_micro_averaged_over_rows() -> None:
    truths = [TRUTH, '{"intent":"a","slots":{"b":"c"}}']

    result = score("json_slots", [TRUTH, "nothing"], truths)

    assert result.valid_json == 0.5
    assert result.slot_f1 == pytest.approx(2 * 3 / (3 + 4))


def test_json_slots_without_any_slot_anywhere_is_right() -> None:
    assert json_score('{"intent":"a","slots":{}}', '{"intent":"a","slots":{}}').slot_f1 == 1


def test_json_slots_true_answers_of_another_form_are_an_error() -> None:
    with pytest.raises(DataError, match="held-out rows, counted from 1: 2; mend them"):
        score("json_slots", [TRUTH, TRUTH], [TRUTH, "PlayMusic"])


def test_score_survives_json() -> None:
    result = json_score(TRUTH)

    assert Score.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize(("answers", "truths"), [([], []), (["a"], ["a", "b"])])
def test_score_refuses_nothing_and_unequal_numbers(answers: list[str], truths: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(answers)} answers for {len(truths)} rows"):
        score("exact_match", answers, truths)


def test_trials_compare_shares_and_the_mean_of_several_tasks_and_nothing_that_is_no_share():
    def report(*scores: Score) -> ScoreReport:
        tasks = {str(n): one for n, one in enumerate(scores)} if len(scores) > 1 else {}
        return ScoreReport(score=scores[0], samples=(), by_task=tasks)

    right = Score(metric="exact_match", num_rows=4, exact_match=0.5)
    slots = Score(metric="json_slots", num_rows=4, exact_match=0.1, slot_f1=0.7)
    perplexity = Score(metric="perplexity", num_rows=4, perplexity=170.0)
    correlation = Score(metric="correlation", num_rows=4, pearson=-0.2, spearman=0.1, mse=2.0)

    ratings = Score(metric="ratings", num_rows=4, spearman=-0.1, auc=0.4)
    assert [report(one).share for one in (right, slots, perplexity, correlation)] == [0.5, 0.7, None, None]
    assert report(ratings).share == 0.4
    assert report(right, slots).share == pytest.approx(0.6) and report(right, perplexity).share is None
    assert [one.headline_text for one in (right, slots, perplexity, correlation)] == ["50.0%", "70.0%", "170", "-0.2"]
