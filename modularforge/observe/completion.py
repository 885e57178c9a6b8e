"""How far a run is: one row per stage and job, and one sentence for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modularforge.config import joined_batches
from modularforge.observe.metrics import JobMetrics
from modularforge.observe.run import MOST_EXPERTS, Run
from modularforge.observe.table import duration
from modularforge.pipeline import STAGES, JobName, made_in_round

State = Literal["finished", "running", "silent", "waiting"]
# A job that has written no line for this long has probably stopped: longer than a validation and a checkpoint take.
SILENT_AFTER_SECONDS = 900.0
MOST_STEPS, MOST_JOINED = 10**12, 10**6  # so that no recorded number keeps us counting
LONGEST_SECONDS = 1e9  # 30 years: a speed of nearly nothing, and no number that a date cannot hold


@dataclass(frozen=True)
class Part:
    """One stage or job: its state, and for a training its steps so far, in all, and the seconds left."""

    name: str
    state: State
    step: int = 0
    steps: int | None = None
    tokens: int = 0
    seconds_left: float | None = None
    silent_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """Done share of the steps, where they are known."""
        if self.state == "finished":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else None

    @property
    def note(self) -> str:
        """What the state alone does not say."""
        if self.state == "running" and self.seconds_left is not None:
            return f"about {duration(self.seconds_left)} left"
        if self.state == "silent" and self.silent_seconds is not None:
            return f"no line for {duration(self.silent_seconds)}"
        return ""


def parts_of(run: Run) -> list[Part]:
    """All stages and jobs in the order of the pipeline, those that have not begun too."""
    wanted: list[str] = run.setting("evaluation.baselines", [])
    begun, rounds = {*run.artifacts, *run.jobs}, run.setting("experts.rounds", 1)
    known: list[str] = []
    for name, stage in STAGES.items():
        names = [f"{name}-{index}" for index in range(run.num_experts)] if stage.is_indexed else [name]
        is_wanted = stage.baseline in (None, *wanted) and stage.round < rounds
        is_wanted = is_wanted and (not stage.needs or bool(run.setting(stage.needs, [])))
        known += names if is_wanted or any(JobName.parse(job).stage == name for job in begun) else []
    return [
        _part(run, name, run.jobs.get(name)) for name in [*known, *(name for name in run.jobs if name not in known)]
    ]


def _part(run: Run, name: str, job: JobMetrics | None) -> Part:
    steps, tokens_per_step = _length(run, name)
    step = max(0, job.last_step - _steps_before(run, name)) if job else 0
    if name in run.artifacts:
        return Part(name, "finished", steps or step, steps or step or None, (steps or step) * tokens_per_step)
    if job is None:
        return Part(name, "waiting", 0, steps, (steps or 0) * tokens_per_step)
    silent = max(0.0, run.read_at - job.last_time) if job.last_time else None
    state: State = "silent" if silent is not None and silent > SILENT_AFTER_SECONDS else "running"
    speed = job.curves.get("tokens_per_second")
    left = None
    if speed is not None and len(speed) and speed.values[-1] > 0 and steps:
        left = min(LONGEST_SECONDS, max(0, steps - step) * tokens_per_step / float(speed.values[-1]))
    return Part(name, state, step, steps, (steps or 0) * tokens_per_step, left, silent)


def _length(run: Run, name: str) -> tuple[int | None, int]:
    """Steps of a training and tokens per step, from the settings; None and 0 for stages that do not train."""
    stage = STAGES.get(JobName.parse(name).stage)
    section = stage.schedule if stage else name
    steps, batch_size = run.setting(f"{section}.steps", 0), run.setting(f"{section}.batch_size", 1)
    if stage and stage.panel == "baselines" and section == "experts" and steps and batch_size:
        count = min(MOST_EXPERTS, run.setting("experts.count", 1))
        wanted = run.setting(f"{name}.batch_size", 0) or run.setting("joint.batch_size", 0)
        steps, batch_size = joined_batches(
            count, min(steps, MOST_STEPS), batch_size, min(wanted, MOST_JOINED * batch_size)
        )
    if name == "btx":
        batch_size = (
            run.setting("btx.batch_size", 0)
            or run.setting("joint.batch_size", 0)
            or run.setting("experts.batch_size", 1)
        )
    steps = min(steps, _steps_until(run, name, steps)) - _steps_before(run, name)
    return steps or None, batch_size * run.setting("model.context_length", 1) if steps else 0


def _steps_before(run: Run, name: str) -> int:
    """Steps that an expert has done when one of its rounds begins; 0 for all other jobs."""
    number = _round_of(run, name)
    return _steps_until(run, made_in_round(number - 1)[0], 0) if number > 1 else 0


def _steps_until(run: Run, name: str, otherwise: int) -> int:
    """Steps that an expert has done when one of its rounds ends."""
    number, rounds = _round_of(run, name), run.setting("experts.rounds", 1)
    return number * run.setting("experts.steps", 0) // rounds if number and rounds else otherwise


def _round_of(run: Run, name: str) -> int:
    """The round of experts that a job is of, 0 for other jobs."""
    stage = JobName.parse(name).stage
    return run.setting("experts.rounds", 1) if stage == "expert" else STAGES[stage].round if stage in STAGES else 0


def is_finished(run: Run) -> bool:
    """Whether the last stage is committed."""
    return "evaluate" in run.artifacts


def headline(run: Run) -> str:
    """One sentence: finished, or how much of the training is done and what is going on."""
    parts = parts_of(run)
    done = sum(part.state == "finished" for part in parts)
    if is_finished(run):
        return "finished: trained, assembled and evaluated"
    running = [part for part in parts if part.state == "running"]
    silent = [part for part in parts if part.state == "silent"]
    sentences = [f"unfinished: {done} of {len(parts)} parts are done"]
    total = sum(part.tokens for part in parts)
    if total:
        trained = sum(part.tokens * (part.share or 0.0) for part in parts)
        sentences[0] += f", {100 * trained / total:.0f} % of the training tokens"
    sentences += [_going_on(part) for part in (running + silent)[:4]]
    if len(running + silent) > 4:
        sentences.append(f"and {len(running + silent) - 4} more jobs have begun")
    if not running and not silent:
        waiting = next((part.name for part in parts if part.state == "waiting"), None)
        sentences.append(f"next is {waiting}")
    return "; ".join(sentences)


def _going_on(part: Part) -> str:
    of = f" of {part.steps}" if part.steps else ""
    note = f" ({part.note})" if part.note else ""
    return f"{part.name} is at step {part.step}{of}{note}"
