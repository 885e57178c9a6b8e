"""Measure the models of a run side by side on the test split, and write the table that says whether it was worth it.

The evaluation is the one artifact that is replaced: it is cheap, and models may join a run after it was made.
"""

from __future__ import annotations

import json
import time
from functools import partial

from checkpoints import Artifact, MissingArtifactError, find_artifact, paths
from checkpoints.screen import shown_command
from modularforge.artifacts import Backbone, Corpus
from modularforge.config import TRAINED_ON_ALL, Config
from modularforge.errors import MismatchError
from modularforge.evaluation.btx import build_btx, solved_router
from modularforge.evaluation.report import markdown
from modularforge.evaluation.results import checked_results, parse_results
from modularforge.evaluation.soup import build_soup
from modularforge.evaluation.suite import Extras, Loader, Results, add_oracle, compare, measure_models, read_extras
from modularforge.log import json_safe, logger
from modularforge.pipeline import contents, finished, plan_stage, require, stage_url
from modularforge.provenance import commit, making
from modularforge.stored_models import StoredModel, stored_model

RESULTS_NAME = "results.json"
REPORT_NAME = "report.md"
DOCUMENTS_NAME = "documents.json"
# Raised when results say more or other things than before, so that `evaluate` measures again.
RESULTS_FORMAT = "2"


def run(config: Config) -> Results:
    """Measure what is there, commit results.json and report.md, and return the results."""
    start = time.perf_counter()
    corpus, artifacts = Corpus(require(config, "corpus")), find_models(config)
    inputs = {name: artifact.manifest.fingerprint for name, artifact in artifacts.items()}
    extras = read_extras(config)
    inputs |= {"corpus": contents(corpus.artifact), "format": RESULTS_FORMAT, **extras.identities}
    plan = plan_stage(config, "evaluation", inputs=inputs)
    old = find_artifact(plan.url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        logger.info("evaluation is finished: %s", plan.url)
        return parse_results(old.read_bytes(RESULTS_NAME), paths.join(old.url, RESULTS_NAME))
    results: Results = _measure(config, corpus, artifacts, extras)
    documents = compare(results)
    results["seconds"] = round(time.perf_counter() - start, 3)
    results = json_safe(results)
    if old:
        logger.info("the evaluation at %s was of other models or settings; it is replaced", plan.url)
    with making(plan) as writer:
        writer.write_json(RESULTS_NAME, results)
        (writer.folder / DOCUMENTS_NAME).write_text(json.dumps(json_safe(documents)) + "\n", encoding="utf-8")
        (writer.folder / REPORT_NAME).write_text(markdown(results), encoding="utf-8")
        commit(writer, plan, config, {"chosen": results["chosen"]}, old)
    return checked_results(results)  # as a second call reads them


def find_models(config: Config) -> dict[str, Artifact]:
    """The committed models of this run: backbone, baselines, experts, assembled and calibrated.

    The calibrated one counts only if it belongs to the assembled one and its calibration was kept.
    """
    found = {"backbone": require(config, "backbone")}
    wanted: list[tuple[str, str, int | None]] = []
    wanted += [(name, name, None) for name in TRAINED_ON_ALL if name in config.evaluation.baselines]
    wanted += [(f"expert-{index}", "expert", index) for index in range(config.experts.count)]
    if "btx" in config.evaluation.baselines:
        wanted += [(f"branch-{index}", "branch", index) for index in range(config.experts.count)]
    wanted += [("assembled", "assembled", None), ("calibrated", "calibrated", None)]
    for label, stage, index in wanted:
        try:
            artifact = finished(plan_stage(config, stage, index))
        except MissingArtifactError:
            continue
        if artifact and artifact.manifest.facts.get("kept", True):
            found[label] = artifact
    return found


def chosen_model(config: Config) -> Artifact:
    """The model to use: the calibrated one, else the assembled one; raises MissingArtifactError."""
    models = find_models(config)
    return models.get("calibrated") or models.get("assembled") or require(config, "assembled")


def where(config: Config) -> str:
    """Lines that tell where the report and the model folder lie, and what to try next."""
    models = find_models(config)
    lines = [f"report:  {paths.join(stage_url(config, 'evaluation'), REPORT_NAME)}"]
    best = models.get("calibrated") or models.get("assembled")
    if best:
        command = shown_command("modularforge", "generate", "--model", best.url, "--prompt", "The")
        lines += [f"model:   {best.url}", f"try it:  {command}"]
    return "\n".join(lines)


def measure_folder(config: Config, url: str) -> Results:
    """Measure one model folder on this config's test split, without writing anything."""
    start = time.perf_counter()
    corpus, stored = Corpus(require(config, "corpus")), stored_model(url)
    tokenizer = stored.file("tokenizer.json")
    if tokenizer.is_file() and tokenizer.read_bytes() != corpus.file("tokenizer.json").read_bytes():
        raise MismatchError(
            f"{url} must use the tokenizer of {corpus.artifact.url}, but has another; name its --data-dir"
        )
    name = url.rstrip("/").rsplit("/", 1)[-1]
    results = measure_models(config, corpus, {name: stored.load}, {}, {name}, read_extras(config))
    results["models"][name].pop("documents")
    measured: Results = json_safe({**results, "chosen": name, "seconds": round(time.perf_counter() - start, 3)})
    return measured


def _measure(config: Config, corpus: Corpus, artifacts: dict[str, Artifact], extras: Extras) -> Results:
    chosen = next((name for name in ("calibrated", "assembled") if name in artifacts), None)
    shown = {name for name in ("backbone", "assembled", "calibrated") if name in artifacts}
    tokens = {name: _training_tokens(config, name) for name in [*artifacts, "soup", "btx"]}
    results = measure_models(config, corpus, _loaders(config, artifacts), tokens, shown, extras)
    for routing in results["routing"].values():
        public = ["public"] if config.has_public_expert else []
        members = artifacts["assembled"].manifest.inputs
        routing["experts"] = public + [f"expert-{k}" for k in range(config.experts.count) if f"expert-{k}" in members]
    add_oracle(results)
    calibrated = find_artifact(stage_url(config, "calibrated"))
    facts = calibrated.manifest.facts if calibrated else {}
    calibration = {key: facts[key] for key in ("kept", "loss_before", "loss_after") if key in facts}
    return {**results, "chosen": chosen, "calibration": calibration or None}


def _loaders(config: Config, artifacts: dict[str, Artifact]) -> dict[str, Loader]:
    """How each model is loaded, in the order of the table."""
    backbone = Backbone(artifacts["backbone"])
    experts = {name: artifact for name, artifact in artifacts.items() if name.startswith("expert-")}

    def folder(name: str) -> dict[str, Loader]:
        return {name: StoredModel(artifacts[name].url, artifacts[name]).load} if name in artifacts else {}

    loaders = folder("backbone")
    for name in TRAINED_ON_ALL:
        loaders |= folder(name)
    loaders |= {name: partial(backbone.expert, artifact) for name, artifact in experts.items()}
    if "soup" in config.evaluation.baselines and len(experts) == config.experts.count:
        loaders["soup"] = partial(build_soup, backbone, list(experts.values()))
    branches = [artifact for name, artifact in artifacts.items() if name.startswith("branch-")]
    if len(branches) == config.experts.count:
        loaders["btx"] = partial(build_btx, solved_router(config), backbone, branches)
    return loaders | folder("assembled") | folder("calibrated")


def _training_tokens(config: Config, name: str) -> int:
    """Tokens that went into a model, those of its backbone included."""
    experts = {"backbone": 0}.get(name, 1 if name.startswith("expert-") else config.experts.count)
    steps = config.backbone.steps * config.backbone.batch_size
    steps += experts * config.experts.steps * config.experts.batch_size
    if name == "calibrated":
        steps += config.calibration.steps * config.calibration.batch_size
    return steps * config.model.context_length
