"""Every setting, typed, documented and strict; the resolved copy is saved beside every output.

A YAML file, ``--set key=value`` and ``--smoke-test`` are merged in that order and validated at once, so one run of the
command reports every mistake with its dotted path. This file imports no torch: the launcher and ``--help`` read it.
"""

from __future__ import annotations

import shlex
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from checkpoints.redact import redact_urls, redact_values
from modularforge.presets import preset_example, preset_names
from modularforge.tasks.task import LEARN_RESPONSES
from modularforge.yaml_text import plain_number

ONE_LINE = r"^[^\p{Cc}\p{Zl}\p{Zp}]*$"
NAME = r"^[A-Za-z0-9_.-]+$"
OPTION = r"^[A-Za-z][A-Za-z0-9_-]*$"
PATTERN_WISHES = {
    ONE_LINE: "one line without control characters",
    NAME: "letters, digits, dots, dashes and underscores only",
    OPTION: "the name of an option of sbatch, such as mail-type",
}

PartitionMethod = Literal["random", "clustered", "curriculum", "domain"]
# Texts end up in scripts, logs, paths and names, so they are one line each; only prompts may be more.
Line = Annotated[str, Field(pattern=ONE_LINE)]
Text = Annotated[str, Field(pattern=ONE_LINE, min_length=1)]
Prose = Annotated[str, Field(pattern=r"^[^\x00]*$")]
# Each is named by what its rows are.
RouterKind = Literal["evidence", "ridge", "means", "trained", "trained_equalised", "random", "uniform"]
RECORDED_ROUTERS = {
    "ridge": "data_stats",
    "means": "centred_means",
    "trained": "learned",
    "trained_equalised": "equalised",
    "random": "kaiming",
}
"""By name, the one of earlier versions: in identities and facts of artifacts for good, and still read in settings."""


def router_today(value: Any) -> Any:
    """What a router of an earlier version is called now; anything else as it is."""
    return next((name for name, recorded in RECORDED_ROUTERS.items() if recorded == value), value)


Module = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES: tuple[Module, ...] = typing.get_args(Module)
"""Matrices of a layer that an adapter can stand beside."""
ATTENTION_MODULES, MLP_MODULES = MODULES[:4], MODULES[4:]
SharedPart = Literal["embeddings", "head", "attention", "norms"]
"""What experts share of a backbone, all but its feed-forward blocks."""
MOST_ROUNDS = 8  # each but the last has two rows in the table of stages
PhaseNames = Literal["attn->mlp->both", "both->mlp->attn", "both->mlp->both", "early->late"]
LARGEST_NUMBER = 2**63  # what files, tensors and Slurm can hold
FEW_TOKENS = 4096  # enough for the mean size of a residual stream, and to see that a model is the one it was
TRAINED_ROUTERS = ("trained", "trained_equalised")  # their rows are trained with the experts
TrainedOnAll = Literal["dense", "dense_wide", "joint", "joint_evidence", "joint_lora", "joint_lora_wide"]
TRAINED_ON_ALL: tuple[TrainedOnAll, ...] = typing.get_args(TrainedOnAll)
"""Baselines that one job trains on the windows of all experts together."""


def baseline_names() -> tuple[str, ...]:
    """What `evaluation.baselines` may name: the table of stages says it, and reads this file itself."""
    from modularforge.pipeline import baseline_names as of_rows

    return of_rows()


def _known_baseline(name: str) -> str:
    if name not in (known := baseline_names()):
        *others, last = map(repr, known)
        raise PydanticCustomError("baseline", "Input should be {names}", {"names": f"{', '.join(others)} or {last}"})
    return name


def _list_baselines(schema: dict[str, Any]) -> None:
    schema["enum"] = list(baseline_names())


Baseline = Annotated[str, AfterValidator(_known_baseline), Field(json_schema_extra=_list_baselines)]


class Section(BaseModel):
    """A group of settings: unknown names are refused, values are checked and never changed afterwards.

    Values are of the kind that a setting wants: `true` is no number and 5 no text. Two things are taken for what they
    say: a number in quotes, and `1e3` for a whole number. Null for a section is its defaults, with which a change takes
    back what a file says of another kind of expert.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_wanted(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_wanted(value, _kinds(cls.model_fields[str(info.field_name)].annotation))


def _kinds(annotation: Any) -> set[Any]:
    """The kinds of value in an annotation such as `int | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return _kinds(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is Annotated else {annotation}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _as_wanted(value: Any, kinds: set[Any]) -> Any:
    if value is None and types.NoneType not in kinds and any(_is_section(kind) for kind in kinds):
        value = {}
    if isinstance(value, str) and kinds & {int, float} and str not in kinds:
        found = plain_number(value)
        value = value if found is None else found
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise PydanticCustomError("number_size", "Input should be a number of less than twenty digits")
    return value


class SafeSection(Section):
    """Settings that hold URLs: read with their passwords and signatures, and saved, recorded and hashed without."""

    @model_serializer(mode="wrap")
    def _without_secrets(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = redact_values(serialize(self), redact_urls)
        return values


class ExampleConfig(Section):
    """How the records of a source become examples of what is asked and what is answered (`task: instruction`)."""

    preset: Text | None = None
    """A task that is known by name (docs/tasks.md): what is null here is as it says."""
    prompt: Prose | None = None
    """Jinja template of the prompt, of a record's fields, such as `"Question: {{ question }}\\nAnswer: "`; null takes
    the field `prompt_field` as it is."""
    response: Prose | None = None
    """Jinja template of the response; null takes the field `response_field`."""
    prompt_field: Text | None = None
    """Field that is the prompt; null is `prompt`. Of several names (`question|query`) the first that a record has."""
    response_field: Text | None = None
    """Field that is the response; null is `response`. A list of texts there is an example for each, of one prompt."""
    unlabelled: list[Text] | None = None
    """Responses that stand for none, such as `-`: they are left out."""
    messages_field: Text | None = None
    """Field that holds a chat, a list of `{role, content}`, in place of prompt and response; the tokenizer's chat
    template writes it, and all turns of the assistant are learned."""
    system: Prose | None = None
    """Message of the system before every chat that has none; prompts and responses become chats by it."""
    as_chat: bool | None = None
    """Write prompt and response as a chat, with the tokenizer's chat template; null is false."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        """What a preset says where the settings say nothing; resolved settings say all of it."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        if values["preset"] not in preset_names():
            names = ", ".join(preset_names())
            raise PydanticCustomError("preset", "Input should be a section with a preset of {names}", {"names": names})
        given = {name: value for name, value in values.items() if value is not None}
        replaced = {name.removesuffix("_field") for name in given if name.endswith("_field")}
        known = {name: value for name, value in preset_example(values["preset"]).items() if name not in replaced}
        return {**known, **given}

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template writes the examples."""
        return bool(self.as_chat or self.system or self.messages_field)


CAME_TO_SOURCES = ("example", "tokenizer", "piece_characters")


class SourceConfig(SafeSection):
    """One labelled part of the corpus: a Hub data set, or files at any URL that fsspec knows."""

    name: str = Field(pattern=NAME)
    """Label of the documents; evaluation reports one row per label and `domain` partitions split by it."""
    hub: Text | None = None
    """Hub data set (for example `Salesforce/wikitext`); train, validation and test then name its splits."""
    hub_config: Line | None = None
    """Configuration of the Hub data set (for example `wikitext-103-raw-v1`)."""
    train: Text | list[Text]
    """Files of the training split: a path, URL or pattern (`code/**/*.py`), or a list; each file is read once, hidden
    ones only where a pattern names their dot. `sample:law/train.jsonl.gz` is in the package; `${NAME}` in a URL stands
    for an environment variable, so that no password is saved with the settings."""
    validation: Line | list[Line] | None = None
    """Files of the validation split; without it `data.heldout_fraction` of the training documents is taken."""
    test: Line | list[Line] | None = None
    """Files of the test split; without it `data.heldout_fraction` of the training documents is taken."""
    format: Literal[
        "auto", "text", "wikitext", "jsonl", "parquet", "warc", "megatron", "npy", "uint16", "uint32"
    ] = "auto"  # fmt: skip
    """`auto` goes by the ending: .jsonl, .parquet, .tokens and .raw (WikiText), .warc and .wet, .idx (Megatron) and
    .npy (ids), else text; all of text also .gz .zst .bz2 .xz. `wikitext` is one document an article (` = Title = `
    lines); `text` one a file, cut by `piece_characters`; `uint16` and `uint32` are files of bare ids."""
    tokenizer: Text | None = None
    """The tokenizer.json (path or URL, such as `hf://OWNER/NAME/tokenizer.json`) that made the ids of Megatron, .npy
    and bare files, which become text again."""
    piece_characters: int | None = Field(None, ge=100, le=1 << 24)
    """Files of format `text` are cut into documents of at most so many characters, and half as many at the least,
    behind a blank line, line or word; null is 64 Ki without a least. Held-out shares and clusters are of documents."""
    text_field: Text = "text"
    """Column that holds the text, in JSONL, Parquet and Hub data sets."""
    label_field: Text | None = None
    """Column whose value labels each document instead of `name`: a text, a number or a date. Documents without a value
    (null, NaN, empty) keep `name`."""
    example: ExampleConfig | None = None
    """How records become prompts and responses, for `task: instruction`; null takes the fields `prompt` and
    `response`."""

    @model_serializer(mode="wrap")
    def _without_secrets(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = redact_values(serialize(self), redact_urls)
        # Sources of text are recorded, and hashed, as they were before there were examples and ids.
        return {name: value for name, value in values.items() if value is not None or name not in CAME_TO_SOURCES}


CleanStepName = Literal[
    "repair",
    "length",
    "repetition",
    "gopher",
    "c4",
    "fineweb",
    "language",
    "personal",
    "exact",
    "near",
    "decontaminate",
]
CHANGES_TEXT: tuple[CleanStepName, ...] = ("repair", "c4", "personal")
WHOLE_CORPUS: tuple[CleanStepName, ...] = ("exact", "near")
MOST_CLEANING_TASKS = 256  # whose signatures one job reads side by side
MOST_WHOLE_CORPUS = 3  # steps between which tasks wait for each other


class CleanStepConfig(SafeSection):
    """One step of cleaning."""

    step: CleanStepName
    """`repair` (mojibake), `length`, `repetition` (Gopher's rules), `gopher`, `c4` and `fineweb` (their rules of
    quality), `language`, `personal` (e-mail and IP addresses become others), `exact` and `near` (duplicates),
    `decontaminate` (documents that share word n-grams with given sets)."""
    sources: list[Text] | None = None
    """Names of the sources whose documents it looks at; null is all, as for `exact` and `near`, which know no other."""
    options: dict[Line, bool | int | float | Line | list[Line] | list[list[int | float]] | None] = {}
    """Parameters of the step, by datatrove's names for them (docs/text.md); the others are as it has them."""


class MixConfig(Section):
    """How often the text of a source is drawn in training."""

    source: Text
    """Name of the source, or a label that `label_field` gives."""
    weight: float = Field(1.0, ge=0)
    """It is drawn in proportion to this times its tokens (see `data.temperature`); 0 draws none of it."""
    epochs: float | None = Field(None, gt=0)
    """None of its text is drawn more often than this; the others then take its share. Null is no limit."""


class DataConfig(Section):
    """Where text comes from and how it becomes tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    """The labelled parts of the corpus."""
    min_article_length: int = Field(100, ge=0)
    """Documents of text shorter than this many characters are dropped."""
    max_documents_per_source: int | None = Field(None, ge=1)
    """Read at most this many training documents of each source; null reads all. Validation and test files that a source
    names are read whole; where they are taken from its training documents, a tenth of this many is."""
    heldout_fraction: float = Field(0.01, gt=0, lt=0.5)
    """Share of the documents held out for validation, and again for test, where a source names no such split."""
    clean: list[CleanStepConfig] = []
    """Steps that clean the documents before anything else reads them, in this order; none by default (extra `clean`).
    `near` comes after the steps that change text."""
    packing: Literal["stream", "documents"] = "stream"
    """`stream` trains on windows of all documents one after another; `documents` on whole documents, several in a
    sequence where they fit, of which none sees another (docs/text.md). Prepared data is the same."""
    mix: list[MixConfig] = []
    """Sources that training draws more or less often than their tokens say, for the backbone and inside partitions
    (docs/text.md). Prepared data is the same."""
    temperature: float | None = Field(1.0, ge=1)
    """Sources are drawn in proportion to their tokens to the power of 1 / temperature, times their weights in
    `data.mix`: above 1 small ones come more often; null draws by the weights alone."""
    vocab_size: int = Field(16384, ge=260, le=1_000_000)
    """Entries of the byte-level BPE vocabulary: 4 special tokens, 256 bytes, and merges. With `model.pretrained` it is
    that model's."""
    tokenizer_sample_bytes: int = Field(100_000_000, ge=1000)
    """The tokenizer learns from this many bytes of training text at the most, spread evenly over the sources."""


class PartitionConfig(Section):
    """How the training documents are divided among the experts."""

    method: PartitionMethod = "clustered"
    """`domain` by source label, `clustered` by content, `curriculum` by difficulty, `random` as the baseline."""
    overlap_ratio: float = Field(0.0, ge=0.0, le=0.5)
    """Every partition also gets documents of the others amounting to this share of its own."""
    everywhere: list[Text] = []
    """Labels (names of sources) that are no expert's own: all of their documents go into every partition, such as
    general or instruction text, against forgetting; `data.mix` says how much of them is drawn (docs/text.md)."""
    cluster_encoder: Text = "tfidf"
    """`tfidf` (hashed, scikit-learn), or the name of a sentence-transformers model (extra `embeddings`)."""
    cluster_sample_documents: int = Field(20_000, ge=10)
    """k-means is fitted on this many documents drawn by the seed; the others are assigned to the centres."""


GONE_FROM_ROPE = ("mscale", "mscale_all_dim")  # DeepSeek's, whose models we do not compute


class RopeScalingConfig(Section):
    """How rotary frequencies are stretched for long contexts; the names are those of `rope_scaling` in config.json."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """`linear` divides all frequencies, `llama3` the low ones; `yarn` blends both (arXiv 2309.00071)."""
    factor: float = Field(gt=0)
    """The context is stretched by this factor."""
    original_max_position_embeddings: int | None = Field(None, ge=1)
    """Context length before the stretching; null is that of the model."""
    low_freq_factor: float | None = Field(None, gt=0)
    """`llama3`: wavelengths over the original context divided by this are stretched in full."""
    high_freq_factor: float | None = Field(None, gt=0)
    """`llama3`: wavelengths under the original context divided by this are not stretched."""
    beta_fast: float | None = Field(None, gt=0)
    """`yarn`: frequencies that turn more often than this in the original context are kept; null is 32."""
    beta_slow: float | None = Field(None, gt=0)
    """`yarn`: frequencies that turn less often than this are divided by the factor; null is 1."""
    attention_factor: float | None = Field(None, gt=0)
    """`yarn`: cosines and sines are multiplied by this; null is 0.1 ln(factor) + 1."""
    truncate: bool | None = None
    """`yarn`: whether the blended range begins and ends at whole dimensions; null is true."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_gone(cls, values: Any) -> Any:
        """Settings that earlier versions recorded have these names too, with null unless the model was DeepSeek's."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in GONE_FROM_ROPE or value is not None}


class ModelConfig(Section):
    """Shape of the backbone; the assembled model has one such feed-forward block per expert and layer."""

    pretrained: Text | None = None
    """Llama or Qwen3 model to start from: a folder, a URL, or `name/on-the-hub`. Its files give tokenizer and shape; of
    these settings, only `context_length` is still yours."""
    family: Literal["llama", "qwen3"] = "llama"
    """`llama` is assembled into Mixtral; `qwen3` normalises queries and keys, and is assembled into Qwen3-MoE."""
    width: int = Field(512, ge=8)
    """Width of the residual stream."""
    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    heads: int = Field(8, ge=1)
    """Query heads."""
    kv_heads: int = Field(8, ge=1)
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    ffn_width: int = Field(1368, ge=8)
    """Inner width of the SwiGLU block; 1368 has the parameters of a plain block of 2048 at width 512."""
    head_width: int | None = Field(None, ge=2)
    """Width of one head; null is `width` / `heads`."""
    context_length: int = Field(512, ge=8)
    """Tokens of the sequences in training and evaluation."""
    max_positions: int | None = Field(None, ge=8)
    """Longest sequence the model is made for; null is `context_length`."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary position angles."""
    rope_scaling: RopeScalingConfig | None = None
    """How the rotary frequencies are stretched; null leaves them as they are."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    tied_head: bool = True
    """The output head shares the embedding matrix."""

    @property
    def width_per_head(self) -> int:
        """Width of one head, whether it was set or follows from the others."""
        return self.head_width or self.width // self.heads

    @property
    def positions(self) -> int:
        """Longest sequence the model is made for."""
        return self.max_positions or self.context_length


class PhaseConfig(Section):
    """Length, batch and schedule of one training phase."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Sequences of `model.context_length` tokens in one step, over all ranks and accumulation steps."""
    accumulation_steps: int = Field(1, ge=1)
    """Each step's batch is computed in this many pieces to save memory; the result is the same."""
    peak_learning_rate: float = Field(1e-3, gt=0)
    """AdamW learning rate after warm-up."""
    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The cosine schedule ends at this share of the peak."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norm gains and embeddings never decay."""


class TrainingConfig(Section):
    """What all training phases share."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second moment decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast or fp32; `auto` is bf16 on a GPU that has it and fp32 on a CPU."""
    compile: bool | None = None
    """Compile the model with torch.compile: whole, or block by block where `parallel` cuts it into pieces. null does so
    on a GPU, for a language model and at least 1,000 steps, where torch and the machine have what it takes."""
    recompute: Literal["none", "blocks", "auto"] = "none"
    """`blocks` keeps the input of each block alone for the backward pass and computes the block again there: a third
    more work, the same values, far less memory; `auto` does so on a GPU that could not hold the rest."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How processes share a job: `ddp` has all of the model in each, `fsdp` shards weights, gradients and moments over
    all, `hsdp` over a few and repeats that (docs/scale.md says when); one process is the same with each."""
    shard_ranks: int | None = Field(None, ge=2)
    """Processes over which `hsdp` shards; null is those of a node, between which traffic is fast."""
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    """The type in which processes add up their gradients: `bf16` sends half as much, and rounds what is sent."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics."""
    gradient_norms: int | None = Field(0, ge=0)
    """Steps between measurements of the gradients' norms by group and layer (docs/observing.md); 0 or null measures
    none."""
    validate_every: int = Field(200, ge=1)
    """Steps between validations."""
    validation_tokens: int = Field(65_536, ge=1)
    """Tokens of each validation at the most."""
    patience: int | None = Field(None, ge=1)
    """End a job after so many validations in a row without a better loss, and keep the weights of the best one in any
    case; null trains all steps and keeps the last ones. A calibration has none."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between training checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Training checkpoints of a job that are kept; the newest good one always is."""
    keep_checkpoints_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this many steps are kept as well; 0 keeps only the newest."""
    packing: bool = True
    """Examples of `task: instruction` share a sequence where they fit, without seeing each other; false pads each."""
    checkpoint_fallback: bool = False
    """Where the newest checkpoint is damaged, set it aside and go on from an older one; false stops the job."""


class BackboneConfig(PhaseConfig):
    """The backbone: trained on everything."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; norm gains and embeddings never decay."""


class LoraPhaseConfig(Section):
    """One phase of a LoRA expert's training: which adapters learn in it; the others stay as they are."""

    until: int | None = Field(None, ge=1)
    """Steps that are done when it ends; null is the end of training, for the last phase."""
    train: list[Literal["attention", "mlp"]] = Field(["attention", "mlp"], min_length=1)
    """The adapters that learn: those of attention, of the feed-forward block, or both."""
    layers: Literal["all", "early", "late"] | list[Annotated[int, Field(ge=0)]] = "all"
    """The layers whose adapters learn: `all`, the first half (`early`), the second (`late`), or numbers from 0."""


class LoraConfig(Section):
    """Experts of kind `lora`: low-rank adapters (arXiv 2106.09685) beside frozen matrices, in PEFT's format."""

    rank: int = Field(8, ge=1, le=65_536)
    """Rank of each adapter."""
    alpha: float = Field(16.0, gt=0)
    """What an adapter adds is multiplied by `alpha` / `rank`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    targets: Literal["attention", "mlp", "both"] | Annotated[list[Module], Field(min_length=1)] = "attention"
    """Matrices that get an adapter: `attention` (q_proj, v_proj), `mlp` (gate_proj, up_proj, down_proj), `both` (all
    seven, with k_proj and o_proj), or a list of names."""
    rslora: bool = False
    """Multiply by `alpha` / sqrt(`rank`) instead (rank-stabilised LoRA, arXiv 2312.03732)."""
    phases: PhaseNames | list[LoraPhaseConfig] | None = None
    """Which adapters learn when: null all of them always; a name for phases of equal length, such as `attn->mlp->both`
    or `early->late` (first half of the layers, then the second); or a list of `until`, `train` and `layers`."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the matrices that get an adapter, in the order of a layer."""
        groups = {"attention": ("q_proj", "v_proj"), "mlp": MLP_MODULES, "both": MODULES}
        wanted = groups[self.targets] if isinstance(self.targets, str) else self.targets
        return tuple(name for name in MODULES if name in wanted)


class OuterConfig(Section):
    """The step that a merge between rounds takes from the last shared weights towards the mean of the experts'."""

    rate: float = Field(1.0, gt=0)
    """Share of the way that it goes; 1 without momentum takes the mean itself. DiLoCo (arXiv 2311.08105) has 0.7."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Nesterov momentum from merge to merge; DiLoCo has 0.9."""


class ExpertsConfig(PhaseConfig):
    """The experts: how many, what each starts from, and how it trains."""

    count: int = Field(5, ge=1)
    """Experts to train, one per partition; the assembled model has the public FFN beside them."""
    kind: str = Field("ffn", pattern=NAME)
    """What an expert is: `ffn`, a feed-forward block; `lora`, adapters; `steering`, vectors in a speech encoder (task
    `speech`); or a kind that an installed package adds (entry points
    `modularforge.experts`)."""
    anchored: bool = False
    """Train beside the frozen public FFN with a router row of its own (FlexOlmo); false trains a plain FFN alone, which
    was better in our runs (docs/method.md)."""
    init: Literal["backbone", "fresh"] = "backbone"
    """An expert starts as a copy of the public FFN, or from random weights."""
    z_loss: float = Field(1e-3, ge=0)
    """Weight of the router z-loss, mean of logsumexp(router logits) squared."""
    statistics: Literal["moments", "norms"] | None = None
    """What a finished expert gathers for routers. `moments`: sums with outer products, for any router; `norms`: sums
    alone, of 4,096 tokens at the most, for all but `ridge`. On a large backbone, moments are gigabytes and minutes:
    null gathers norms on a pretrained one, unless `assembly.router` is `ridge` or `evaluation.baselines` has `btx`, and
    moments elsewhere."""
    statistics_tokens: int = Field(262_144, ge=1)
    """Tokens of its partition from which a finished expert gathers router statistics."""
    counted_tokens: int = Field(20_000_000, ge=1)
    """Tokens of its partition, and of all text for the backbone, that are counted for the evidence router."""
    counted_pairs: int = Field(1_000_000, ge=0, le=2**27)
    """Pairs of tokens of them whose counts are kept, the commonest; 0 counts none. They tell which words follow which
    (docs/method.md)."""
    unfreeze: list[SharedPart] = []
    """Parts of the backbone that every expert's job trains too, each on its own; the assembled model has their mean
    (docs/rounds.md)."""
    unfreeze_rate: float = Field(0.1, gt=0, le=1)
    """Learning rate of these parts, as a share of the experts'."""
    rounds: int = Field(1, ge=1, le=MOST_ROUNDS)
    """Rounds that the training is cut into: after each but the last, a job merges the shared weights of all experts,
    which go on from there. Steps are those of all rounds together."""
    settle: bool = False
    """In the last round, leave the shared weights as they were merged, so that each expert's own block ends behind the
    weights that the assembled model has."""
    outer: OuterConfig = OuterConfig()
    lora: LoraConfig = LoraConfig()


class BaselineConfig(Section):
    """Batch and rate of a baseline that trains on the windows of all experts together; all else is the experts'."""

    batch_size: int | None = Field(None, ge=1)
    """Sequences in one step, at the most: the largest multiple of `experts.batch_size` that leaves none over. Null is
    `joint.batch_size`."""
    peak_learning_rate: float | None = Field(None, gt=0)
    """AdamW learning rate after warm-up; null is the experts', which was chosen for their small batches."""


class JointConfig(BaselineConfig):
    """The baseline mixture of the assembled model's shape, from copies of the backbone's FFN (sparse upcycling)."""

    batch_size: int | None = Field(None, ge=1)
    """Sequences in one step, at the most: the largest multiple of `experts.batch_size` that leaves none over. Null is
    one such batch, often too small: an expert alone wants far smaller ones (docs/method.md)."""
    freeze_shared: bool = False
    """Train feed-forward blocks and routers only, as the experts' jobs do; false trains everything."""
    balance_loss: float = Field(0.01, ge=0)
    """Weight of the load-balance loss (Switch Transformer), here and in `btx`."""


class BtxConfig(BaselineConfig):
    """The BTX baseline's second phase (arXiv 2403.07816): the merged branches trained on, on all partitions mixed.

    It takes the windows that come after those of the branches.
    """

    steps: int = Field(100, ge=1)
    """Optimizer steps, on top of the branches'; lower `experts.steps` where all baselines shall get as many tokens."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences in one step; null is `joint.batch_size`, or else `experts.batch_size`."""
    trains: Literal["router", "shared", "all"] = "shared"
    """`router`: router rows alone; `shared`: all but the experts' FFNs, which is enough by the paper; `all`."""


class AssemblyConfig(Section):
    """How backbone and experts become one model."""

    router: RouterKind = "evidence"
    """What its rows are. `evidence`: which partition the text so far resembles, from counts of tokens and their pairs;
    `ridge`: ridge regression from sums; `means`: of each expert's inputs, centred; `trained` with the experts;
    `trained_equalised`: the same at one length; `random`; `uniform`: all experts alike."""
    experts_per_token: int = Field(2, ge=1)
    """Experts that each token visits."""
    public_expert: bool | None = None
    """Keep the public FFN as expert 0; null keeps it for the evidence router, which chooses it where nobody has
    evidence, and when the experts were anchored to it."""
    token_pairs: int = Field(262_144, ge=0, le=2**27)
    """Pairs of tokens that the evidence router knows in ModularForge (`text_router.tables`, 8 bytes and 2 per expert
    each); 0 writes no tables, so that the model routes by the tokens in its own rows, as it does in other programs."""
    width_multiple: int = Field(1, ge=1, le=65_536)
    """The evidence router makes the width a multiple of this, such as 64 or 128 for quantised kernels of servers."""
    head_multiple: int = Field(1, ge=1, le=1024)
    """And the number of key-value heads a multiple of this, such as the processes of tensor parallelism."""
    ridge_penalty: float = Field(1e-2, gt=0)
    """Ridge penalty of `ridge`, as a share of the mean diagonal of the second moments."""
    router_temperature: float = Field(0.2, gt=0)
    """Router logits of `evidence`, `ridge` and `means` are divided by this."""
    mode: Literal["auto", "merge", "link"] = "auto"
    """`merge` writes all weights into files of `max_shard_bytes`. `auto` makes a file per part and takes over unchanged
    experts without moving their bytes (hard links, server-side copies) where it can; `link` refuses where it cannot."""
    lora: Literal["adapters", "fold", "average"] = "adapters"
    """What LoRA experts become: `adapters`, the backbone with all of them and what chooses among them; `fold`, an
    ordinary mixture (adapters of feed-forward blocks only); `average`, one adapter that adds their mean."""
    lora_choice: Literal["token", "sequence"] = "token"
    """`adapters`: which of them a token visits is chosen for each token, or once for a sequence by its beginning."""
    shared: Literal["equal", "tokens", "counts", "own"] = "equal"
    """How experts weigh in the mean of what `experts.unfreeze` lets them train, in the assembled model and between
    rounds: alike, by the tokens of their partitions, or alike but for embeddings and head: with `counts` each row
    weighs by how often an expert's text has its token, with `own` each expert keeps its own, and tokens visit them
    (docs/rounds.md)."""
    dtype: Literal["same", "fp32", "bf16", "fp16"] = "same"
    """Type of the assembled weights; `same` keeps the backbone's."""
    max_shard_bytes: int = Field(5_000_000_000, ge=1_000_000)
    """Weight files that are written, and would be larger than this, are split, as Hugging Face does."""

    @field_validator("router", mode="before")
    @classmethod
    def _by_its_name(cls, value: Any) -> Any:
        return router_today(value)

    @property
    def recorded_router(self) -> str:
        """The router as artifacts record it."""
        return RECORDED_ROUTERS.get(self.router, self.router)


class CalibrationConfig(PhaseConfig):
    """A short training of a few parameters on validation data, kept only if held-out loss improves."""

    steps: int = Field(100, ge=0)
    """Optimizer steps."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    norms: bool = True
    """Train the gains of the RMSNorms."""
    router: bool = True
    """Train the router rows, where they route: not beside the tables of the evidence router."""
    shared: bool = False
    """Train embeddings, attention and head too, but for what the evidence router reads. Then the result is kept only if
    neither text behind a switch of domain nor `evaluation.general`, where it is given, has become worse either."""
    adapters: bool = False
    """Train the adapters of all experts together (kind `lora`); kept by the same rule as with `shared`."""
    text: Literal["validation", "training"] = "validation"
    """What is trained on: one half of the validation documents, or the windows of all partitions that come after those
    of the experts. The other half of validation decides."""


class TaskConfig(Section):
    """Prompts of a source that models answer, and how their replies are measured (docs/tasks.md)."""

    source: Text
    """Label of the test examples: the name of a source of `task: instruction`, or what its `label_field` says."""
    metrics: list[Literal["bleu", "rouge", "meteor", "exact_match", "accuracy"]] | None = None
    """What is measured (extra `tasks`); null is what the preset of the source says, or else `rouge`."""
    labels: list[Text] | None = None
    """Responses that there are, for `accuracy`; null is those of the test examples."""
    answer_mark: Text | None = None
    """`exact_match` compares what stands behind the last of these, such as `####`; null compares all."""
    new_tokens: int | None = Field(None, ge=1)
    """Tokens of a reply at the most; null is what the preset says, or else 128."""
    prompts: int = Field(200, ge=1)
    """Different prompts at the most, from the beginning of the test examples."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature, with `evaluation.top_k` and `top_p`; 0 is greedy."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, values: Any) -> Any:
        """The name of a source alone is enough."""
        return {"source": values} if isinstance(values, str) else values


class EvaluationConfig(Section):
    """What is measured, on what, and beside which baselines."""

    batch_size: int = Field(16, ge=1)
    """Sequences per batch, the same for every model."""
    tokens_per_domain: int = Field(200_000, ge=1)
    """Test tokens of each domain at the most."""
    baselines: list[Baseline] = ["dense", "soup"]
    """`dense`: the backbone trained on with all the experts' tokens; `dense_wide`: the same with as wide an FFN as a
    token visits; `soup`: the mean of the experts' weights; `joint`: a mixture trained on the same tokens;
    `joint_evidence`: the same, routed by evidence; `btx`: whole models trained alone, FFNs stacked, the rest mean;
    `joint_lora`: one adapter trained on the same tokens, and `joint_lora_wide`, of the rank of all experts together."""
    prompts: list[Prose] = ["The", "In the beginning"]
    """Texts that each model continues in the report."""
    sample_tokens: int = Field(60, ge=1)
    """Length of the continuations."""
    temperature: float = Field(0.8, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_k: int = Field(50, ge=0)
    """Sample among the k likeliest tokens; 0 takes all."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Sample among the likeliest tokens that together hold this probability."""
    tasks: list[TaskConfig] | None = None
    """Sources of `task: instruction` whose test prompts all models answer, by name or with settings."""
    harness: list[Text] | None = None
    """Tasks of EleutherAI's lm-eval (extra `harness`) that all models do: names that it knows, such as `arc_easy`, or
    task files of yours (`mine/task.yaml`)."""
    harness_documents: int | None = Field(None, ge=1)
    """Documents of each of these tasks at the most, from the first; null is all."""
    general: list[Text] | None = None
    """Files of text of no domain (paths, URLs or patterns, read like `data.sources`) to measure models on too."""
    chat: Text | None = None
    """File of prompts with known answers, a YAML list of `prompt` and `answer` or JSON lines; the answers' loss and all
    replies are reported. It needs a pretrained model with a chat template."""


class MetricsConfig(Section):
    """What jobs write beside their JSON lines."""

    tensorboard: Literal["auto", "on", "off"] = "auto"
    """TensorBoard event files in `metrics/tensorboard`; `auto` writes them when tensorboard is installed."""
    writers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Other tools that get the same numbers, each an extra of its own; docs/observing.md says where they write."""


class LauncherConfig(Section):
    """How `python -m launcher` runs the stages on this machine."""

    max_workers: int = Field(2, ge=1)
    """Experts that train side by side."""
    backbone_processes: int = Field(1, ge=1)
    """Processes of the backbone's DDP job, started by torchrun when more than one."""


class NodesConfig(Section):
    """What one kind of job asks of the cluster."""

    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    gpus: int = Field(0, ge=0)
    """GPUs per node."""
    processes: int | None = Field(None, ge=1)
    """Training processes per node; null is one per GPU, and one on a node without GPUs."""
    cpus: int = Field(4, ge=1)
    """Cores per node."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory per node; null is what the site gives."""
    time_minutes: int = Field(60, ge=1)
    """Time limit of one start; a job that needs longer goes on from its checkpoint in the next."""

    @property
    def processes_per_node(self) -> int:
        return self.processes or max(1, self.gpus)


# The launcher sets these itself, and finds jobs and logs by them.
OWN_OPTIONS = ("array", "comment", "dependency", "job-name", "output")


def _words(command: str) -> str:
    """Refuse a command that a shell could not take apart."""
    try:
        shlex.split(command)
    except ValueError as error:
        raise PydanticCustomError("words", "Input should be words of a shell with paired quotes") from error
    return command


def _free_option(name: str) -> str:
    if name.replace("_", "-") in OWN_OPTIONS:
        raise PydanticCustomError("own_option", "Input should be an option that the launcher does not set itself")
    return name


class ClusterConfig(Section):
    """How `python -m launcher --cluster` asks Slurm for nodes; nothing here changes what is computed."""

    queue: Line | None = None
    """Slurm partition, or several with commas between them; null is the site's default."""
    account: Line | None = None
    """Slurm account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    backbone: NodesConfig = NodesConfig()
    """Nodes of the backbone's DDP job, and of the dense baseline's."""
    expert: NodesConfig = NodesConfig()
    """Nodes of each expert's job: one GPU, or a whole node."""
    other: NodesConfig = NodesConfig()
    """The node that prepares data, assembles, and evaluates."""
    array_throttle: int | None = Field(None, ge=1)
    """Experts that run at the same time at the most; null leaves it to Slurm."""
    prepare_tasks: int | None = Field(None, ge=1, le=100_000)
    """Jobs that read, clean (256 at most) and tokenise a share of the text each, side by side, before `prepare-data`
    puts together what they made; the data is the same, however many there are. Null: `prepare-data` does it all."""
    min_experts: int | None = Field(None, ge=1)
    """Assembly, and each merge of a round, goes on without the others when this many experts are finished; null wants
    all."""
    straggler_minutes: int | None = Field(None, ge=1)
    """Minutes after the start of a round's jobs at which its merge goes on without those that still run, if
    `min_experts` are finished; they join the next round. Null waits until all have ended."""
    max_crashes: int = Field(3, ge=0)
    """Starts after a crash; two crashes without progress between them end a job sooner."""
    max_time_limits: int = Field(20, ge=0)
    """Starts after the time limit. Preempted jobs always start again."""
    warning_seconds: int = Field(120, ge=10)
    """Slurm warns a job this long before its time limit; a step and a checkpoint must fit in."""
    setup: list[Line] = []
    """Shell lines before the job's program, such as `module load cuda`."""
    python: Line | None = None
    """The python of jobs, on storage that nodes share; null is the one that runs the launcher."""
    container: Annotated[Line, AfterValidator(_words)] | None = None
    """Put before the `python3` that trains, such as `apptainer exec --nv /images/train.sif`."""
    pass_environment: list[Text] = ["AWS_*", "FSSPEC_*", "HF_*", "MLFLOW_*", "MODULARFORGE_*", "TRACKIO_*", "WANDB_*"]
    """Variables of your shell that jobs get; all others stay behind. Values go to Slurm, never into a file."""
    sbatch_options: dict[Annotated[str, Field(pattern=OPTION), AfterValidator(_free_option)], Line | int | bool] = {}
    """Further options of sbatch by name, such as `{reservation: spring}`."""
    work_dir: Line | None = None
    """Folder that nodes share, in which each run has one for logs, scripts and code; null: in the run's own folder, and
    of a run on an object store in `./modularforge-jobs`."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of a GPU: the launcher then refuses jobs that cannot fit, and `info` says on how many they do; null asks
    nothing."""
    price_per_gpu_hour: float | None = Field(None, ge=0)
    """What a GPU-hour costs, in any currency: `python -m launcher plan` then says what a launch may cost."""


class SpeechDataConfig(Section):
    """How audio is read and becomes features, for `task: speech`; `data.sources` say where it lies."""

    audio_field: Text = "audio"
    """Column that holds the audio: a path, beside the file that names it, a URL, or the bytes themselves."""
    prompt_field: Text | None = None
    """Column of the text that the language model reads between audio and answer; null is `speech.model.prompt`."""
    split_field: Text | None = None
    """Column that says in which split a record of the training files is: `train`, `validation` (`valid`, `dev`) or
    `test`; null holds out `heldout_fraction` of them where a source names no such files."""
    heldout_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the utterances held out for validation, and again for test, where a source says nothing of it."""
    features: Literal["whisper", "fbank"] = "whisper"
    """Whisper's log-mel spectrogram, or Kaldi's log filter banks (25 ms every 10 ms)."""
    bins: int = Field(80, ge=8, le=256)
    """Bins of the features, as many as the encoder reads."""
    normalise: Text = "none"
    """Features less their mean over their standard deviation (CMVN): `none`, of each `utterance`, of all of training
    (`corpus`), or of a statistics file: WeNet's `global_cmvn`, Kaldi's `cmvn.ark` or ESPnet's `feats_stats.npz`."""
    min_seconds: float = Field(0.1, gt=0)
    """Shorter recordings are left out."""
    max_seconds: float = Field(30.0, gt=0)
    """Longer recordings are left out."""
    max_text: int = Field(1000, ge=1)
    """Utterances with longer texts, in characters, are left out, as those with an empty one are."""
    refuses_clipped: bool = False
    """Leave out recordings of which 1 % of the samples is at full scale."""
    unusable: Literal["skip", "refuse"] = "skip"
    """Recordings that are missing, corrupt or silent are counted and left out, or stop the preparation."""
    keeps: Literal["features", "audio"] = "features"
    """What prepared data hold: `features`, computed once, or the recordings (`audio`) as their files have them, from
    which features are computed on the fly, as batches are made. Both give the same losses."""

    @property
    def statistics_file(self) -> str | None:
        """The file whose statistics normalise features, if one does."""
        return None if self.normalise in ("none", "utterance", "corpus") else self.normalise


class SpeechModelConfig(Section):
    """What stands between audio and language model, for `task: speech`; `model.pretrained` is that language model."""

    encoder: Text | None = None
    """Whisper or Wav2Vec2-BERT (a conformer, which reads `fbank`) whose encoder is taken, frozen: a folder, a URL, or
    `name/on-the-hub`; null is a random one."""
    encoder_width: int = Field(64, ge=8)
    """Width of a random encoder, which is for tests."""
    encoder_layers: int = Field(2, ge=1)
    """Layers of a random encoder."""
    pool_kernel: int = Field(4, ge=1)
    """Frames of 20 ms that become one position of the language model."""
    pool_kind: Literal["stack", "mean", "max"] = "stack"
    """What becomes of them: joined, their mean, or their maximum."""
    pool_layer: int | None = Field(None, ge=0)
    """Encoder layer behind which frames are pooled (0: before the first); null is behind the final norm."""
    projector_width: int = Field(1024, ge=1)
    """Inner width of the projector."""
    prompt: Prose = ""
    """Text that the language model reads between audio and answer, in training and evaluation."""


class SpeechTestConfig(SafeSection):
    """A test set beside a run's domains: recordings with texts at a path, on the Hub, or by a known name alone."""

    name: str = Field(pattern=NAME)
    """What tables call it; `librispeech-test-clean`, `librispeech-test-other` and `aishell-1` need nothing else."""
    path: Text | list[Text] | None = None
    """Where it is, in any form that `data.sources` take: a folder, files, URLs or patterns."""
    hub: Text | None = None
    """Hub data set, in place of a path."""
    hub_config: Line | None = None
    """Configuration of the Hub data set."""
    split: Line = "test"
    """Split of the Hub data set."""
    audio_field: Text = "audio"
    """Column that holds the audio."""
    text_field: Text = "text"
    """Column that holds what is said."""
    prompt_field: Text | None = None
    """Column of the text prompt; null is `speech.model.prompt`."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, values: Any) -> Any:
        """The name of a known set alone is enough."""
        return {"name": values} if isinstance(values, str) else values


class SpeechDecodingConfig(Section):
    """How transcripts are written and measured, for `task: speech`."""

    max_tokens: int = Field(64, ge=1)
    """Tokens of a transcript at the most."""
    max_utterances: int = Field(1000, ge=1)
    """Test utterances of each domain at the most."""
    batch_size: int = Field(16, ge=1)
    """Utterances per batch, the same for every model."""
    listed: int = Field(20, ge=0)
    """Worst utterances of each domain that are listed with audio, reference and hypothesis."""
    tests: list[SpeechTestConfig] | None = None
    """Test sets that all models are measured on beside the domains, by a known name or with settings."""


class SpeechConfig(Section):
    """The task `speech`: a frozen speech encoder, a projector and a frozen language model."""

    data: SpeechDataConfig = SpeechDataConfig()
    model: SpeechModelConfig = SpeechModelConfig()
    decoding: SpeechDecodingConfig = SpeechDecodingConfig()


class SteeringConfig(Section):
    """Experts of kind `steering`: vectors between the frozen layers of a speech encoder (arXiv 2510.13558)."""

    variant: Literal["layerwise", "aligner", "hybrid", "prompt", "lora"] = "layerwise"
    """`layerwise`: behind every layer, scaled; `aligner`: behind the encoder alone, without scale and without a prompt;
    `hybrid`: the same with the prompt; `prompt`: `layerwise`, with a prompt for each utterance; `lora`: no vectors, but
    low-rank adapters beside q, k, v, out, fc1 and fc2 of every layer."""
    vectors: int | None = Field(8, ge=1)
    """Vectors of one expert at each place, mixed by a gate for every frame; `lora` has none, whatever it says."""
    rank: int = Field(8, ge=1, le=65_536)
    """`lora`: rank of the adapters of one expert, whose learning rate is `experts.peak_learning_rate`."""
    start_scale: float = 0.1
    """What scales start at."""
    scale_bound: float | None = Field(None, gt=0)
    """Scales stay below this, by a tanh; null leaves them free."""
    active: int | None = Field(None, ge=1)
    """Vectors that are added to a frame, those with the largest gates; null adds all."""
    vector_rate: float = Field(10.0, gt=0)
    """Learning rate of vectors and scales, as a multiple of `experts.peak_learning_rate`."""
    gate_rate: float = Field(1.0, gt=0)
    """Learning rate of gates, as such a multiple."""
    joint_projector: bool = False
    """Train the projector along in the baseline `joint`, as the paper does; experts leave it, so that they fit
    together."""
    projector_rate: float = Field(0.1, gt=0)
    """Its learning rate there, as such a multiple."""
    clip_norm: float | None = Field(None, gt=0)
    """Gradients of vectors, and of gates, are each scaled down to this norm; null leaves `training.clip_norm` alone."""
    balance_loss: float = Field(0.0, ge=0)
    """Weight of a loss that is lowest where all vectors of a place are used alike, in the mean over frames."""
    orthogonality_loss: float = Field(0.0, ge=0)
    """Weight of the mean squared cosine between two vectors of a place."""
    calibrates: bool = False
    """Train the assembled model's router rows (`calibration.router`) and scales (`calibration.norms`) together in the
    stage `calibrated`, on utterances of all experts; kept only if the validation loss gets better."""
    routing: Literal["frame", "utterance"] = "utterance"
    """Experts of an assembled model weigh anew at each frame, or alike at all frames of an utterance."""


TASK_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "speech": {
        "experts": {"kind": "steering"},
        "assembly": {"router": "ridge"},
        "evaluation": {"baselines": ["dense", "joint"]},
    }
}
"""By task and section, settings whose own defaults no run of the task can have."""


class Config(SafeSection):
    """A whole run."""

    name: Annotated[Line, Field(max_length=200)] = "modularforge"
    """Title of reports and of the model card."""
    task: str = Field("text", pattern=NAME)
    """What is learned: `text`, `instruction` (responses to prompts), `speech` (transcripts of audio), or a task that an
    installed package adds (entry points `modularforge.tasks`)."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Every random choice follows from it."""
    data_seed: int | None = Field(None, ge=0, lt=2**31)
    """Seed of the data preparation, so that runs of several seeds can share the data; null is `seed`."""
    output_dir: Text = "runs/default"
    """Root of the run: a folder or a URL such as `s3://bucket/run`."""
    data_dir: Text | None = None
    """Prepared data; null is `data` under `output_dir`. Runs that share it share the tokenizer and the partitions."""
    data: DataConfig
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    backbone: BackboneConfig = BackboneConfig()
    experts: ExpertsConfig = ExpertsConfig()
    dense: BaselineConfig = BaselineConfig()
    dense_wide: BaselineConfig = BaselineConfig()
    joint: JointConfig = JointConfig()
    joint_evidence: BaselineConfig = BaselineConfig()
    joint_lora: BaselineConfig = BaselineConfig()
    joint_lora_wide: BaselineConfig = BaselineConfig()
    btx: BtxConfig = BtxConfig()
    assembly: AssemblyConfig = AssemblyConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    speech: SpeechConfig = SpeechConfig()
    steering: SteeringConfig = SteeringConfig()
    metrics: MetricsConfig = MetricsConfig()
    launcher: LauncherConfig = LauncherConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, values: Any) -> Any:
        """What is left out is as the task needs it."""
        if not isinstance(values, dict):
            return values
        found = dict(values)
        for section, defaults in TASK_DEFAULTS.get(str(values.get("task")), {}).items():
            if isinstance(given := values.get(section, {}), dict):
                found[section] = {**defaults, **given}
        return found

    @property
    def learns_responses(self) -> bool:
        """Whether the data are examples, of which responses alone are learned."""
        return self.task in LEARN_RESPONSES

    @property
    def reads_documents(self) -> bool:
        """Whether text is read document by document, not in windows."""
        return self.data.packing == "documents"

    @property
    def mixes(self) -> bool:
        """Whether sources are drawn otherwise than each text once an epoch."""
        return bool(self.data.mix) or self.data.temperature != 1

    def example(self, source: SourceConfig) -> ExampleConfig | None:
        """How records of a source become examples; None where they are plain text."""
        return (source.example or ExampleConfig()) if self.learns_responses else None

    @property
    def needed_experts(self) -> int:
        """Experts without which nothing is assembled."""
        return self.experts.count if self.cluster.min_experts is None else self.cluster.min_experts

    def round_ends(self, number: int) -> int:
        """Steps that an expert has done at the end of a round, counted from 1; of all rounds alike but for rounding."""
        return number * self.experts.steps // self.experts.rounds

    @property
    def clustering_tasks(self) -> int | None:
        """How many jobs assign documents to clusters; None where there are no clusters, or one does it all."""
        return self.cluster.prepare_tasks if self.partition.method == "clustered" else None

    @property
    def cleaning_tasks(self) -> int | None:
        """How many jobs clean a share of the documents; None where nothing is cleaned, or one does it all."""
        tasks = self.cluster.prepare_tasks
        return min(tasks, MOST_CLEANING_TASKS) if tasks and self.data.clean else None

    @property
    def whole_corpus_steps(self) -> int:
        """How many steps of cleaning look at the whole corpus."""
        return sum(item.step in WHOLE_CORPUS for item in self.data.clean)

    @property
    def preparation_seed(self) -> int:
        """Seed of corpus and partitions."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def data_url(self) -> str:
        """Where the prepared data lies."""
        return self.data_dir or self.output_dir.rstrip("/") + "/data"

    @property
    def has_public_expert(self) -> bool:
        """Whether the assembled model keeps the public FFN as expert 0."""
        kept = self.assembly.public_expert
        return self.experts.anchored or self.assembly.router == "evidence" if kept is None else kept

    @property
    def joint_experts(self) -> int:
        """Experts per layer of the joint mixtures: as many as are trained alone, and the public one if asked for."""
        kept = self.assembly.public_expert
        return self.experts.count + int(self.experts.anchored if kept is None else kept)

    @property
    def own_row_parts(self) -> list[str]:
        """Of embeddings and head, what each expert of the model has for itself: with `assembly.shared: own`."""
        parts = self.experts.unfreeze if self.assembly.shared == "own" else []
        return [part for part in ("embeddings", "head") if part in parts]

    @property
    def needs_moments(self) -> bool:
        """Whether something of the run is solved from outer products."""
        return self.assembly.router == "ridge" or "btx" in self.evaluation.baselines

    @property
    def gathers_moments(self) -> bool:
        """Whether outer products are among the statistics."""
        if self.experts.statistics is not None:
            return self.experts.statistics == "moments"
        return self.model.pretrained is None or self.experts.kind == "steering" or self.needs_moments

    @property
    def gathered_tokens(self) -> int:
        """Tokens that statistics are gathered from."""
        tokens = self.experts.statistics_tokens
        return tokens if self.gathers_moments else min(tokens, FEW_TOKENS)

    def baseline_phase(self, name: TrainedOnAll) -> PhaseConfig:
        """How a baseline trains that sees all partitions at once: on the very windows of all experts.

        So many experts' batches make one of its own as its `batch_size` holds, and as leave none over.
        """
        experts, own = self.experts, getattr(self, name)
        wanted = own.batch_size or self.joint.batch_size
        steps, batch_size = joined_batches(experts.count, experts.steps, experts.batch_size, wanted)
        rate = own.peak_learning_rate or experts.peak_learning_rate
        return experts.model_copy(update={"steps": steps, "batch_size": batch_size, "peak_learning_rate": rate})

    @property
    def btx_phase(self) -> PhaseConfig:
        """How the merged branches are trained on."""
        experts, own = self.experts, self.btx
        batch_size = own.batch_size or self.joint.batch_size or experts.batch_size
        rate = own.peak_learning_rate or experts.peak_learning_rate
        return experts.model_copy(update={"steps": own.steps, "batch_size": batch_size, "peak_learning_rate": rate})

    @property
    def assembled_experts(self) -> int:
        """Experts per layer of the assembled model, the public one included."""
        return self.experts.count + int(self.has_public_expert)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        problems = list(_impossible_combinations(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def joined_batches(count: int, steps: int, batch_size: int, wanted: int | None) -> tuple[int, int]:
    """Steps and batch size of a job on all batches of `count` experts, as many of them in one as `wanted` sequences."""
    batches, most = count * steps, (wanted or 0) // batch_size
    joined = next((number for number in range(min(most, batches), 1, -1) if batches % number == 0), 1)
    return batches // joined, joined * batch_size


def _impossible_combinations(config: Config) -> Iterator[str]:
    """One sentence per combination of settings that cannot work, with the dotted name first."""
    yield from _impossible_shapes(config.model)
    yield from _impossible_batches(config)
    yield from _impossible_assembly(config)
    if config.evaluation.chat and config.model.pretrained is None:
        yield (
            "evaluation.chat must be null without model.pretrained, since a new model has no chat template; unset it, "
            "or name an instruct model"
        )
    yield from _impossible_speech(config)
    yield from _impossible_shards(config)
    yield from _settings_of_other_kinds(config)
    yield from _impossible_rounds(config)
    if config.experts.kind == "lora":
        yield from _impossible_phases(config)
        yield from _impossible_composites(config)
    if config.needed_experts > config.experts.count:
        yield (
            f"cluster.min_experts must be at most experts.count ({config.experts.count}), but is "
            f"{config.needed_experts}; lower it"
        )
    yield from _impossible_chats(config)
    yield from _impossible_replies(config)
    yield from _impossible_sources(config)
    yield from _impossible_cleaning(config)
    yield from _impossible_mixing(config)


def _impossible_shapes(model: ModelConfig) -> Iterator[str]:
    """The same of the model alone."""
    if model.head_width is None and model.width % model.heads:
        yield (
            f"model.width must be a multiple of model.heads ({model.heads}), but is {model.width}; "
            f"try {model.width // model.heads * model.heads or model.heads}"
        )
    elif model.width_per_head % 2:
        yield (
            f"model.head_width (or model.width / model.heads) must be even for rotary positions, but is "
            f"{model.width_per_head}; change it or model.heads"
        )
    if model.context_length > model.positions:
        yield (
            f"model.context_length must be at most model.max_positions ({model.positions}), but is "
            f"{model.context_length}; lower it"
        )
    scaling = model.rope_scaling
    if scaling and scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if low is None or high is None or high <= low:
            yield (
                "model.rope_scaling of type llama3 must have a low_freq_factor and a larger high_freq_factor, but has "
                f"{low} and {high}; set both"
            )
    if model.heads % model.kv_heads:
        yield (
            f"model.heads must be a multiple of model.kv_heads ({model.kv_heads}), but is {model.heads}; "
            "set both equal for plain multi-head attention"
        )


def _impossible_batches(config: Config) -> Iterator[str]:
    """One sentence per batch that cannot be cut into equal pieces."""
    experts = config.experts
    for name in ("backbone", "experts", "calibration"):
        phase: PhaseConfig = getattr(config, name)
        if phase.batch_size % phase.accumulation_steps:
            yield (
                f"{name}.batch_size must be a multiple of {name}.accumulation_steps ({phase.accumulation_steps}), "
                f"but is {phase.batch_size}; change one of them"
            )
    if config.btx_phase.batch_size % experts.accumulation_steps:
        yield (
            f"btx.batch_size must be a multiple of experts.accumulation_steps ({experts.accumulation_steps}), "
            f"but is {config.btx_phase.batch_size}; change one of them"
        )


def _impossible_assembly(config: Config) -> Iterator[str]:
    """One sentence per router, or number of visits, that these experts cannot have."""
    assembly, experts = config.assembly, config.experts
    if assembly.experts_per_token > config.assembled_experts:
        yield (
            f"assembly.experts_per_token must be at most the number of experts ({config.assembled_experts}), "
            f"but is {assembly.experts_per_token}; lower it or add experts"
        )
    if assembly.router in TRAINED_ROUTERS and not experts.anchored:
        yield (
            f"assembly.router must not be {assembly.router} when experts.anchored is false, because plain experts "
            "train no router rows; use ridge or means"
        )
    if config.needs_moments and experts.statistics == "norms":
        yield (
            "experts.statistics must be moments where assembly.router is ridge or evaluation.baselines has btx, which "
            "is solved from outer products, but is norms; set it to moments, or use another router"
        )


def _impossible_chats(config: Config) -> Iterator[str]:
    """One sentence per source whose examples are chats that nothing writes."""
    for source in config.data.sources:
        example = config.example(source)
        if example and example.is_chat and config.model.pretrained is None:
            yield (
                f"data.sources must have no chat without model.pretrained, since a new model has no chat template, but "
                f"the example of {source.name} is one; name an instruct model, or write prompts and responses"
            )


def _impossible_replies(config: Config) -> Iterator[str]:
    """One sentence per task of the evaluation that has no prompts."""
    sources = config.data.sources
    asked = [task.source for task in config.evaluation.tasks or ()]
    if asked and not config.learns_responses:
        yield f"evaluation.tasks must be null under task {config.task}, which has no prompts; set task to instruction"
    known = {source.name for source in sources}
    if unknown := [name for name in asked if name not in known and not any(source.label_field for source in sources)]:
        yield (
            f"evaluation.tasks must name data.sources ({', '.join(sorted(known))}), but names {unknown[0]!r:.60}; "
            "name one of these"
        )
    for name in sorted({name for name in asked if asked.count(name) > 1}):
        yield f"evaluation.tasks must name each source once, but names {name!r:.60} twice; leave one out"


def _impossible_sources(config: Config) -> Iterator[str]:
    """One sentence per source that the task does not know, or whose name another has."""
    sources = config.data.sources
    names = [source.name for source in sources]
    for source in sources:
        if source.example is not None and not config.learns_responses:
            yield (
                f"data.sources must have no example under task {config.task}, but {source.name} has one; set task to "
                "instruction"
            )
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.sources must have names of their own, but {name!r} occurs {names.count(name)} times; rename one"


def _impossible_mixing(config: Config) -> Iterator[str]:
    """One sentence per entry of the mixture that names no source, or one twice, and where there is no text to mix."""
    sources, named = config.data.sources, [item.source for item in config.data.mix]
    if config.mixes and config.task != "text":
        yield (
            f"data.mix and data.temperature must be left out under task {config.task}, since they mix text; remove them"
        )
    known = [source.name for source in sources]
    unknown = [name for name in named if name not in known]
    if unknown and not any(source.label_field for source in sources):
        yield (
            f"data.mix must name data.sources ({', '.join(sorted(known))}), but names {unknown[0]!r:.60}; "
            "name one of these"
        )
    lost = [name for name in config.partition.everywhere if name not in known]
    if lost and not any(source.label_field for source in sources):
        yield (
            f"partition.everywhere must name data.sources ({', '.join(sorted(known))}), but names {lost[0]!r:.60}; "
            "name one of these"
        )
    if known and not {*known} - {*config.partition.everywhere} and not any(source.label_field for source in sources):
        yield "partition.everywhere must leave out a source, whose text is an expert's own, but names all; take one out"
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield f"data.mix must name each source once, but names {name!r:.60} {named.count(name)} times; leave one"
    if known and {item.source for item in config.data.mix if item.weight == 0} >= {*known}:
        yield "data.mix must leave some source a weight above 0, but gives all of them 0; raise one"


def _impossible_cleaning(config: Config) -> Iterator[str]:
    """One sentence per step that finds nothing to clean, or comes too late, and for documents where there are none."""
    names = [item.step for item in config.data.clean]
    if config.reads_documents and config.task != "text":
        yield (
            f"data.packing must be left out under task {config.task}, since it packs documents of text, but is "
            "documents; remove it"
        )
    if names and config.task != "text":
        yield f"data.clean must be left out under task {config.task}, since it cleans documents of text; remove it"
    if config.cleaning_tasks and config.whole_corpus_steps > MOST_WHOLE_CORPUS:
        yield (
            f"data.clean must have at most {MOST_WHOLE_CORPUS} steps that look at the whole corpus (exact, near) with "
            f"cluster.prepare_tasks, but has {config.whole_corpus_steps}; leave some out, or unset prepare_tasks"
        )
    known = {source.name for source in config.data.sources}
    for item in config.data.clean:
        if item.sources is not None and item.step in ("exact", "near"):
            yield f"data.clean must have no sources for {item.step}, which looks at the whole corpus; remove them"
        elif unknown := [name for name in item.sources or () if name not in known]:
            yield (
                f"data.clean must name data.sources ({', '.join(sorted(known))}), but {item.step} names "
                f"{unknown[0]!r:.60}; name one of these"
            )
    if "near" in names and (late := [name for name in names[names.index("near") :] if name in CHANGES_TEXT]):
        yield (
            f"data.clean must name near after all steps that change text, but {late[0]} comes after it; "
            "put near behind it"
        )


def _impossible_shards(config: Config) -> Iterator[str]:
    """The same of weights that lie in pieces on several processes."""
    training = config.training
    if training.parallel != "hsdp" and training.shard_ranks is not None:
        yield (
            f"training.shard_ranks must be null with training.parallel {training.parallel}, which leaves no choice; "
            "unset it, or choose hsdp"
        )
    if training.parallel == "ddp":
        return
    if config.task == "speech":
        yield (
            f"task must not be speech with training.parallel {training.parallel}, because validation and sums of "
            "speech need the whole model in each process; use ddp, with a language model that fits on one GPU"
        )


def _impossible_speech(config: Config) -> Iterator[str]:
    """The same of speech, whose experts are steering vectors, and of steering, which is for speech alone."""
    kind, speech = config.experts.kind, config.speech
    if (config.task == "speech") != (kind == "steering"):
        yield (
            f"experts.kind must be steering with task speech, and with no other, but is {kind} with task "
            f"{config.task}; change one of them"
        )
    if config.task != "speech":
        return
    if config.cluster.prepare_tasks is not None:
        yield "cluster.prepare_tasks must be null with task speech, whose data one job prepares; unset it"
    if config.assembly.router not in ("ridge", "means", "uniform"):
        yield (
            "assembly.router must be ridge, means or uniform with task speech, whose experts are chosen "
            f"by what the encoder hears, but is {config.assembly.router}; change it"
        )
    if others := sorted({*config.evaluation.baselines} - {"dense", "joint"}):
        yield (
            f"evaluation.baselines must be dense and joint at the most with task speech, but has {', '.join(others)}; "
            "leave the others out"
        )
    for name, _ in _changed(config.evaluation, "tasks", "harness", "general", "chat"):
        yield f"evaluation.{name} must be left out with task speech, since it measures texts alone; remove it"
    if config.steering.variant == "aligner" and (speech.model.prompt or speech.data.prompt_field):
        yield (
            "speech.model.prompt and speech.data.prompt_field must be left out with steering.variant aligner, which "
            "reads no prompt; remove them, or set it to hybrid"
        )
    if config.steering.vectors is None and config.steering.variant != "lora":
        yield (
            f"steering.vectors must be a number with steering.variant {config.steering.variant}, but is null; set it, "
            "or set steering.variant to lora"
        )
    if config.steering.variant == "lora":
        for name, _ in _changed(config.steering, "scale_bound", "active", "balance_loss", "orthogonality_loss"):
            yield (
                f"steering.{name} must be left out with steering.variant lora, which has no vectors; remove it, or set "
                "steering.variant to another"
            )
    if config.steering.variant == "prompt" and not speech.data.prompt_field:
        yield (
            "speech.data.prompt_field must name the column of prompts with steering.variant prompt, which reads one "
            "for each utterance, but is null; set it, or set steering.variant to layerwise"
        )
    if speech.model.pool_layer is not None and speech.model.pool_kind == "stack" and speech.model.pool_kernel > 1:
        yield (
            "speech.model.pool_kind must be mean or max where speech.model.pool_layer is set, since the encoder's "
            "layers have one width, but is stack; change it"
        )
    if speech.model.encoder is None and speech.data.features != "whisper":
        yield "speech.data.features must be whisper without speech.model.encoder, but is fbank; name one"


def _settings_of_other_kinds(config: Config) -> Iterator[str]:
    """One sentence per setting that only experts of another kind, or another task, have."""
    kind, experts = config.experts.kind, config.experts
    if kind in ("lora", "steering"):
        for name, value in _changed(experts, "anchored", "init", "z_loss"):
            yield (
                f"experts.{name} must be left out with experts.kind {kind}, since only ffn experts have it, but is "
                f"{value}; remove it, or set experts.kind to ffn"
            )
    if kind == "steering" and experts.statistics == "norms":
        yield "experts.statistics must be moments with experts.kind steering, but is norms; remove it"
    if kind != "lora":
        yield from _settings_of_lora(config)
    if kind != "steering":
        for name, _ in _changed(config.steering):
            yield (
                f"steering.{name} must be left out unless experts.kind is steering, but experts.kind is {kind}; remove "
                "it, or set experts.kind to steering, and task to speech"
            )
    if config.task != "speech":
        for part in SpeechConfig.model_fields:
            for name, _ in _changed(getattr(config.speech, part)):
                yield (
                    f"speech.{part}.{name} must be left out unless task is speech, but task is {config.task}; remove "
                    "it, or set task to speech"
                )


def _settings_of_lora(config: Config) -> Iterator[str]:
    """One sentence per setting that only LoRA experts have, where experts are of another kind."""
    kind = config.experts.kind
    for name in ("joint_lora", "joint_lora_wide"):
        if name in config.evaluation.baselines:
            yield (
                f"evaluation.baselines must not name {name} unless experts.kind is lora, but experts.kind is {kind}; "
                "leave it out, or set experts.kind to lora"
            )
    for name, value in _changed(config.assembly, "lora", "lora_choice"):
        yield (
            f"assembly.{name} must be left out unless experts.kind is lora, but is {value} with experts.kind {kind}; "
            "remove it, or set experts.kind to lora"
        )
    for name, _ in _changed(config.experts.lora):
        yield (
            f"experts.lora.{name} must be left out unless experts.kind is lora, but experts.kind is {kind}; remove it, "
            "or set experts.kind to lora"
        )


def _impossible_rounds(config: Config) -> Iterator[str]:
    """One sentence per setting of rounds, or of what is shared, that changes nothing or cannot be."""
    experts = config.experts
    if experts.unfreeze and experts.kind == "steering":
        yield (
            "experts.unfreeze must be left out with experts.kind steering, since its vectors leave the models' weights "
            "as they are; remove it"
        )
    yield from _impossible_tuning(config)
    yield from _impossible_own_rows(config)
    if "head" in experts.unfreeze and "embeddings" not in experts.unfreeze and config.model.tied_head:
        yield (
            "experts.unfreeze must have embeddings beside head where model.tied_head is true, since both are one "
            "matrix; add it, or leave head out"
        )
    if not experts.unfreeze:
        for name, value in _changed(experts, "unfreeze_rate", "rounds"):
            yield (
                f"experts.{name} must be left out without experts.unfreeze, since nothing is shared then that a job "
                f"trains, but is {value}; set experts.unfreeze, such as [attention, norms]"
            )
        for name, value in _changed(config.assembly, "shared"):
            yield (
                f"assembly.{name} must be left out without experts.unfreeze, since experts share the backbone's "
                f"weights then, but is {value}; remove it, or set experts.unfreeze, such as [attention, norms]"
            )
    for name, value in _changed(experts.outer) if experts.rounds == 1 else ():
        yield (
            f"experts.outer.{name} must be left out where experts.rounds is 1, since nothing is merged in between, but "
            f"is {value}; remove it, or set experts.rounds"
        )
    if config.training.patience is not None and experts.rounds > 1:
        yield (
            f"training.patience must be left out where experts.rounds is more than 1, since a round goes on from where "
            f"the one before ended, but is {config.training.patience}; remove it, or set experts.rounds to 1"
        )
    if experts.settle and experts.rounds == 1:
        yield (
            "experts.settle must be false where experts.rounds is 1, since no merge comes before the last round then; "
            "set it to false, or set experts.rounds"
        )
    if experts.rounds > max(1, experts.steps):
        yield f"experts.rounds must be at most experts.steps ({experts.steps}), but is {experts.rounds}; lower it"


def _impossible_tuning(config: Config) -> Iterator[str]:
    """One sentence per part of the assembled model that cannot be tuned, because it has none."""
    experts = config.experts
    if config.calibration.shared and experts.kind == "steering":
        yield (
            "calibration.shared must be false with experts.kind steering, since its vectors leave the models' weights "
            "as they are; set it to false"
        )
    if config.calibration.adapters and (experts.kind != "lora" or config.assembly.lora != "adapters"):
        yield (
            "calibration.adapters must be false where the assembled model has no adapters beside it, as with experts."
            f"kind {experts.kind} and assembly.lora {config.assembly.lora}; set it to false, or these to lora and "
            "adapters"
        )


def _impossible_own_rows(config: Config) -> Iterator[str]:
    """One sentence per setting with which experts cannot have embeddings and a head of their own."""
    assembly, experts = config.assembly, config.experts
    if assembly.shared != "own":
        return
    if "embeddings" not in experts.unfreeze:
        yield (
            "experts.unfreeze must have embeddings where assembly.shared is own, since experts have no rows of their "
            "own else; add embeddings and head, or set assembly.shared to equal"
        )
    if assembly.router != "evidence" or not assembly.token_pairs or assembly.lora == "average":
        yield (
            "assembly.shared must be own only where tokens choose experts by the ids alone: assembly.router evidence, "
            "assembly.token_pairs above 0, and assembly.lora not average; change these, or set it to equal"
        )
    if experts.rounds > 1:
        yield (
            "experts.rounds must be 1 where assembly.shared is own, since a merge would take the experts' rows from "
            f"them, but is {experts.rounds}; set it to 1, or assembly.shared to counts"
        )
    if config.calibration.shared:
        yield (
            "calibration.shared must be false where assembly.shared is own, since only the public expert has the "
            "backbone's rows then; set it to false"
        )


def _changed(section: Section, *names: str) -> Iterator[tuple[str, Any]]:
    """Settings of a section, all or these, that are not as they are by default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if (not names or name in names) and value != field.default:
            yield name, value


def _impossible_phases(config: Config) -> Iterator[str]:
    """One sentence per phase in which nothing, or what there is not, would learn."""
    lora, layers, steps = config.experts.lora, config.model.layers, config.experts.steps
    if lora.phases is None:
        return
    if config.model.pretrained is not None and "layers" not in config.model.model_fields_set:
        layers = LARGEST_NUMBER  # not looked up yet
    if layers < 2 and "early" in str(lora.phases):
        yield "experts.lora.phases must not name early layers where model.layers is 1, since there are none; leave them"
    groups = {"mlp" if name in MLP_MODULES else "attention" for name in lora.modules}
    if isinstance(lora.phases, str):
        if lora.phases != "early->late" and len(groups) < 2:
            yield (
                f"experts.lora.phases must not be {lora.phases} where experts.lora.targets are all of "
                f"{next(iter(groups))}, since a phase would train nothing; set targets to both"
            )
        return
    ends = [phase.until for phase in lora.phases]
    known = [end for end in ends if end is not None]
    if not ends or None in ends[:-1] or known != sorted(set(known)):
        yield (
            f"experts.lora.phases must end later and later, the last one at null, but end at {ends}; put them in order"
        )
    elif ends[-1] is not None and ends[-1] < steps:
        yield (
            f"experts.lora.phases must reach experts.steps ({steps}), but end at {ends[-1]}; leave until out of the "
            "last one"
        )
    for number, phase in enumerate(lora.phases):
        if not groups & set(phase.train):
            yield (
                f"experts.lora.phases.{number}.train must name adapters that experts.lora.targets have "
                f"({', '.join(sorted(groups))}), but names {', '.join(phase.train)}; change one of them"
            )
        if not isinstance(phase.layers, str) and (not phase.layers or max(phase.layers) >= layers):
            yield (
                f"experts.lora.phases.{number}.layers must be numbers below model.layers ({layers}), but is "
                f"{phase.layers}; change it"
            )


def _impossible_composites(config: Config) -> Iterator[str]:
    """One sentence per form of the assembled model that these adapters cannot take."""
    assembly, lora = config.assembly, config.experts.lora
    attention = [name for name in lora.modules if name not in MLP_MODULES]
    if assembly.lora == "fold" and attention:
        yield (
            f"assembly.lora must not be fold where experts.lora.targets have {', '.join(attention)}, since experts of "
            "a mixture are feed-forward blocks; use adapters, or set targets to mlp"
        )
    if assembly.lora == "adapters" and assembly.router not in ("evidence", "uniform"):
        yield (
            "assembly.router must be evidence or uniform with assembly.lora adapters, since adapters of attention come "
            f"before what other routers read, but is {assembly.router}; change it, or fold adapters of mlp"
        )
