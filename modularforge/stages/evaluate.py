"""Measure the models of a run side by side on the test split, and write the table that says whether it was worth it.

The evaluation is the one artifact that is replaced: it is cheap, and models may join a run after it was made.
"""

from __future__ import annotations

import json
import time
from functools import partial

from checkpoints import Artifact, paths
from checkpoints.screen import shown_command
from modularforge.config import Config
from modularforge.errors import MismatchError
from modularforge.evaluation.baselines import build_btx, build_soup, solved_router
from modularforge.evaluation.bench import Loader, Results, add_oracle, compare, measure_models
from modularforge.evaluation.extras import Extras, read_extras
from modularforge.evaluation.generation import load_for_generation
from modularforge.evaluation.harness import Harness, harness_identity
from modularforge.evaluation.replies import tasks_identity
from modularforge.evaluation.results import checked_results, parse_results
from modularforge.log import json_safe, logger
from modularforge.model.hub_config import end_tokens
from modularforge.observe.evaluation import markdown
from modularforge.pipeline import STAGES, JobName, contents, wanted_stages
from modularforge.provenance import commit, making
from modularforge.run import Run, is_kept
from modularforge.stage_outputs import Backbone
from modularforge.stored_models import StoredModel, stored_model
from modularforge.training.precision import measuring

RESULTS_NAME = "results.json"
REPORT_NAME = "report.md"
DOCUMENTS_NAME = "documents.json"
# Raised when results say more or other things than before, so that `evaluate` measures again.
RESULTS_FORMAT = "2"
WINDOW_FORMAT = "3"  # where the model reads further than the run: FLOPs per token are those of the run's window


def run(run: Run) -> Results:
    """Measure what is there, commit results.json and report.md, and return the results."""
    start, config = time.perf_counter(), run.config
    artifacts, extras = find_models(run), read_extras(config)
    inputs = {name: artifact.manifest.fingerprint for name, artifact in artifacts.items()}
    results_format = RESULTS_FORMAT if config.model.positions == config.model.context_length else WINDOW_FORMAT
    inputs |= {"corpus": contents(run.require("prepare-data")), "format": results_format, **extras.identities}
    inputs |= {**tasks_identity(config), **harness_identity(config)}
    plan = run.plan("evaluate", inputs=inputs)
    old = run.find(plan.url)
    if old and old.manifest.fingerprint == plan.fingerprint:
        logger.info("evaluation is finished: %s", plan.url)
        return parse_results(old.read_bytes(RESULTS_NAME), paths.join(old.url, RESULTS_NAME))
    results: Results = _measure(run, artifacts, extras)
    documents = compare(results)
    results["seconds"] = round(time.perf_counter() - start, 3)
    results = json_safe(results)
    if old:
        logger.info("the evaluation at %s was of other models or settings; it is replaced", plan.url)
    with making(plan) as writer:
        writer.write_json(RESULTS_NAME, results)
        (writer.folder / DOCUMENTS_NAME).write_text(json.dumps(json_safe(documents)) + "\n", encoding="utf-8")
        (writer.folder / REPORT_NAME).write_text(markdown(results), encoding="utf-8")
        commit(writer, plan, run, {"chosen": results["chosen"]}, old)
    return checked_results(results)  # as a second call reads them


def find_models(run: Run) -> dict[str, Artifact]:
    """The committed models of this run by job: backbone, experts, baselines, assembled and calibrated.

    The calibrated one counts only if it belongs to the assembled one and its calibration was kept.
    """
    found = {"backbone": run.require("backbone")}
    for stage in wanted_stages(run.config):
        if stage.is_measured:
            jobs = {JobName(stage.kind, index): run.artifact(stage.name, index) for index in stage.indices(run.config)}
            found |= {str(job): artifact for job, artifact in jobs.items() if artifact and is_kept(artifact)}
    return found


def chosen_model(run: Run) -> Artifact:
    """The model to use: the calibrated one, else the assembled one; raises MissingArtifactError."""
    calibrated = run.artifact("calibrate")
    return calibrated if calibrated and is_kept(calibrated) else run.require("assemble")


def where(run: Run) -> str:
    """Lines that tell where the report and the model folder lie, and what to try next."""
    lines = [f"report:  {paths.join(run.url('evaluate'), REPORT_NAME)}"]
    if run.artifact("assemble"):
        best = chosen_model(run)
        command = shown_command("modularforge", "generate", "--model", best.url, "--prompt", "The")
        if run.config.task == "speech":
            command = shown_command("modularforge", "transcribe", "--model", best.url, "AUDIO.wav")
        lines += [f"model:   {best.url}", f"try it:  {command}"]
    return "\n".join(lines)


def measure_folder(run: Run, url: str) -> Results:
    """Measure one model folder on this config's test split, without writing anything."""
    start = time.perf_counter()
    corpus, stored, config = run.corpus, stored_model(url), run.config
    tokenizer = stored.file("tokenizer.json")
    if tokenizer.is_file() and tokenizer.read_bytes() != corpus.file("tokenizer.json").read_bytes():
        raise MismatchError(
            f"{url} must use the tokenizer of {corpus.artifact.url}, but has another; name its --data-dir"
        )
    name = url.rstrip("/").rsplit("/", 1)[-1]
    ends = end_tokens(stored.values)
    results = measure_models(config, corpus, {name: stored.load}, {name}, read_extras(config), ends)
    results["models"][name]["training_tokens"] = None  # nobody knows what a folder was trained on
    results["models"][name].pop("documents")
    measured: Results = json_safe({**results, "chosen": name, "seconds": round(time.perf_counter() - start, 3)})
    return measured


def harness_of_folder(config: Config, url: str) -> Results:
    """What the tasks of lm-eval say of one model folder, with its own tokenizer: no run and no text is needed."""
    loaded = load_for_generation(url)
    name = url.rstrip("/").rsplit("/", 1)[-1]
    harness = Harness(config, loaded.tokenizer, next(iter(loaded.end_tokens), 0))
    with measuring(config.training, loaded.model.lm_head.weight.device):
        harness.measure(name, loaded.model)
    return {"harness": harness.results()}


def _measure(run: Run, artifacts: dict[str, Artifact], extras: Extras) -> Results:
    config = run.config
    chosen = next((name for name in ("calibrated", "assembled") if name in artifacts), None)
    shown = {name for name in ("backbone", "assembled", "calibrated") if name in artifacts}
    ends = end_tokens(Backbone(artifacts["backbone"]).values)
    results = measure_models(config, run.corpus, _loaders(run, artifacts), shown, extras, ends)
    for routing in results["routing"].values():
        public = ["public"] if config.has_public_expert else []
        names = [str(JobName("expert", index)) for index in range(config.experts.count)]
        routing["experts"] = public + [name for name in names if name in artifacts["assembled"].manifest.inputs]
    add_oracle(config, results)
    calibrated = run.find(run.url("calibrate"))
    facts = calibrated.manifest.facts if calibrated else {}
    calibration = {key: facts[key] for key in ("kept", "loss_before", "loss_after") if key in facts}
    return {**results, "chosen": chosen, "calibration": calibration or None}


def _loaders(run: Run, artifacts: dict[str, Artifact]) -> dict[str, Loader]:
    """How each model is loaded, in the order of the table."""
    config, backbone = run.config, Backbone(artifacts["backbone"])
    of_stage = {
        name: [job for job in artifacts if JobName.parse(job).stage == stage.kind] for name, stage in STAGES.items()
    }

    def folders(jobs: list[str]) -> dict[str, Loader]:
        return {job: StoredModel(artifacts[job].url, artifacts[job]).load for job in jobs}

    experts, branches = ([artifacts[job] for job in of_stage[name]] for name in ("expert", "branch"))
    own = ("backbone", "assemble", "calibrate")  # which have their place in the table
    whole = [name for name, stage in STAGES.items() if stage.is_measured and not stage.is_indexed and name not in own]
    loaders = folders(["backbone", *(job for name in whole for job in of_stage[name])])
    loaders |= {job: partial(backbone.expert, artifacts[job]) for job in of_stage["expert"]}
    if "soup" in config.evaluation.baselines and len(experts) == config.experts.count:
        loaders["soup"] = partial(build_soup, config, backbone, experts)
    if len(branches) == config.experts.count:
        loaders["btx"] = partial(build_btx, solved_router(config), backbone, branches)
    return loaders | folders([*of_stage["assemble"], *of_stage["calibrate"]])
