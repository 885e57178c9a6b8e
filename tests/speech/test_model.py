"""The speech model: steering, masks, pooling, prompts, and what learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modularforge.errors import ConfigError, DataError
from modularforge.speech.conformer import ConformerEncoder, conformer_tensors
from modularforge.speech.encoder import WhisperEncoder, frame_mask, whisper_shape, whisper_tensors
from modularforge.speech.model import SpeechModel, learning_parameters, read, speech_loss
from modularforge.speech.projector import Pooling, pool, pooled_lengths
from modularforge.speech.steering import GateUsage, Steering, SteeringShape
from tests.speech.tiny import ENCODER, LAST, one_of, tiny_batch, tiny_model

VARIANTS = ["layerwise", "aligner", "hybrid", "static", "prompt", "lora"]


def arguments(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(batch[name] for name in ("features", "frames", "prompt", "answer"))


def test_the_encoder_computes_what_transformers_computes() -> None:
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    sizes = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    others = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "vocab_size": 30}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(num_mel_bins=10, max_source_positions=20, **sizes, **others, **ids)
    theirs = WhisperModel(config).eval()
    ours = WhisperEncoder(whisper_shape(config.to_dict(), "theirs")).eval()
    ours.load_state_dict(whisper_tensors(dict(theirs.state_dict()), "theirs"))
    features_BFM = torch.randn(2, 40, 10)
    with torch.no_grad():
        expected = theirs.encoder(features_BFM.transpose(1, 2)).last_hidden_state
        x_BTD, length_B = ours.embed(features_BFM, torch.tensor([40, 40]))
        for index in range(3):
            x_BTD = ours.layer(index, x_BTD, frame_mask(length_B, 20))
    assert torch.allclose(ours.finish(x_BTD), expected, atol=1e-5)


def test_a_model_that_is_no_whisper_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be a Whisper model, but its config.json says model_type 'llama'"):
        whisper_shape({"model_type": "llama"}, "x")
    with pytest.raises(DataError, match="must hold weights of a Whisper encoder"):
        whisper_tensors({"lm_head.weight": torch.zeros(1)}, "x")


def test_audio_that_is_longer_than_the_encoder_can_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be at most 0.8 seconds for this encoder, but has 0.84"):
        tiny_model().encode(torch.zeros(1, 84, 10), torch.tensor([84]))


def plain_steering(steering: Steering, site: int, u_BTD: Tensor) -> Tensor:
    """The formula, vector by vector and frame by frame."""
    shape, rows = steering.shape, []
    for u_TD in u_BTD:
        for u_D in u_TD:
            logits = [steering.gate_weight[site, e] @ u_D + steering.gate_bias[site, e] for e in range(shape.total)]
            bottom = sum(torch.exp(logit) for logit in logits)
            added = sum(torch.exp(logits[e]) / bottom * steering.vectors[site, e] for e in range(shape.total))
            rows.append(u_D + steering.scale[site, 0] * added)
    return torch.stack(rows).view_as(u_BTD)


def test_steering_is_a_plain_loop_over_the_vectors_in_value_and_gradient() -> None:
    torch.manual_seed(2)
    steering = Steering(SteeringShape(3, 8, 5))
    u_BTD, mask_BT = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    results = []
    for computed in (lambda: steering(1, u_BTD, mask_BT), lambda: plain_steering(steering, 1, u_BTD)):
        steering.zero_grad()
        value = computed()
        value.square().sum().backward()
        results.append(
            [value.detach(), *(weight.grad.clone() for weight in steering.parameters() if weight.grad is not None)]
        )
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert len(results[0]) == 5
    assert all(tensor.abs().sum() > 0 for tensor in results[0])


def test_a_sites_gate_is_a_slice_of_one_matrix_over_all_sites() -> None:
    torch.manual_seed(3)
    steering = Steering(SteeringShape(3, 8, 5))
    u_BTD = torch.randn(2, 4, 8)
    full_BTLE = (u_BTD @ steering.gate_weight.flatten(0, 1).T + steering.gate_bias.flatten()).unflatten(-1, (3, 5))
    for site in range(3):
        gate = steering.gates(site, u_BTD, torch.ones(2, 4, dtype=torch.bool))
        assert torch.allclose(gate, full_BTLE[:, :, site].softmax(dim=-1), atol=1e-6)


def test_with_scales_of_zero_the_encoders_output_is_untouched() -> None:
    steered, batch = tiny_model(), tiny_batch()
    plain = copy.deepcopy(steered)
    plain.steering = None
    assert not torch.equal(steered(*arguments(batch))[0], plain(*arguments(batch))[0])
    assert isinstance(steered.steering, Steering)
    with torch.no_grad():
        steered.steering.scale.zero_()
    assert torch.equal(steered(*arguments(batch))[0], plain(*arguments(batch))[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pooling", [Pooling(2, "mean"), Pooling(3, "max", 1), Pooling(4, "stack"), Pooling(1, "mean")])
def test_a_padded_batch_computes_what_single_utterances_do(variant: str, pooling: Pooling) -> None:
    model, batch = tiny_model(variant, pooling), tiny_batch()
    logits_NV, target_N = model(*arguments(batch))
    single = [model(*arguments(one_of(batch, index))) for index in range(3)]
    assert torch.equal(target_N, torch.cat([targets for _, targets in single]))
    assert torch.allclose(logits_NV, torch.cat([logits for logits, _ in single]), atol=1e-5)


def test_routing_by_utterance_knows_the_true_length() -> None:
    model, batch = tiny_model(experts=3, routing="utterance"), tiny_batch()
    assert isinstance(model.steering, Steering)
    model.steering.router_weight.data.normal_()
    single = [model(*arguments(one_of(batch, index)))[0] for index in range(3)]
    assert torch.allclose(model(*arguments(batch))[0], torch.cat(single), atol=1e-5)


def test_windows_are_pooled_over_the_frames_that_are_there() -> None:
    x_BTD = torch.arange(1.0, 6.0).view(1, 5, 1).repeat(2, 1, 1)
    length_B = torch.tensor([5, 2])
    mask_BT = frame_mask(length_B, 5)
    assert pooled_lengths(length_B, 2).tolist() == [3, 1]
    assert pool(x_BTD, mask_BT, Pooling(2, "mean"))[:, :, 0].tolist() == [[1.5, 3.5, 5.0], [1.5, 0.0, 0.0]]
    assert pool(-x_BTD, mask_BT, Pooling(2, "max"))[:, :, 0].tolist() == [[-1.0, -3.0, -5.0], [-1.0, 0.0, 0.0]]
    assert pool(x_BTD, mask_BT, Pooling(3, "stack")).tolist() == [[[1, 2, 3], [4, 5, 0]], [[1, 2, 0], [0, 0, 0]]]
    with pytest.raises(ConfigError, match="must be between 0 and 3, the layers of the encoder, but is 4"):
        tiny_model(pooling=Pooling(2, "mean", 4))


def test_kernel_kind_and_place_of_pooling_take_effect() -> None:
    batch = tiny_batch()
    kinds = [Pooling(2, "mean"), Pooling(2, "max"), Pooling(3, "mean"), Pooling(2, "mean", 0), Pooling(2, "mean", 2)]
    found = [tiny_model(pooling=pooling)(*arguments(batch))[0] for pooling in kinds]
    for index, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[index + 1 :])


def test_the_prompt_reaches_the_model_but_in_the_aligner() -> None:
    batch = tiny_batch()
    other = {**batch, "prompt": (batch["prompt"] + 1) % LAST}
    for variant, reaches in (("layerwise", True), ("prompt", True), ("hybrid", True), ("aligner", False)):
        model = tiny_model(variant)
        same = torch.equal(model(*arguments(batch))[0], model(*arguments(other))[0])
        assert same is not reaches, variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_and_frozen_parts_stay_bit_identical(variant: str) -> None:
    model, batch = tiny_model(variant), tiny_batch()
    learns = learning_parameters(model)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if name not in learns}
    before = {name: weight.detach().clone() for name, weight in learns.items()}
    optimizer = torch.optim.AdamW(learns.values(), lr=1e-2)
    losses = []
    for _ in range(15):
        model.train()
        loss = speech_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    moved = {name.split(".")[0] for name, weight in learns.items() if not torch.equal(weight, before[name])}
    assert moved == {"projector"} | ({"steering"} if model.steering else set())
    assert not model.encoder.training
    assert not model.decoder.training


def test_the_loss_is_of_the_answer_alone() -> None:
    model, batch = tiny_model("static"), one_of(tiny_batch(), 2)
    logits_NV, target_N = model(*arguments(batch))
    assert target_N.tolist() == batch["answer"][0].tolist()
    audio_BTW, length_B = model.encode(batch["features"], batch["frames"])
    ids = torch.cat([batch["prompt"], batch["answer"]], dim=1)
    x_BSW = torch.cat([audio_BTW[:, : int(length_B)], model.decoder.model.embed_tokens(ids)], dim=1)
    everywhere = model.decoder.lm_head(read(model.decoder, x_BSW))[0]
    start = int(length_B) + batch["prompt"].shape[1] - 1
    assert torch.allclose(logits_NV, everywhere[start : start + len(target_N)], atol=1e-5)
    assert torch.isclose(speech_loss(model, batch), F.cross_entropy(logits_NV, target_N))


def test_embeddings_are_read_as_the_decoder_reads_ids() -> None:
    decoder, ids_BT = tiny_model().decoder, torch.arange(8).view(2, 4)
    assert torch.equal(decoder.lm_head(read(decoder, decoder.model.embed_tokens(ids_BT))), decoder(ids_BT))


def transcribe(model: SpeechModel, batch: dict[str, Tensor], end: int = LAST) -> list[list[int]]:
    return model.transcribe(batch["features"], batch["frames"], batch["prompt"], end, 6)


def greedy(model: SpeechModel, batch: dict[str, Tensor], tokens: int) -> list[int]:
    """The likeliest ids of one utterance, each from a pass over everything before it."""
    ids: list[int] = []
    for _ in range(tokens):
        answer = torch.tensor([[*ids, 0]])
        logits_NV, _ = model(batch["features"], batch["frames"], batch["prompt"], answer)
        if (best := int(logits_NV[-1].argmax())) == LAST:
            break
        ids.append(best)
    return ids


def test_transcripts_of_a_batch_are_those_of_single_utterances_without_a_cache() -> None:
    model, batch = tiny_model(), tiny_batch()
    found = transcribe(model, batch)
    with torch.no_grad():
        assert found == [greedy(model, one_of(batch, index), 6) for index in range(3)]
    first = found[0]
    assert len(set(first)) > 1
    assert transcribe(model, one_of(batch, 0), first[1]) == [first[: first.index(first[1])]]


def test_experts_together_with_one_forced_are_that_expert_alone() -> None:
    batch, alone = tiny_batch(), [tiny_model(seed=7), tiny_model(seed=7)]
    together = tiny_model(seed=7, experts=2)
    with torch.no_grad():
        for index, model in enumerate(alone):
            assert isinstance(model.steering, Steering)
            assert isinstance(together.steering, Steering)
            model.steering.vectors.normal_().mul_(3)
            model.steering.scale.uniform_(0.5, 1)
            together.projector.load_state_dict(model.projector.state_dict())
            own = slice(5 * index, 5 * index + 5)
            for name in ("vectors", "gate_weight", "gate_bias"):
                getattr(together.steering, name)[:, own] = getattr(model.steering, name)
            together.steering.scale[:, index] = model.steering.scale[:, 0]
        alone[1].projector.load_state_dict(alone[0].projector.state_dict())
        together.projector.load_state_dict(alone[0].projector.state_dict())
    assert isinstance(together.steering, Steering)
    mixed = together(*arguments(batch))[0]
    for index, model in enumerate(alone):
        together.steering.forced = index
        assert torch.allclose(together(*arguments(batch))[0], model(*arguments(batch))[0], atol=1e-5)
        assert not torch.allclose(mixed, model(*arguments(batch))[0], atol=1e-3)


def test_gates_add_up_to_one_and_only_active_ones_are_kept() -> None:
    torch.manual_seed(4)
    u_BTD, mask_BT = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    for active, kept in ((None, 5), (2, 2)):
        gate_BTE = Steering(SteeringShape(2, 8, 5, active=active)).gates(0, u_BTD, mask_BT)
        assert torch.allclose(gate_BTE.sum(dim=-1), torch.ones(2, 4), atol=1e-5)
        assert ((gate_BTE > 0).sum(dim=-1) == kept).all()


def test_bounded_scales_stay_within_their_bound() -> None:
    steering = Steering(SteeringShape(1, 8, 5, scale_bound=0.5), start_scale=9.0)
    assert float(steering.scales(0).max()) == pytest.approx(0.5)


def test_usage_says_how_gates_are_used_at_each_site() -> None:
    model, batch = tiny_model(experts=2), tiny_batch()
    assert isinstance(model.steering, Steering)
    model.steering.router_weight.data.normal_()
    usage = model.steering.observed = GateUsage(model.steering.shape)
    model(*arguments(batch))
    assert usage.frames_L.tolist() == [5 + 11 + 7] * ENCODER.layers
    assert torch.allclose(usage.share_LE.sum(dim=1), torch.ones(ENCODER.layers, dtype=torch.float64))
    assert torch.allclose(usage.share_LK[:, 0], usage.share_LE[:, :5].sum(dim=1))
    u_BTD, mask_BT = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    gate_NE = model.steering.gates(0, u_BTD, mask_BT)[0].detach()
    single = GateUsage(model.steering.shape)
    single.add(0, gate_NE)
    expected = -(gate_NE * gate_NE.log()).sum(dim=1).mean() / math.log(10)
    assert float(single.evenness_L[0]) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(single.share_LE[0].float(), gate_NE.mean(dim=0), atol=1e-6)


def test_a_conformer_computes_what_transformers_computes_and_knows_the_true_length() -> None:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = Wav2Vec2BertConfig(feature_projection_input_dim=20, conv_depthwise_kernel_size=5, **sizes)
    theirs = Wav2Vec2BertModel(config).eval()
    ours = ConformerEncoder(config.to_dict()).eval()
    ours.load_state_dict(conformer_tensors(dict(theirs.state_dict()), ours, "theirs"), strict=False)
    features_BFM, frames_B = torch.randn(2, 14, 10), torch.tensor([14, 9])
    features_BFM[1, 9:] = 0
    with torch.no_grad():
        mask_BT = frame_mask(torch.tensor([7, 5]), 7)
        expected = theirs(features_BFM.reshape(2, 7, 20), attention_mask=mask_BT.long()).last_hidden_state
        found = encoded(ours, features_BFM, frames_B)
        single = encoded(ours, features_BFM[1:, :9], frames_B[1:])
    assert torch.allclose(found[mask_BT], expected[mask_BT], atol=1e-4)
    assert torch.allclose(found[1, :5], single[0], atol=1e-5)
    with pytest.raises(DataError, match=r"speech.data.bins must be 10 for this encoder, but is 8"):
        ours.embed(torch.zeros(1, 4, 8), torch.tensor([4]))
    with pytest.raises(DataError, match=r"must hold the weights of its encoder, but lacks model\.encoder"):
        conformer_tensors({}, ours, "x")


def encoded(encoder: ConformerEncoder, features_BFM: Tensor, frames_B: Tensor) -> Tensor:
    x_BTD, length_B = encoder.embed(features_BFM, frames_B)
    for index in range(encoder.num_layers):
        x_BTD = encoder.layer(index, x_BTD, frame_mask(length_B, x_BTD.shape[1]))
    return encoder.finish(x_BTD)
