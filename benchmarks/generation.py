"""Speed of generation beside transformers on the same weights, by batch: ratios, and whether tokens are equal.

    python benchmarks/generation.py [--width 512] [--layers 8] [--tokens 64] [--batches 1 8] [--rounds 5]

Targets: at least transformers' speed, greedy tokens equal. Weights are random, with a head large enough that no two
tokens are nearly tied; prompts of a batch differ in length, so that rows are padded. Each generates in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.gpu.peers import llama
from benchmarks.gpu.timing import Shape
from benchmarks.training import compare
from modularforge.evaluation.generation import Sampling, continue_batch, continue_tokens
from modularforge.model.backbone import Decoder, build_backbone
from modularforge.training.distributed import default_device

VOCABULARY, PROMPT = 8192, 32
GREEDY = Sampling(temperature=0)
Reply = Callable[[], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 512), ("layers", 8), ("tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    shape = Shape(options.width, options.layers, 8, 2 * PROMPT + options.tokens, 1, VOCABULARY, 1, 1, 1, False)
    decoder, theirs = models(shape)
    for batch in options.batches:
        prompts = [list(range(7, 7 + PROMPT - index)) for index in range(batch)]
        cases = [partial(ours, decoder, prompts, options.tokens), partial(other, theirs, prompts, options.tokens)]
        own, others = compare([partial(seconds, case) for case in cases], options.rounds)
        are_equal = cases[0]() == cases[1]()
        print(
            f"batch {batch}: {batch * options.tokens / own:.0f} tokens/s, {others / own:.3f} of transformers' speed "
            f"(target >= 1.0), greedy tokens {'equal' if are_equal else 'DIFFER'}"
        )


def seconds(reply: Reply) -> float:
    """Of one generation."""
    start = time.perf_counter()
    reply()
    return time.perf_counter() - start


def models(shape: Shape) -> tuple[Decoder, Any]:
    """The project's decoder and transformers' Llama with the same weights."""
    torch.manual_seed(0)
    decoder = build_backbone(shape.model, shape.vocabulary)
    with torch.no_grad():
        decoder.lm_head.weight.normal_(std=0.3)
    theirs = transformers.LlamaForCausalLM(llama(shape))
    theirs.load_state_dict(decoder.state_dict(), strict=False)
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    return decoder.to(default_device()).eval(), theirs.to(default_device()).eval()


def ours(decoder: Decoder, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """One prompt as `modularforge generate` continues it, several as tasks do."""
    if len(prompts) == 1:
        return [continue_tokens(decoder, prompts[0], tokens, GREEDY, ())]
    return continue_batch(decoder, prompts, tokens, GREEDY, ())


def other(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The same with `generate` of transformers, padded on the left."""
    width = max(map(len, prompts))
    rows = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    with torch.inference_mode():
        made = model.generate(
            rows, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    found: list[list[int]] = made[:, width:].tolist()
    return found


if __name__ == "__main__":
    main()
