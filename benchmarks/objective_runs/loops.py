"""LLM2LLM on SNIPS: does asking about what the student gets wrong beat asking about anything?

``llm2llm`` has three arms with the same seed rows: (a) the seed alone; (b) the seed and as many new rows as (c), made
of seed rows drawn at random; (c) LLM2LLM. In the end each arm trains from the base for as many steps as the others, for
steps alone are worth more than rows. The loop is plutino's own (:mod:`coordinator.llm2llm`), with the engine in this
process in place of jobs; its students pass over their rows so few times that they still get some of them wrong.

**The teacher is no language model.** It is a program, named as such: it puts values that other seed rows have for the
same slot into a seed row's text, and says its verbs and its beginning otherwise, from a table written by hand. It reads
the seed rows with their slots and nothing else of the data. What a language model would add, this run does not tell.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine_job import EngineJob
from benchmarks.objective_runs.preferences import mean_text, shuffled, spec_of, write_rows
from benchmarks.objective_runs.run import Figures, Run, Settings
from coordinator.jobs.scoring import ScoreReport
from coordinator.llm2llm.questions import RoundQuestions, Seeds
from coordinator.llm2llm.records import LoopRecords, RoundOutcome
from coordinator.llm2llm.rounds import round_rows
from coordinator.llm2llm.rows import read_seeds
from coordinator.llm2llm.teachers.base import Ask, Reply, Take
from coordinator.storage.memory import MemoryStore
from plutino.job.data import TaskConfig
from plutino.llm2llm import LoopConfig, RecordedTeacher

_SEED_ROWS_PER_INTENT = 16
_ROUND_EPOCHS = 4
_FINAL_STEPS = 160
_COLUMNS = {"prompt": "Which intent? {text}", "completion": "intent"}
_OTHERWISE = {
    "play": ("put on", "start", "let me hear", "i want to hear", "spin"),
    "add": ("put", "include", "insert", "place"),
    "book": ("reserve", "get me", "find", "make a reservation for", "i need"),
    "rate": ("give", "score", "mark", "i would give"),
    "give": ("rate", "award", "score"),
    "find": ("look for", "search for", "locate", "show me", "where is"),
    "show": ("find", "display", "tell me", "look up"),
    "what": ("tell me what", "can you tell me what", "do you know what"),
    "is": ("will it be", "tell me if it is"),
    "weather": ("forecast", "conditions", "climate"),
    "movie": ("film", "picture"),
    "song": ("track", "tune"),
    "restaurant": ("place to eat", "bistro", "diner"),
    "playlist": ("list", "collection"),
}
_BEGINNINGS = ("", "please ", "can you ", "i want you to ", "could you ", "hey, ", "would you ", "now ")
_ENDINGS = ("", "", " please", " for me", " now", " thanks")


class Recombiner:
    """Makes new utterances of seed rows by rules; implements the loop's teacher.

    Args:
        seeds: all seed rows: the only source of slot values.
        seed: of its draws.
    """

    def __init__(self, seeds: Sequence[dict[str, Any]], seed: int) -> None:
        self._seed = seed
        self._values: dict[str, list[str]] = {}
        for row in seeds:
            for slot in row["slots"]:
                self._values.setdefault(slot["slot"], []).append(slot["text"])

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """See :class:`coordinator.llm2llm.teachers.base.TeacherHandle`."""
        for ask in asks:
            row = json.loads(ask.seed_json)
            # Several, of which the loop's own filter keeps what is new.
            rows = [self._otherwise(row, f"{self._seed} {ask.key} {draw}") for draw in range(4)]
            await take(ask, Reply("\n".join(json.dumps(one) for one in rows)))

    def _otherwise(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        def pick(choices: Sequence[str], what: str) -> str:
            return choices[int.from_bytes(hashlib.sha256(f"{name} {what}".encode()).digest()[:4], "big") % len(choices)]

        text, slots = row["text"], []
        for number, slot in enumerate(row["slots"]):
            value = pick(self._values[slot["slot"]], f"slot {number}")
            text = text.replace(slot["text"], value, 1)
            slots.append({"slot": slot["slot"], "text": value})
        for word, others in _OTHERWISE.items():
            text = re.sub(rf"\b{word}\b", pick((word, *others), word), text, count=1, flags=re.IGNORECASE)
        text = pick(_BEGINNINGS, "begin") + text + pick(_ENDINGS, "end")
        return {**row, "text": text, "slots": slots}


@dataclass(frozen=True, slots=True)
class _Student:
    """Trains from the base model on some rows, and is asked the seed and the held-out ones."""

    settings: Settings
    seed_file: str
    held_out_file: str

    def train(self, name: str, lines: Sequence[str], *, steps: int | None = None) -> ScoreReport:
        """Train on some rows, a few times over or so many steps, and answer, once."""
        return ScoreReport.model_validate_json(
            self.settings.kept(name, lambda: self._train(name, lines, steps).model_dump_json())
        )

    def _train(self, name: str, lines: Sequence[str], steps: int | None) -> ScoreReport:
        path = self.settings.folder / f"{name}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        form = {"format": "prompt_completion", "columns": _COLUMNS}
        length = {"epochs": self.settings.few(_ROUND_EPOCHS, 1)} if steps is None else {"steps": steps}
        spec = spec_of(
            self.settings,
            # With the head: the bundled model never saw the token that ends an answer.
            method={
                "type": "lora",
                "rank": 16,
                "alpha": 32,
                "target_modules": "all-linear",
                "modules_to_save": ["lm_head"],
            },
            data={
                "tasks": [
                    {"name": "seed", "train": str(path), "eval": self.seed_file, **form},
                    {"name": "held-out", "eval": self.held_out_file, **form},
                ],
                "max_tokens": 96,
            },
            scoring={"metric": "exact_match", "max_new_tokens": 12, "batch_rows": 32, "keep_answers": True},
            training={**length, "batch_size": 8, "lr": 1e-3, "warmup_steps": self.settings.few(5, 0)},
            evaluation={"measure_general": "never"},
        )
        with EngineJob(spec, threads=self.settings.threads) as job:
            job.train()
            return job.score()


def _of(rows: Sequence[dict[str, Any]], per_intent: int) -> list[dict[str, Any]]:
    taken: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if len(own := taken.setdefault(row["intent"], [])) < per_intent:
            own.append(row)
    return [row for own in zip(*taken.values(), strict=False) for row in own]


def run_llm2llm(settings: Settings) -> Figures:
    """The three arms, with what each round came to."""
    assert settings.data is not None, "the run is told where SNIPS with its slots is"
    folder = settings.data / "snips"
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    seed_rows = _of(shuffled(rows, settings.seed), settings.few(_SEED_ROWS_PER_INTENT, 1))
    seed_file = write_rows(settings.folder / "seed.jsonl", seed_rows)
    student = _Student(
        settings,
        seed_file,
        write_rows(settings.folder / "held-out.jsonl", shuffled(held_out, settings.seed)[: settings.few(700, 8)]),
    )
    shape, read = read_seeds(TaskConfig(name="seed", train=seed_file, format="prompt_completion", columns=_COLUMNS))
    seeds = Seeds(shape=shape, rows=tuple(read), answers=frozenset(row.answer for row in read))
    teacher = Recombiner(seed_rows, settings.seed)
    config = LoopConfig(
        rounds=settings.few(6, 1),
        samples_per_wrong=2,
        rouge_l=0.9,
        known_answers=True,
        # Not used: the teacher is this file's.
        teacher=RecordedTeacher(path="none"),
    )

    def ask(arm: str, number: int, wrong: Sequence[int], earlier: Sequence[RoundOutcome]) -> RoundOutcome:
        records = LoopRecords(MemoryStore())
        return asyncio.run(RoundQuestions(records, arm, number, config, seeds, earlier).run(teacher, wrong))

    outcomes: list[RoundOutcome] = []
    rounds: list[dict[str, Any]] = []
    for number in range(config.rounds):
        report = student.train(f"c-{number}", round_rows(seeds, outcomes, settings.seed))
        wrong = [row.row for row in report.rows["seed"] if not row.is_right]
        outcomes.append(ask("c", number, wrong, outcomes))
        rounds.append(
            {
                "rows": len(read) + sum(len(one.kept) for one in outcomes[:-1]),
                "wrong": len(wrong),
                "kept": len(outcomes[-1].kept),
                "rejected": outcomes[-1].rejected,
                "held_out": report.by_task["held-out"].headline,
            }
        )
        if not outcomes[-1].kept:
            break
    num_new = sum(len(one.kept) for one in outcomes)
    at_random: list[RoundOutcome] = []
    order = shuffled([{"seed": place} for place in range(len(read))] * 8, settings.seed + 1)
    drawn = [one["seed"] for one in order]
    while (left := num_new - sum(len(one.kept) for one in at_random)) > 0 and drawn:
        per_round = max(1, -(-left // config.samples_per_wrong))
        chosen = list(dict.fromkeys(drawn[:per_round]))
        drawn = drawn[per_round:]
        outcome = ask("b", len(at_random), chosen, at_random)
        at_random.append(outcome.model_copy(update={"kept": outcome.kept[:left]}))
    arms: dict[str, list[RoundOutcome]] = {"a": [], "b": at_random, "c": outcomes}
    steps = settings.few(_FINAL_STEPS, 2)
    held_out_share = {
        arm: student.train(arm, round_rows(seeds, of_arm, settings.seed), steps=steps).by_task["held-out"].headline
        for arm, of_arm in arms.items()
    }
    return {
        "seed_rows": len(read),
        "new_rows": {"b": sum(len(one.kept) for one in at_random), "c": num_new},
        "rounds": rounds,
        "steps": steps,
        **held_out_share,
        "teacher": "a program that recombines slot values of the seed and rewords by a table; no language model",
    }


def judge_llm2llm(seeds: Sequence[Figures]) -> tuple[str, bool]:
    """The claim is (c) > (b), on the mean over seeds."""
    arms = {arm: [one[arm] for one in seeds] for arm in ("a", "b", "c")}
    each = ", ".join(f"{arm} {mean_text(values)}" for arm, values in arms.items())
    goal = f"held-out accuracy {each}; goal c above b; the teacher is a program, no language model"
    return goal, sum(arms["c"]) > sum(arms["b"])


LLM2LLM = Run(run_llm2llm, judge_llm2llm, needs_data=True)
