"""The form of results.json, checked when it is read: it may come from a store that others can write to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from checkpoints.parsing import parse_object
from modularforge.errors import DataError

Number = float  # also from the texts "inf" and "nan"
Count = Annotated[int, Field(ge=0, le=2**63)]
Share = Annotated[float, Field(ge=0, le=1.01, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Domain(_Part):
    loss: Number
    perplexity: Number
    bits_per_byte: Number


class _Loss(_Part):
    loss: Number


class _Probe(_Part):
    mean_loss: Number
    positions: dict[str, Number] = {}
    domains: dict[str, _Loss] = {}


class _Test(_Part):
    utterances: Count
    wer: Number
    cer: Number


class _Model(_Part):
    mean_loss: Number
    perplexity: Number
    bits_per_byte: Number
    parameters: Count | None
    active_parameters: Count | None
    training_tokens: Count | None
    domains: dict[str, _Domain]
    positions: dict[str, Number] = {}
    probes: dict[str, _Probe] = {}
    carried_loss: Number | None = None
    tests: dict[str, _Test] | None = None


class _Rate(_Part):
    wer: Number
    cer: Number


class _Rates(_Rate):
    string_accuracy: Number
    token_accuracy: Number
    domains: dict[str, _Rate]


class _OneDifference(_Part):
    difference: Number
    standard_error: Number | None
    is_clear: bool


class _Difference(_OneDifference):
    domains: dict[str, _OneDifference] = {}


class _Routing(_Part):
    share_per_layer_and_expert: list[list[Share]] = Field(min_length=1)
    share_per_domain_and_expert: dict[str, list[Share]] = Field(min_length=1)
    balance_per_layer: list[Number]
    experts: list[str] | None = None

    @model_validator(mode="after")
    def _is_square(self) -> _Routing:
        rows = [*self.share_per_layer_and_expert, *self.share_per_domain_and_expert.values()]
        widths = {*map(len, rows), *([len(self.experts)] if self.experts is not None else [])}
        if len(widths) != 1 or 0 in widths:
            raise ValueError("must have one share for each expert in every row")
        return self


class _Sample(_Part):
    prompt: str
    greedy: str
    sampled: str


class _Question(_Part):
    prompt: str
    answer: str


class _Chat(_Part):
    questions: list[_Question]
    replies: dict[str, list[str]]

    @model_validator(mode="after")
    def _is_complete(self) -> _Chat:
        if any(len(texts) != len(self.questions) for texts in self.replies.values()):
            raise ValueError("must have one reply to each question by every model")
        return self


class _TaskExample(_Part):
    prompt: str
    references: list[str]
    replies: dict[str, str]


class _Task(_Part):
    prompts: Count
    models: dict[str, dict[str, Number]]
    examples: list[_TaskExample] = []
    notes: list[str] = []


class _Harness(_Part):
    models: dict[str, dict[str, Number]]
    errors: dict[str, dict[str, Number]] = {}


class _Error(_Part):
    domain: str
    audio: str
    reference: str
    hypothesis: str
    errors: Count
    words: Count


class _Utterance(_Part):
    audio: str
    text: str
    seconds: Number
    layers: list[Count]
    gates: list[list[list[Share]]]

    @model_validator(mode="after")
    def _is_whole(self) -> _Utterance:
        if len(self.layers) != len(self.gates) or any(len({*map(len, rows)}) != 1 for rows in self.gates):
            raise ValueError("must have one gate for each frame, at each of its layers")
        return self


class _Gates(_Part):
    experts: Count
    vectors: Count
    norm_per_layer_and_vector: list[list[Number]] = Field(min_length=1)
    scale_per_layer_and_expert: list[list[Number]] = []
    share_per_layer_and_vector: list[list[Share]] = []
    share_per_domain_and_vector: dict[str, list[Share]] = {}
    evenness_per_layer: list[Number] = []
    strength_per_layer: list[Number] = []
    utterance: _Utterance | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> _Gates:
        rows = [*self.norm_per_layer_and_vector, *self.share_per_layer_and_vector]
        widths = {*map(len, rows), *map(len, self.share_per_domain_and_vector.values())}
        widths |= {*map(len, self.utterance.gates)} if self.utterance else set()
        layers = [len(self.scale_per_layer_and_expert), len(self.share_per_layer_and_vector)]
        layers += [len(self.evenness_per_layer), len(self.strength_per_layer)]
        if widths != {self.experts * self.vectors} or {*layers} - {0, len(self.norm_per_layer_and_vector)}:
            raise ValueError("must have one value for each layer and vector")
        return self


class _Results(_Part):
    name: str
    task: str = "text"
    domains: list[str] = Field(min_length=1)
    models: dict[str, _Model] = Field(min_length=1)
    routing: dict[str, _Routing] = {}
    samples: dict[str, list[_Sample]] = {}
    chat: _Chat | None = None
    tasks: dict[str, _Task] = {}
    harness: dict[str, _Harness] = {}
    errors: list[_Error] = []
    gates: dict[str, _Gates] = {}
    differences: dict[str, dict[str, _Difference]] = {}
    chosen: str | None
    seconds: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    peak_memory_bytes: Number = 0.0

    @model_validator(mode="after")
    def _belongs_together(self) -> _Results:
        if self.chosen is not None and self.chosen not in self.models:
            raise ValueError(f"chosen must be one of the models, but is {self.chosen!r:.60}")
        for name, model in self.models.items():
            if self.task == "speech":
                _Rates.model_validate(model.model_dump())
            if missing := [label for label in self.domains if label not in model.domains]:
                raise ValueError(f"models must have every domain, but {name!r:.60} lacks {missing[0]!r:.60}")
        return self


def parse_results(content: bytes, url: str) -> dict[str, Any]:
    """What an evaluation has written, numbers as floats; raises DataError, `url` names it there."""
    try:
        return checked_results(parse_object(content))
    except ValueError as error:
        raise DataError(
            f"{url} must be the results of an evaluation, but {_reason(error)}; run `modularforge evaluate` again"
        ) from error


def checked_results(values: dict[str, Any]) -> dict[str, Any]:
    """The same for values that are parsed; raises ValueError."""
    return _Results.model_validate(values).model_dump()


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return f"{error!s:.200}"
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])!r:.80} is wrong: {first['msg']:.120}"
