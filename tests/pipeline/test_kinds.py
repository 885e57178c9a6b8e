"""Another kind of expert goes through the stages by its one row: nothing in between knows a kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import paths
from modularforge.config import Config
from modularforge.errors import Interrupted, MismatchError
from modularforge.experts import kind
from modularforge.model import names
from modularforge.model.folder import load_model, read_tensors
from modularforge.run import Run
from modularforge.stage_outputs import Backbone
from modularforge.stages import assemble, calibrate, expert
from modularforge.training.checkpointing import Checkpointing
from tests import gains_kind


@pytest.fixture
def config(finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The finished run's data and backbone, with experts of the other kind."""
    row = "tests.gains_kind:GAINS"
    monkeypatch.setattr(kind, "OWN", {**kind.OWN, "gains": row})
    (tmp_path / "backbone").symlink_to(paths.local_path(finished_run.output_dir) / "backbone")
    experts = finished_run.experts.model_copy(update={"steps": 8, "kind": "gains"})
    training = finished_run.training.model_copy(update={"checkpoint_every": 2})
    changes = {"experts": experts, "training": training}
    return finished_run.model_copy(update={**changes, "output_dir": str(tmp_path), "data_dir": finished_run.data_url})


def test_experts_of_another_kind_train_run_alone_merge_and_calibrate(config: Config) -> None:
    for index in range(config.experts.count):
        expert.run(Run(config), index)
    assemble.run(Run(config))
    calibrate.run(Run(config))
    backbone, own = Backbone(Run(config).require("backbone")), Run(config).require("expert", 1)
    assert {part.manifest.facts["expert_kind"] for part in (own, Run(config).require("assemble"))} == {"gains"}
    assert not any(names.is_norm(name) for name in own.manifest.facts["shared_tensors"])
    folder = Run(config).require("assemble").local_folder()
    assert "the mean gains of 3 experts. Every expert was trained alone" in (folder / "README.md").read_text()
    found, gains = read_tensors(folder), load_file(own.local_file(gains_kind.WEIGHTS))
    each = [load_file(Run(config).require("expert", k).local_file(gains_kind.WEIGHTS)) for k in range(3)]
    for name, tensor in backbone.tensors.items():
        expected = torch.stack([item[name] for item in each]).mean(dim=0) if names.is_norm(name) else tensor
        assert torch.allclose(found[name], expected), name
        assert not names.is_norm(name) or not torch.equal(gains[name], tensor), name
    tokens_BT = torch.arange(10).view(2, 5)
    assert torch.equal(backbone.expert(own).model.norm.weight, gains[names.FINAL_NORM])
    assert not torch.equal(backbone.expert(own)(tokens_BT), load_model(folder)(tokens_BT))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_an_expert_of_another_kind_resumes_in_every_phase(
    step: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert.run(Run(config), 0)
    whole = Run(config).require("expert", 0)
    again = config.model_copy(update={"output_dir": f"{config.output_dir}/again"})
    Path(again.output_dir).mkdir()
    (Path(again.output_dir) / "backbone").symlink_to(Path(config.output_dir) / "backbone")
    with monkeypatch.context() as stopped:
        stopped.setattr(Checkpointing, "agree_to_stop", lambda self, _wants: self.seen() == step)
        stopped.setattr(Checkpointing, "seen", counter(), raising=False)
        with pytest.raises(Interrupted):
            expert.run(Run(again), 0)
    again_from: list[int] = []
    monkeypatch.setattr(gains_kind, "watch", again_from.append)
    expert.run(Run(again), 0)
    assert again_from[0] == step, "it goes on, and does not start over"
    assert Run(again).require("expert", 0).manifest.files == whole.manifest.files


def counter() -> Callable[[Checkpointing], int]:
    count = iter(range(1, 1000))
    return lambda _self: next(count)


def test_experts_of_two_kinds_are_refused(config: Config, finished_run: Config) -> None:
    from modularforge.assembly.assemble import assemble as put_together

    expert.run(Run(config), 0)
    experts = [Run(config).require("expert", 0), Run(finished_run).require("expert", 1)]
    with pytest.raises(MismatchError, match=r"experts of one model must be of one kind, but .* is ffn, .* is gains"):
        put_together(config, Run(config).require("backbone"), experts, None)  # type: ignore[arg-type]
