"""The autoencoder: 64 x 64 pixels to 16 x 16 latents of unit variance, and back."""

import random

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gpuctl_demo.drawing import Jitter, render
from gpuctl_demo.scenes import Scene, training_scenes
from training.config import Config
from training.learning import learn

SAMPLE = 2048


def train(config: Config, device: torch.device) -> tuple[AutoencoderKL, int]:
    """A trained autoencoder (float32) and the number of steps that it took."""
    torch.manual_seed(config.seed)
    vae = _new(config).to(device, memory_format=torch.channels_last)
    draw = Drawer(training_scenes(), config.seed, device)

    def loss() -> Tensor:
        return _loss(vae, draw(config.vae.batch) * 2 - 1, config.kl_weight)

    steps = learn("vae", [vae], loss, config.vae, config.ema)
    _whiten(vae, draw(min(SAMPLE, 64 * config.vae.batch)) * 2 - 1)
    return vae.eval(), steps


class Drawer:
    """Random jittered drawings of the given scenes, the same for a seed."""

    def __init__(self, scenes: list[Scene], seed: int, device: torch.device) -> None:
        self.scenes = scenes
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def pick(self, n: int) -> tuple[list[Scene], Tensor]:
        """`n` scenes and their drawings [n, 3, SIDE, SIDE] in 0..1."""
        scenes = self.rng.choices(self.scenes, k=n)
        jitter = Jitter.random(n, self.generator)
        return scenes, render(scenes, jitter, self.generator.device)

    def __call__(self, n: int) -> Tensor:
        return self.pick(n)[1]


def _new(config: Config) -> AutoencoderKL:
    blocks = len(config.vae_channels)
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=config.latent_channels,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _loss(vae: AutoencoderKL, images: Tensor, kl_weight: float) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    latent_size = posterior.mean[0].numel()
    divergence = posterior.kl().float().mean() / latent_size
    return error.abs().mean() + error.square().mean() + kl_weight * divergence


@torch.no_grad()
def _whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1, by folding both into the 1x1 convolutions.

    The decoder's side is changed to match, so decoded images stay as they were; the pipelines
    then need no scaling factor, and the edit pipeline, which never scales, sees the same units.
    """
    mode = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])
    mean, deviation = mode.mean((0, 2, 3)), mode.std((0, 2, 3))
    _fold_out(vae.post_quant_conv, mean, deviation)
    _fold_in(vae.quant_conv, mean, deviation)


def _fold_in(conv: nn.Conv2d, mean: Tensor, deviation: Tensor) -> None:
    """Output rows hold the means, then the log-variances of the posterior."""
    n = len(mean)
    conv.bias[:n] = (conv.bias[:n] - mean) / deviation
    conv.weight[:n] /= deviation[:, None, None, None]
    conv.bias[n:] -= 2 * deviation.log()


def _fold_out(conv: nn.Conv2d, mean: Tensor, deviation: Tensor) -> None:
    conv.bias += conv.weight[:, :, 0, 0] @ mean
    conv.weight *= deviation[None, :, None, None]
