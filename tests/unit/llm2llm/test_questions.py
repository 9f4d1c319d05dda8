from __future__ import annotations

import asyncio
import json

import pytest

from coordinator.llm2llm.questions import RoundQuestions, Seeds
from coordinator.llm2llm.records import LoopRecords
from coordinator.llm2llm.rounds import ending_reason, round_rows
from coordinator.llm2llm.rows import read_seeds
from coordinator.llm2llm.teachers.base import Reply
from coordinator.llm2llm.teachers.recorded import RecordedAnswers
from coordinator.storage.memory import MemoryStore
from plutino.errors import JobError, PlutinoError
from plutino.job.data import TaskConfig
from plutino.llm2llm import LoopConfig, RecordedTeacher

SEED = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four")]
NEW = ["apples grow on tall trees", "the boat left at dawn", "seven cold grey stones", "music from far away", "rain"]


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SEED))
    shape, rows = read_seeds(TaskConfig(name="rows", train=str(path)))
    return Seeds(shape=shape, rows=tuple(rows), answers=frozenset())


class Teacher:
    """Answers by the number of questions that it was asked so far."""

    def __init__(self, *replies, dies_after=None):
        self.asked = []
        self._replies = replies
        self._dies_after = dies_after

    async def answer(self, asks, take):
        for ask in asks:
            if self._dies_after is not None and len(self.asked) == self._dies_after:
                raise asyncio.CancelledError
            self.asked.append(ask)
            reply = self._replies[(len(self.asked) - 1) % len(self._replies)]
            await take(ask, reply if isinstance(reply, Reply) else Reply(reply))


def new(text, answer="x"):
    return json.dumps({"prompt": text, "completion": answer})


def config(**changes):
    return LoopConfig(teacher=RecordedTeacher(path="none"), **changes)


def run(records, seeds, teacher, wrong=(0, 1, 2), number=0, earlier=(), **changes):
    questions = RoundQuestions(records, "loop", number, config(**changes), seeds, earlier)
    return asyncio.run(questions.run(teacher, wrong))


def test_round_asks_once_about_each_wrong_row_and_again_for_what_is_missing(seeds):
    teacher = Teacher(new(NEW[0]), "nonsense", new(NEW[0]), new(NEW[1]), new(NEW[2]))
    outcome = run(LoopRecords(MemoryStore()), seeds, teacher)
    assert [(one.seed, one.row["prompt"]) for one in outcome.kept] == [(0, NEW[0]), (1, NEW[1]), (2, NEW[2])]
    assert [ask.seed_json for ask in teacher.asked[3:]] == [seeds.rows[i].json for i in (1, 2)]
    assert (outcome.asked, outcome.failed, sum(outcome.rejected.values())) == (5, 0, 2)
    assert outcome.questions == {0: 1, 1: 2, 2: 2}


def test_round_that_is_cut_off_in_the_middle_asks_only_what_has_no_reply_and_ends_alike(seeds):
    replies = [new(NEW[0]), "nonsense", new(NEW[0]), new(NEW[1]), new(NEW[2])]
    whole = run(LoopRecords(MemoryStore()), seeds, Teacher(*replies))
    for cut in range(5):
        records = LoopRecords(MemoryStore())
        first = Teacher(*replies, dies_after=cut)
        with pytest.raises(asyncio.CancelledError):
            run(records, seeds, first)
        second = Teacher(*replies[cut:])
        assert run(records, seeds, second) == whole
        assert len(first.asked) + len(second.asked) == 5
        assert run(records, seeds, Teacher()) == whole


def test_teacher_that_fails_sometimes_costs_its_question_and_nothing_else(seeds):
    teacher = Teacher(Reply(None, "the endpoint answered 500"), new(NEW[0]), new(NEW[1]), Reply(None, "again"))
    outcome = run(LoopRecords(MemoryStore()), seeds, teacher)
    assert (outcome.failed, outcome.asked) == (2, 4)
    assert {one.seed for one in outcome.kept} == {1, 2}


def test_teacher_that_is_away_fails_the_round_and_loses_nothing(seeds):
    records = LoopRecords(MemoryStore())
    with pytest.raises(JobError, match=r"none of 3 questions.*refused"):
        run(records, seeds, Teacher(Reply(None, "refused")))
    outcome = run(records, seeds, Teacher(new(NEW[0]), new(NEW[1]), new(NEW[2])))
    assert len(outcome.kept) == 3 and outcome.failed == 0


def test_teacher_that_repeats_itself_gives_one_row_and_the_loop_ends_where_nothing_is_new(seeds):
    records = LoopRecords(MemoryStore())
    first = run(records, seeds, Teacher(new(NEW[0])))
    assert [one.seed for one in first.kept] == [0]
    again = run(records, seeds, Teacher(new(NEW[0])), number=1, earlier=[first])
    assert not again.kept and ending_reason(again) == "the teacher gave no new row"
    assert ending_reason(run(records, seeds, Teacher(), wrong=(), number=2)) == "the student has every seed row right"


def test_new_rows_spring_from_seed_rows_alone_and_later_questions_show_what_is_known(seeds):
    records = LoopRecords(MemoryStore())
    first = run(records, seeds, Teacher(new(NEW[0]), new(NEW[1]), new(NEW[2])))
    teacher = Teacher(new(NEW[3]))
    second = run(records, seeds, teacher, wrong=(0,), number=1, earlier=[first])
    assert "different" in teacher.asked[0].turns[1].content and NEW[0] in teacher.asked[0].turns[1].content
    assert {ask.seed_json for ask in teacher.asked} <= {row.json for row in seeds.rows}
    assert teacher.asked[0].number == 1
    rows = round_rows(seeds, [first, second], seed=3)
    assert len(rows) == 8 and set(rows) >= {row.json for row in seeds.rows}
    assert rows != sorted(rows) and rows == round_rows(seeds, [first, second], seed=3)


def test_verified_rows_are_those_that_the_teacher_answers_alike(seeds):
    class Verifying(Teacher):
        async def answer(self, asks, take):
            for ask in asks:
                self.asked.append(ask)
                if "/vote/" in ask.key:
                    await take(ask, Reply("right" if NEW[0] in ask.turns[1].content else "otherwise"))
                else:
                    await take(ask, Reply(new(NEW[int(ask.key[-1])], "right")))

    outcome = run(LoopRecords(MemoryStore()), seeds, Verifying(), wrong=(0, 1), verify_votes=3, asks=1)
    assert [one.row["prompt"] for one in outcome.kept] == [NEW[0]]
    assert outcome.rejected == {"the teacher itself answers otherwise": 1}


def test_recorded_answers_are_given_in_turn_and_end(seeds, tmp_path):
    path = tmp_path / "answers.jsonl"
    # Keys in another order are the same row.
    row = {"completion": "one", "prompt": "say one"}
    path.write_text("".join(json.dumps({"row": row, "reply": text}) + "\n" for text in ("nonsense", new(NEW[0]))))
    teacher = RecordedAnswers(RecordedTeacher(path=str(path)))
    outcome = run(LoopRecords(MemoryStore()), seeds, teacher, wrong=(0, 1))
    assert [one.row["prompt"] for one in outcome.kept] == [NEW[0]] and outcome.failed == 2
    path.write_text("{}\n")
    with pytest.raises(PlutinoError, match="line 1"):
        RecordedAnswers(RecordedTeacher(path=str(path)))
