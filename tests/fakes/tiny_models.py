"""Diffusers pipelines of half a million weights, made from configuration with random values."""

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 32
WORDS = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghijklm")]


def tiny_stable_diffusion(folder: Path, words: int = len(WORDS)) -> Path:
    """Save a Stable Diffusion pipeline for pictures of 64 x 64 pixels in ``folder``.

    A large number of ``words`` makes it large: 128 bytes for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline(
        tokenizer=tokenizer(folder),
        text_encoder=text_encoder(words),
        unet=unet(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tokenizer(folder: Path) -> CLIPTokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    merges.write_text("#version: 0.2\n")
    made = CLIPTokenizer(
        str(vocabulary), str(merges), unk_token="<|endoftext|>", model_max_length=16
    )
    vocabulary.unlink()
    merges.unlink()
    return made


def text_encoder(words: int = len(WORDS), cls: type = CLIPTextModel) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **{"cross_attention_dim": WIDTH, **more},
    )


def vae(**more: Any) -> AutoencoderKL:
    blocks = 4
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=8,
        **more,
    )
