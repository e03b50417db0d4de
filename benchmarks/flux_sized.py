"""A pipeline of FLUX's size from configuration, its random weights written to a host copy.

34 GB in bfloat16 at scale 1: a transformer of 23.8 GB, a T5 encoder of 9.5 GB, CLIP and a VAE. The
random values are made on the GPU and copied into the file, so that host memory holds them once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from gpuctld.weights import Layout, checksum, skeleton
from gpuctld.weights.segment import Segment, pack_table
from gpuctld.weights.transfer import cuts

SMALL_BYTES = 4 << 20
SPREAD = 0.02


def build(descriptor: int, scale: float, device: torch.device) -> Layout:
    """Write a host copy; ``scale`` shrinks the number of layers."""
    torch.set_grad_enabled(False)
    pipeline = _pipeline(scale)
    plan = skeleton.plan(pipeline)
    table = pack_table(plan.entries)
    segment = Segment.create(descriptor, plan.slab_bytes, plan.skeleton, table)
    for run in plan.runs:
        size = run.stop - run.start
        if size > SMALL_BYTES:
            _randomize(segment.slab[run.offset : run.offset + size], device)
        else:
            skeleton.copy_runs([run], segment.slab, lambda _: None)
    return Layout(
        model="flux-sized",
        pipeline=type(pipeline).__name__,
        dtype="bfloat16",
        slab_bytes=plan.slab_bytes,
        skeleton_bytes=len(plan.skeleton),
        checksums=_checksums(segment.slab, device),
    )


def save(folder: Path, scale: float, device: torch.device) -> None:
    """Write the pipeline as a folder of weight files, as a user would have it."""
    torch.set_grad_enabled(False)
    pipeline = _pipeline(scale)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                values = torch.empty_like(parameter, device=device).normal_(0, SPREAD)
                parameter.copy_(values)
    pipeline.save_pretrained(folder)


def _pipeline(scale: float) -> FluxPipeline:
    torch.set_default_dtype(torch.bfloat16)
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        latent_channels=16,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            guidance_embeds=True,
            num_layers=_scaled(19, scale),
            num_single_layers=_scaled(38, scale),
        )
        t5 = T5EncoderModel(_t5(scale))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=_tokenizer(),
        text_encoder_2=_on_cpu(t5),
        tokenizer_2=_tokenizer(),
        transformer=_on_cpu(transformer),
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.set_default_dtype(torch.float32)
    return pipeline


def _tokenizer() -> PreTrainedTokenizerFast:
    """Ten words; the weights' size is all that matters here."""
    words = {f"w{number}": number for number in range(10)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="w1",
        model_max_length=77,
    )


def _scaled(layers: int, scale: float) -> int:
    return max(1, round(layers * scale))


def _t5(scale: float) -> T5Config:
    return T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=_scaled(24, scale),
        num_heads=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )


def _on_cpu(module: torch.nn.Module) -> torch.nn.Module:
    """Large parameters stay untouched pages that cost no memory; small ones get values."""
    made = module.to_empty(device="cpu").requires_grad_(False).eval()
    if hasattr(made, "tie_weights"):
        made.tie_weights()
    for parameter in made.parameters():
        if parameter.numel() * parameter.element_size() <= SMALL_BYTES:
            parameter.normal_(0, SPREAD)
    return made


def _randomize(target: torch.Tensor, device: torch.device) -> None:
    for at, size in cuts(0, target.numel()):
        values = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_(0, SPREAD)
        target[at : at + size].copy_(values.view(torch.uint8))


def _checksums(slab: torch.Tensor, device: torch.device) -> list[int]:
    parts = (slab[at : at + size].to(device) for at, size in cuts(0, slab.numel()))
    return [each for part in parts for each in checksum.of(part)]


def forward(transformer: Any, device: torch.device) -> torch.Tensor:
    """One step at 1024 x 1024 with 512 text tokens, always the same input."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.bfloat16)

    with torch.no_grad():
        result: torch.Tensor = transformer(
            hidden_states=noise(1, 4096, 64),
            encoder_hidden_states=noise(1, 512, 4096),
            pooled_projections=noise(1, 768),
            timestep=torch.full((1,), 0.5, device=device, dtype=torch.bfloat16),
            guidance=torch.full((1,), 3.5, device=device, dtype=torch.bfloat16),
            img_ids=torch.zeros(4096, 3, device=device),
            txt_ids=torch.zeros(512, 3, device=device),
            return_dict=False,
        )[0]
    return result
