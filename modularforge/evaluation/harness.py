"""Tasks of EleutherAI's lm-eval on our models, as `evaluation.harness` names them (extra `harness`).

The harness asks for log-probabilities and continuations and marks them as it marks those of all models; the numbers are
its own. A task is a name that it knows, whose data it takes from the Hub, or a task file of yours (YAML).
"""

# B batch  T tokens  V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from modularforge.config import Config
from modularforge.data.loader import IGNORED_TARGET
from modularforge.errors import ConfigError, DataError, one_line
from modularforge.evaluation.generation import Sampling, continue_batch
from modularforge.log import logger
from modularforge.model.backbone import Decoder
from modularforge.yaml_text import parse_yaml

BOOTSTRAPS = 100  # for errors of metrics that have no formula for them
NEW_TOKENS = 256  # of a reply, where a task does not say
TASK_FILES = (".yaml", ".yml")
Pair = tuple[list[int], list[int]]


class Harness:
    """The tasks of a run, and what was measured of each model so far."""

    def __init__(self, config: Config, tokenizer: Tokenizer, end_token: int) -> None:
        self.names = config.evaluation.harness or []
        self.documents, self.batch_size = config.evaluation.harness_documents, config.evaluation.batch_size
        self.tokenizer, self.end_token = tokenizer, end_token
        self._manager: Any = None
        self._tasks: list[str] = []
        if self.names:
            self._manager, self._tasks = _known_tasks(self.names)
        self._found: dict[str, dict[str, Any]] = {}

    def measure(self, name: str, model: Decoder) -> None:
        """Let one model do all tasks; raises DataError with what the harness says where one cannot be done."""
        if not self.names:
            return
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                harness_model(model, self.tokenizer, self.end_token, self.batch_size),
                tasks=self._tasks,
                limit=self.documents,
                task_manager=self._manager,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except Exception as error:  # data sets, templates and metrics of tasks each have their own classes
            raise DataError(
                f"evaluation.harness must name tasks that lm-eval can do here, but it says: {one_line(error)}; name "
                "others, or task files whose data is on this machine"
            ) from error
        for task, row in (found or {})["results"].items():
            self._add(task, name, row)
        logger.info("%s: tasks of lm-eval are done: %s", name, ", ".join(self._tasks))

    def results(self) -> dict[str, Any]:
        """Metrics and their standard errors by task and model, for JSON."""
        return self._found

    def _add(self, task: str, name: str, row: dict[str, Any]) -> None:
        entry = self._found.setdefault(task, {"models": {}, "errors": {}})
        numbers = {key: value for key, value in row.items() if "," in key and isinstance(value, int | float)}
        named = {_title(key): float(value) for key, value in numbers.items()}
        errors = {title: value for title, value in named.items() if "_stderr" in title}
        entry["models"][name] = {title: value for title, value in named.items() if title not in errors}
        entry["errors"][name] = {title.replace("_stderr", ""): value for title, value in errors.items()}


def harness_identity(config: Config) -> dict[str, str]:
    """The contents of task files, for the fingerprint of an evaluation; nothing where none is named."""
    files = [Path(name) for name in config.evaluation.harness or [] if name.endswith(TASK_FILES)]
    content = b"\0".join(_read(file) for file in files)
    return {"harness": hashlib.sha256(content).hexdigest()[:32]} if files else {}


def _title(key: str) -> str:
    """`acc,none` as `acc`, `exact_match,strict-match` as `exact_match (strict-match)`."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _known_tasks(names: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's index of tasks, those of files included, and the names of those that are wanted."""
    _require_harness()
    from lm_eval.tasks import TaskManager

    files = {name: Path(name) for name in names if name.endswith(TASK_FILES)}
    folders = [str(folder) for folder in dict.fromkeys(file.absolute().parent for file in files.values())]
    wanted = [_name_in(files[name]) if name in files else name for name in names]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
    if unknown := [name for name in wanted if name not in manager.all_tasks]:
        raise ConfigError(
            f"evaluation.harness must name tasks of lm-eval, but {unknown[0]!r:.80} is none; `lm-eval ls tasks` lists "
            "them, and a task file of yours ends with .yaml"
        )
    return manager, wanted


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"evaluation.harness needs lm-eval, but it cannot be imported ({one_line(error)}); run `pip install "
            "'modularforge[harness]'`, or leave it out"
        ) from error


def _name_in(file: Path) -> str:
    try:
        values = parse_yaml(_read(file))
    except ValueError as error:
        raise ConfigError(f"{file} must be a task file of lm-eval, but is no YAML ({error}); fix it") from error
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise ConfigError(f"{file} must be a task file of lm-eval, but has no `task:` with a name; add it")
    return str(values["task"])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"evaluation.harness names {file}, which cannot be read: {error.strerror}; fix it") from error


def harness_model(model: Decoder, tokenizer: Tokenizer, end_token: int, batch_size: int) -> Any:
    """A model as lm-eval asks it."""
    from lm_eval.api.model import TemplateLM

    class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """Log-probabilities of tokens behind others, and continuations, by our own decoder."""

        @property
        def eot_token_id(self) -> int:
            return end_token

        @property
        def prefix_token_id(self) -> int:
            """What a text begins with, where the tokenizer puts something there."""
            return int(next(iter(tokenizer.encode("").ids), end_token))

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [(context, wanted) for _, context, wanted in requests], batch_size)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
            return [self._rolled(ids) for ids in texts]

        def _rolled(self, ids: list[int]) -> float:
            windows = rolling_windows(ids, self.prefix_token_id, model.config.context_length)
            return sum(found for found, _ in loglikelihoods(model, list(windows), batch_size))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked = [(request.args[0], dict(request.args[1])) for request in requests]
            return [self._reply(context, settings) for context, settings in asked]

        def _reply(self, context: str, settings: dict[str, Any]) -> str:
            new_tokens = int(settings.get("max_gen_toks", NEW_TOKENS))
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            sampling = Sampling(temperature, top_p=float(settings.get("top_p", 1.0)))
            (reply,) = continue_batch(model, [prompt], new_tokens, sampling, (end_token,))
            return until(tokenizer.decode(reply), settings.get("until") or [])

    return HarnessModel()


def until(text: str, stops: str | Iterable[str]) -> str:
    """The text before the first of some stops."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def rolling_windows(ids: list[int], prefix: int, context_length: int) -> Iterator[Pair]:
    """A text as (what is read before, what is predicted), each token predicted once, behind `prefix` or its window."""
    for first in range(0, len(ids), context_length):
        yield [ids[first - 1] if first else prefix], ids[first : first + context_length]


def loglikelihoods(model: Decoder, pairs: Sequence[Pair], batch_size: int) -> list[tuple[float, bool]]:
    """For each (context, continuation) the summed log-probability of the latter, and whether it is the likeliest.

    Contexts that do not fit lose their beginning. Rows of one batch are of about one length.
    """
    limit = model.config.context_length + 1  # of which the last token is only predicted
    rows = [((context + wanted)[-limit:], min(len(wanted), limit - 1)) for context, wanted in pairs]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            for index, result in zip(chosen, _of_batch(model, [rows[index] for index in chosen]), strict=True):
                found[index] = result
    return found


def _of_batch(model: Decoder, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
    width, device = max(len(ids) for ids, _ in rows) - 1, model.lm_head.weight.device
    inputs_BT = torch.zeros(len(rows), width, dtype=torch.long)
    targets_BT = torch.full((len(rows), width), IGNORED_TARGET)
    for row, (ids, wanted) in enumerate(rows):  # what stands behind a row is not seen by it
        inputs_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets_BT[row, len(ids) - 1 - wanted : len(ids) - 1] = torch.tensor(ids[len(ids) - wanted :])
    logits_BTV = model(inputs_BT.to(device)).float()
    targets_BT = targets_BT.to(device)
    counts_BT = targets_BT != IGNORED_TARGET
    safe_BT = targets_BT.clamp(min=0)
    logs_BT = logits_BTV.log_softmax(-1).gather(2, safe_BT[..., None])[..., 0]
    sums = (logs_BT * counts_BT).sum(1).tolist()
    likeliest = ((logits_BTV.argmax(-1) == safe_BT) | ~counts_BT).all(1).tolist()
    yield from zip(sums, map(bool, likeliest), strict=True)
