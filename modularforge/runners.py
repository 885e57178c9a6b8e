"""The function that makes each stage which trains or prepares something: `run(config)`, or `run(config, index)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modularforge.stages import backbone, branch, btx, dense, expert, joint, prepare

RUNNERS: dict[str, Callable[..., Any]] = {
    "corpus": prepare.run,
    "partitions": prepare.run,
    "backbone": backbone.run,
    "dense": dense.run,
    "dense_wide": dense.run_wide,
    "joint": joint.run,
    "joint_evidence": joint.run_evidence,
    "expert": expert.run,
    "branch": branch.run,
    "btx": btx.run,
}
