"""A real Whisper from a package of the registry: converted, it hears what was said, and our encoder is its encoder."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.real_speech import ctranslate2, models
from modularforge.config_files import SAMPLE_SPEECH
from modularforge.speech.audio import Samples, decode
from modularforge.speech.encoder import WhisperEncoder, frame_mask, whisper_shape, whisper_tensors
from modularforge.speech.features import log_mel
from modularforge.speech.metrics import Pair, pooled
from modularforge.speech.records import utterances
from tests.speech.sounds import config_of


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float16]]) -> bytes:
    shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    return text(name) + shape + struct.pack("<BI", 4, values.nbytes) + values.tobytes()


def test_a_ctranslate2_file_is_read_as_its_format_says() -> None:
    stacked = np.arange(12, dtype=np.float16).reshape(6, 2)
    bias = np.arange(6, dtype=np.float16)
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    content += variable("encoder/layer_0/self_attention/linear_0/weight", stacked)
    content += variable("encoder/layer_0/self_attention/linear_0/bias", bias)
    content += struct.pack("<I", 1) + text("decoder/embeddings/weight")
    content += text("encoder/layer_0/self_attention/linear_0/weight")
    found = ctranslate2.hugging_face_names(ctranslate2.read_variables(content))
    place = "model.encoder.layers.0.self_attn"
    assert found.keys() == {
        *(f"{place}.{name}_proj.weight" for name in "qkv"),
        f"{place}.q_proj.bias",
        f"{place}.v_proj.bias",  # keys have none in Hugging Face
        "model.decoder.embed_tokens.weight",
    }
    assert found[f"{place}.k_proj.weight"].tolist() == stacked[2:4].tolist()
    assert found[f"{place}.v_proj.bias"].tolist() == bias[4:].tolist()
    with pytest.raises(ValueError, match="must be version 6 of a WhisperSpec, but is version 5"):
        ctranslate2.read_variables(struct.pack("<I", 5) + text("WhisperSpec"))


def digits(split: str) -> list[tuple[Samples, str]]:
    """Recordings and words of the sample in the package."""
    config = config_of(str(SAMPLE_SPEECH[0]["train"]), split_field="split")
    found = utterances(config, config.data.sources[0], split)  # type: ignore[arg-type]
    return [(decode(item.read()), item.text) for item in found if item.read is not None]


@pytest.mark.slow
def test_a_real_whisper_hears_digits_and_our_encoder_is_its_own(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    try:
        folder = models.whisper(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package could not be downloaded: {error}")
    whisper = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer, extractor = Tokenizer.from_file(str(folder / "tokenizer.json")), WhisperFeatureExtractor()
    ours = WhisperEncoder(whisper_shape(whisper.config.to_dict(), "whisper")).eval()
    ours.load_state_dict(whisper_tensors(dict(whisper.state_dict()), "whisper"))
    pairs = []
    for samples, word in digits("test")[:12]:
        inputs = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            encoded = whisper.model.encoder(inputs).last_hidden_state
            ids = [ctranslate2.START, ctranslate2.WITHOUT_TIMES]
            while len(ids) < 10 and ids[-1] != ctranslate2.END:
                logits = whisper(encoder_outputs=(encoded,), decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        pairs.append(Pair(word, tokenizer.decode(ids[2:])))
    assert pooled(pairs)["string_accuracy"] >= 0.5, pairs
    padded = inputs[0].T[None]
    with torch.no_grad():
        x_BTD, length_B = ours.embed(padded, torch.tensor([3000]))
        for index in range(ours.num_layers):
            x_BTD = ours.layer(index, x_BTD, frame_mask(length_B, 1500))
    assert torch.allclose(ours.finish(x_BTD), encoded, atol=1e-3)
    assert np.abs(log_mel(samples, 80) - padded[0, : len(log_mel(samples, 80))].numpy()).max() < 1e-3
