"""Metrics of replies, by hand and by the libraries; and replies in batches as one at a time."""

from __future__ import annotations

import sys

import pytest
import torch

from modularforge.config import TaskConfig
from modularforge.errors import ConfigError
from modularforge.evaluation import task_metrics
from modularforge.evaluation.generation import Sampling, continue_batch, continue_tokens
from modularforge.evaluation.task_metrics import Marking, check_metrics, fold, label_of, measure_replies
from modularforge.model import text_router as router_module
from modularforge.model.backbone import Decoder
from tests.unit.test_packing import MODELS, V, models

REPLIES = ["the cat sat on the mat", "A dog runs. It barks."]
REFERENCES = [["the cat sat on a mat", "there is a cat on the mat"], ["A dog runs. It barks."]]


def scores(*metrics: str, replies=REPLIES, references=REFERENCES, **marking) -> dict[str, float]:
    return measure_replies(metrics, replies, references, Marking(**marking))[0]


def test_bleu_is_sacrebleus_with_as_many_references_as_there_are() -> None:
    import sacrebleu

    found = scores("bleu")
    columns = [[known[0] for known in REFERENCES], [REFERENCES[0][1], None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(REPLIES, columns).score)
    assert found["bleu"] == found["bleu_4"]
    # Of 13 words and stops all are in a reference but the second "the": no reference has two.
    assert found["bleu_1"] == pytest.approx(100 * 12 / 13)
    assert found["bleu_2"] == pytest.approx(100 * ((12 / 13) * (11 / 11)) ** 0.5)


def test_rouge_takes_the_best_reference_of_each_reply() -> None:
    found = scores("rouge", replies=["the cat sat"], references=[["the cat ran", "no word of it"]])
    assert found["rouge_1"] == pytest.approx(100 * 2 / 3)
    assert found["rouge_2"] == pytest.approx(100 / 2)
    assert found["rouge_l"] == pytest.approx(100 * 2 / 3)
    turned = scores("rouge", replies=["It barks. A dog runs."], references=[["A dog runs. It barks."]])
    assert turned["rouge_lsum"] == pytest.approx(100.0), "sentences in another order"
    assert turned["rouge_l"] < 100


def test_meteor_without_wordnet_says_what_it_leaves_out() -> None:
    found, notes = measure_replies(["meteor"], ["cats sat", "a dog"], [["cat sat"], ["a dog"]], Marking())
    assert found["meteor"] > 90, "equal stems count"
    if notes:
        assert "synonyms are left out" in notes[0]
    assert measure_replies(["meteor"], ["automobile"], [["car"]], Marking())[0]["meteor"] in (0.0, 50.0)


def test_exact_match_folds_case_and_white_space_and_looks_behind_the_mark() -> None:
    assert scores("exact_match", replies=["SELECT  a\nFROM t"], references=[["select a from T"]]) == {
        "exact_match": 100
    }
    replies, references = ["2 + 2 = 4\n#### 4", "so 5"], [["by heart #### 4"], ["#### 5"]]
    assert scores("exact_match", replies=replies, references=references, mark="####") == {"exact_match": 50}
    assert scores("exact_match", replies=replies, references=references) == {"exact_match": 0}


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [("1,000", True), ("$1000", True), ("$1,000.", True), ("1000.5", False), ("100", False)],
)
def test_an_answer_behind_a_mark_is_its_number(reply: str, is_right: bool) -> None:
    found = scores("exact_match", replies=[f"so #### {reply}"], references=[["#### 1,000"]], mark="####")
    assert found == {"exact_match": 100.0 * is_right}


@pytest.mark.parametrize("metric", list(task_metrics.METRICS))
def test_no_replies_are_worth_nothing(metric: str) -> None:
    assert set(scores(metric, replies=[], references=[]).values()) == {0.0}


def test_accuracy_is_over_labels() -> None:
    labels = ["card lost", "card", "pin"]
    assert [label_of(text, labels) for text in ("Card lost.", "card", "cards", "Card, lost", "the pin", "")] == [
        "card lost",
        "card",
        None,
        "card",
        None,
        None,
    ]
    replies, references = ["Card lost, I think", "pin", "no"], [["card lost"], ["card"], ["pin"]]
    assert scores("accuracy", replies=replies, references=references, labels=labels)["accuracy"] == pytest.approx(
        100 / 3
    )
    assert fold(" A \n b ") == "a b"


def test_every_metric_that_can_be_set_is_measured() -> None:
    names = TaskConfig(source="x", metrics=list(task_metrics.METRICS)).metrics  # type: ignore[arg-type]
    assert names is not None
    with pytest.raises(ValueError, match="'bleu', 'rouge', 'meteor', 'exact_match' or 'accuracy'"):
        TaskConfig(source="x", metrics=["other"])  # type: ignore[list-item]


def test_a_missing_library_gets_a_sentence_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    check_metrics(task_metrics.METRICS)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r"measures bleu, which needs sacrebleu.*pip install 'modularforge\[tasks\]'"):
        check_metrics(["exact_match", "bleu"])


PROMPTS = [[2, 9, 11, 30, 8, 4], [2, 12], [2, 17, 5, 5, 6, 7, 8, 9, 10, 11, 12], [2, 33, 34, 35]]


@pytest.mark.parametrize("model", models(), ids=MODELS)
def test_greedy_replies_in_a_batch_are_those_of_one_at_a_time(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "DECIDED_WITHIN", 3)
    sharpened(model)
    greedy = Sampling(temperature=0)
    alone = [continue_tokens(model, ids, 12, greedy, ()) for ids in PROMPTS]
    ends = {alone[0][3], alone[2][1]}  # so that rows leave the batch at different steps
    alone = [continue_tokens(model, ids, 12, greedy, ends) for ids in PROMPTS]
    assert len({len(ids) for ids in alone}) > 1
    assert continue_batch(model, PROMPTS, 12, greedy, ends) == alone


def sharpened(model: Decoder) -> None:
    """Logits far enough apart that a rounding does not decide."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.2)


def test_sampled_replies_follow_from_the_seed_and_stay_within_the_vocabulary() -> None:
    model, sampling = models()[0], Sampling(temperature=1.0, top_k=10, seed=4)
    found = continue_batch(model, PROMPTS, 6, sampling, ())
    assert found == continue_batch(model, PROMPTS, 6, sampling, ())
    assert found != continue_batch(model, PROMPTS, 6, Sampling(temperature=1.0, top_k=10, seed=5), ())
    assert all(len(ids) == 6 and 0 <= min(ids) <= max(ids) < V for ids in found)


def test_a_prompt_that_fills_the_context_leaves_room_for_the_reply() -> None:
    model = models()[0]
    long, limit = [2, *range(4, 39)], model.config.context_length
    assert len(long) > limit
    kept = [2, *long[len(long) - (limit - 8) + 1 :]]
    greedy = Sampling(temperature=0)
    assert continue_batch(model, [long], 8, greedy, ()) == [continue_tokens(model, kept, 8, greedy, ())]
