"""Choosing the next token, and continuing a text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoints import plain_folder
from modularforge.assembly.assemble import assemble
from modularforge.config import Config, ModelConfig
from modularforge.data.chat_template import ChatTemplate
from modularforge.data.tokenizer import EOS
from modularforge.errors import DataError
from modularforge.evaluation import generation
from modularforge.evaluation.bench import sample_texts
from modularforge.evaluation.conversation import Conversation, conversation
from modularforge.evaluation.extras import Chat
from modularforge.evaluation.generation import (
    Sampling,
    choose_token,
    continue_text,
    continue_texts,
    continue_tokens,
    generate,
    keep_likely,
    load_for_generation,
    show_pieces,
    spoken,
)
from modularforge.model.backbone import build_backbone
from modularforge.model.folder import load_model
from modularforge.run import Run
from modularforge.stage_outputs import Corpus
from modularforge.stored_models import stored_model

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0]).log_softmax(dim=-1)


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_top_k_keeps_the_likeliest_in_their_places() -> None:
    assert kept(keep_likely(LOGITS, 2, 1.0)) == [1, 3]
    assert kept(keep_likely(LOGITS, 0, 1.0)) == [0, 1, 2, 3, 4]
    assert kept(keep_likely(LOGITS, 99, 1.0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("top_p", "expected"), [(1e-6, [1]), (0.6, [1]), (0.7, [1, 3]), (0.9, [1, 3, 4]), (1.0, range(5))]
)
def test_top_p_keeps_the_fewest_that_hold_the_share_and_never_scrambles_the_vocabulary(top_p, expected) -> None:
    found = keep_likely(LOGITS, 0, top_p)
    assert kept(found) == list(expected)
    assert torch.equal(found[kept(found)], LOGITS[kept(found)])


def test_greedy_takes_the_likeliest_and_sampling_follows_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    assert choose_token(LOGITS, Sampling(temperature=0), generator) == 1
    draws = [choose_token(LOGITS, Sampling(temperature=1.0), generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=5) / 4000
    assert (shares - LOGITS.exp()).abs().max() < 0.03


def test_the_same_seed_gives_the_same_text_and_greedy_equals_temperature_zero(finished_run: Config) -> None:
    model = load_model(Run(finished_run).require("assemble").local_folder())
    tokenizer = Corpus(Run(finished_run).require("prepare-data")).tokenizer
    texts = [generate(model, tokenizer, "The law", 12, Sampling(1.0, seed=3)) for _ in range(2)]
    assert texts[0] == texts[1]
    assert generate(model, tokenizer, "The law", 12, Sampling(0.0, seed=1)) == generate(
        model, tokenizer, "The law", 12, Sampling(0.0, seed=2)
    )


def test_a_text_longer_than_the_context_goes_on(finished_run: Config) -> None:
    model = load_model(Run(finished_run).require("backbone").local_folder())
    tokenizer = Corpus(Run(finished_run).require("prepare-data")).tokenizer
    length = 3 * finished_run.model.context_length
    assert generate(model, tokenizer, "word " * 200, length, Sampling(temperature=0))


def test_several_prompts_are_continued_as_each_alone(finished_run: Config) -> None:
    url, greedy = Run(finished_run).require("assemble").url, Sampling(temperature=0)
    loaded, prompts = load_for_generation(url), ["The law of the land", "It", "To be or not to be"]
    expected = [continue_text(loaded, prompt, 8, greedy) for prompt in prompts]
    assert continue_texts(loaded, prompts, 8, greedy) == expected
    # One without room in the context for what follows goes on alone.
    long = 2 * loaded.model.config.context_length
    assert continue_texts(loaded, prompts, long, greedy) == [
        continue_text(loaded, one, long, greedy) for one in prompts
    ]


def test_samples_of_an_evaluation_come_in_batches_and_are_those_of_each_prompt_alone(finished_run: Config) -> None:
    model = load_model(Run(finished_run).require("assemble").local_folder())
    corpus = Corpus(Run(finished_run).require("prepare-data"))
    prompts = ["The law of the land", "It", "word " * model.config.context_length, "To be or not to be"]
    asked = {"prompts": prompts, "sample_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = finished_run.model_copy(update={"evaluation": finished_run.evaluation.model_copy(update=asked)})
    passes: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    found = sample_texts(config, corpus, model)
    hook.remove()
    assert [sample["prompt"] for sample in found] == prompts
    for kind, sampling in (("greedy", Sampling(0)), ("sampled", Sampling(1.0, seed=config.seed))):
        alone = [generate(model, corpus.tokenizer, prompt, 8, sampling, (corpus.end_token,)) for prompt in prompts]
        assert [sample[kind] for sample in found] == alone
    assert passes.count(3) >= 2, "three have room in the context and are read together"
    assert len(passes) <= 2 * (8 + 8)
    ids = [corpus.tokenizer.encode(text).ids for text in prompts]
    chat = Chat([], ids, [], corpus.tokenizer, corpus.end_token)
    assert chat.replies(model, 8) == [sample["greedy"].strip() for sample in found]


def test_an_empty_prompt_starts_a_text_and_one_that_ends_with_eos_is_refused(finished_run: Config) -> None:
    model = load_model(Run(finished_run).require("backbone").local_folder())
    tokenizer = Corpus(Run(finished_run).require("prepare-data")).tokenizer
    assert isinstance(generate(model, tokenizer, "", 3, Sampling()), str)

    class Ending:
        def encode(self, _text: str) -> object:
            return type("Ids", (), {"ids": [2, 5, EOS]})

    with pytest.raises(DataError, match="must not end with the end of a text"):
        generate(model, Ending(), "x", 3, Sampling())  # type: ignore[arg-type]


def test_a_cached_continuation_equals_one_that_reads_everything_again() -> None:
    torch.manual_seed(0)
    model = build_backbone(
        ModelConfig(width=24, layers=2, heads=4, kv_heads=2, ffn_width=40, context_length=40), 61
    ).eval()
    ids = [2, 7, 9]

    class Same:
        def encode(self, _text: str) -> object:
            return type("Ids", (), {"ids": list(ids)})

        def decode(self, new: list[int]) -> str:
            return " ".join(map(str, new))

    fast = generate(model, Same(), "", 20, Sampling(temperature=0))  # type: ignore[arg-type]
    slow: list[int] = []
    for _ in range(20):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + slow]))[0, -1].argmax())
        if token == EOS:
            break
        slow.append(token)
    assert fast == " ".join(map(str, slow))


def test_pieces_come_as_characters_are_whole_and_join_to_the_text(finished_run: Config) -> None:
    loaded = load_for_generation(f"{finished_run.output_dir}/assembled")
    ids = loaded.tokenizer.encode("The law").ids
    pieces = list(spoken(loaded, ids, 30, Sampling(1.5, seed=4)))
    assert len(pieces) > 5
    assert "".join(pieces) == continue_text(loaded, "The law", 30, Sampling(1.5, seed=4))
    whole = "\u00e9\u4e2d".encode()

    class Bytes:
        def decode(self, new: list[int]) -> str:
            return bytes(new).decode(errors="replace")

    model = SimpleNamespace(model=None, tokenizer=Bytes(), end_tokens=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "following_tokens", lambda *_: iter(whole))
        assert [piece for piece in spoken(model, [1], 9, Sampling()) if piece] == ["\u00e9", "\u4e2d"]  # type: ignore[arg-type]


def test_a_terminal_has_each_piece_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real one, a pty: nothing waits in a buffer for the end of the line, and no escape reaches it."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    seen: list[str] = []

    def pieces() -> Iterator[str]:
        for piece in ("The", " law\x1b[2J", " is"):
            yield piece
            seen.append(os.read(ours, 100).decode())

    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert show_pieces(pieces()) == "The law\x1b[2J is"
    os.close(ours)
    assert [seen[0], seen[2]] == ["The", " is"]
    assert seen[1].startswith(" law")
    assert "\x1b" not in seen[1]


def test_what_was_said_stays_in_a_conversation(finished_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{finished_run.output_dir}/assembled"
    loaded = load_for_generation(url)
    talk = conversation(loaded, stored_model(url), None)
    assert talk.template is None, "its tokenizer has no chat template"
    first = talk.ask("The law", 5, Sampling(0.0))
    second = talk.ask("A house", 5, Sampling(0.0))
    assert second == continue_text(loaded, f"The law{first}\nA house", 5, Sampling(0.0))
    assert capsys.readouterr().out == f"The law{first}\nA house{second}\n"
    talk.forget()
    assert talk.ask("The law", 5, Sampling(0.0)) == first
    with pytest.raises(DataError, match="--chat needs a model with a chat template"):
        conversation(loaded, stored_model(url), True)


def test_a_chat_is_written_by_the_template_and_remembered(finished_run: Config) -> None:
    url = f"{finished_run.output_dir}/assembled"
    loaded = load_for_generation(url)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        {},
    )
    talk = Conversation(loaded, template, loaded.tokenizer)
    first = talk.ask("Hello", 4, Sampling(0.0))
    second = talk.ask("And now", 4, Sampling(0.0))
    chat = f"user: Hello\nassistant: {first}\nuser: And now\nassistant:"
    ids = loaded.tokenizer.encode(chat, add_special_tokens=False).ids
    assert second == loaded.tokenizer.decode(continue_tokens(loaded.model, ids, 4, Sampling(0.0), loaded.end_tokens))
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user", "assistant"]


def test_what_left_the_context_still_counts_for_the_text_router(finished_run: Config, tmp_path: Path) -> None:
    settings = finished_run.assembly.model_copy(update={"router": "evidence"})
    run = finished_run.model_copy(update={"assembly": settings})
    experts = [Run(run).require("expert", index) for index in range(run.experts.count)]
    assemble(run, Run(run).require("backbone"), experts, plain_folder(tmp_path))
    model, tokenizer = load_model(tmp_path), Corpus(Run(run).require("prepare-data")).tokenizer
    assert model.text_router is not None
    prompt = "The law of the land is what the court says that it is. " * 8
    ids = tokenizer.encode(prompt).ids
    assert len(ids) > model.config.context_length
    routed: list[torch.Tensor] = []
    model.blocks[0].ffn.register_forward_pre_hook(lambda layer, _arguments: routed.append(layer.given_NE[-1]))
    new = 2 * model.config.context_length
    with torch.inference_mode():
        said = continue_tokens(model, ids, new, Sampling(0.0), ())
    every = [*ids, *said]
    whole_TR = model.text_router(torch.tensor([every]))[0][0]
    found_TR = torch.stack(routed)
    assert torch.allclose(found_TR, whole_TR[len(ids) - 1 : len(ids) - 1 + len(found_TR)], atol=1e-5)
