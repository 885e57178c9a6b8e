"""Phases and norms in the Trainer on several processes: `torchrun … -m tests.pretrained.trainer_job FOLDER BATCH`."""

from __future__ import annotations

import sys
from pathlib import Path

from modularforge.huggingface import DynamicLoRACallback, GradientMeasuringTrainer
from tests.pretrained.test_huggingface import Same, adapted, arguments


def main(folder: Path, batch: int) -> None:
    options = arguments(folder, per_device_train_batch_size=batch)
    callbacks = [DynamicLoRACallback("attn->mlp->both")]
    trainer = GradientMeasuringTrainer(adapted(), options, train_dataset=Same(), callbacks=callbacks, norms_every=1)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
