"""Puts trained networks into the folders that ship: ordinary diffusers pipelines."""

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTokenizer

from training import tokens
from training.denoisers import Denoisers, scheduler


def save(models: Path, vae: AutoencoderKL, nets: Denoisers, tokenizer: CLIPTokenizer) -> None:
    """Writes `shapes` and `shapes-edit`; UNets and autoencoder in half precision.

    The text encoder stays in float32: loaders that take the type from its file would
    otherwise hand half-precision words to networks that they load in float32.
    """
    pipelines = {
        "shapes": (StableDiffusionPipeline, nets.text_to_image),
        "shapes-edit": (StableDiffusionInstructPix2PixPipeline, nets.edit),
    }
    for name, (kind, unet) in pipelines.items():
        _save(models / name, kind, unet, vae, nets, tokenizer)


def _save(
    folder: Path,
    kind: type[StableDiffusionPipeline | StableDiffusionInstructPix2PixPipeline],
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    nets: Denoisers,
    tokenizer: CLIPTokenizer,
) -> None:
    vae.register_to_config(_name_or_path=folder.name)  # not where the training run kept it
    pipeline = kind(
        vae=vae.half(),
        text_encoder=nets.text_encoder.float(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    tokens.build(folder / "tokenizer")
