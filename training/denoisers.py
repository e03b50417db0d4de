"""The text encoder and the two UNets, learned together.

One text encoder serves both pipelines, so it must understand captions and instructions alike:
each step adds the loss of a batch of pictures to that of a batch of edits.
"""

import attrs
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gpuctl_demo.scenes import LONGEST_TEXT
from training.config import Config
from training.dataset import Edits, Pictures, tokenize
from training.learning import learn


@attrs.frozen
class Denoisers:
    """The three networks that learn from pictures and edits."""

    text_encoder: CLIPTextModel
    text_to_image: UNet2DConditionModel
    edit: UNet2DConditionModel

    @property
    def modules(self) -> list[nn.Module]:
        """All three, in a fixed order."""
        return [self.text_encoder, self.text_to_image, self.edit]


def scheduler() -> DDIMScheduler:
    """Velocity prediction down to pure noise: flat backgrounds need a terminal SNR of zero.

    After Lin et al., "Common diffusion noise schedules and sample steps are flawed" (2024).
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def new(config: Config, tokenizer: CLIPTokenizer) -> Denoisers:
    """Untrained networks, the same for a seed."""
    torch.manual_seed(config.seed)
    return Denoisers(
        _text_encoder(config, tokenizer),
        _unet(config, config.latent_channels),
        _unet(config, 2 * config.latent_channels),
    )


def train(
    config: Config,
    nets: Denoisers,
    pictures: Pictures,
    edits: Edits,
    tokenizer: CLIPTokenizer,
) -> int:
    """Trains the networks where they are; returns the number of steps."""
    device = pictures.latents.device
    torch.manual_seed(config.seed)
    batches = Batches(config, pictures, edits, tokenize(tokenizer, [""], device))
    for unet in (nets.text_to_image, nets.edit):
        unet.to(device, memory_format=torch.channels_last).train()
    nets.text_encoder.to(device).train()
    alphas = scheduler().alphas_cumprod.to(device)
    learners = _compiled(nets) if device.type == "cuda" else nets

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return _loss(learners, batches, alphas)

    return learn("denoisers", nets.modules, loss, config.denoisers, config.ema)


def _compiled(nets: Denoisers) -> Denoisers:
    """The same parameters behind fused kernels: networks this small wait for launches otherwise."""
    return Denoisers(nets.text_encoder, torch.compile(nets.text_to_image), torch.compile(nets.edit))


@attrs.frozen
class Batches:
    """Random batches, with captions and images left out now and then for guidance."""

    config: Config
    pictures: Pictures
    edits: Edits
    silence: Tensor

    def text_to_image(self) -> tuple[Tensor, Tensor]:
        """Clean latents and the tokens that describe them."""
        scene = self._below(len(self.pictures.latents))
        variant = self._below(self.pictures.latents.shape[1])
        words = self.pictures.captions[scene, self._below(self.pictures.captions.shape[1])]
        return self.pictures.latents[scene, variant], self._drop_words(words)

    def edit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents after the edit, the tokens that ask for it, and the latents before."""
        category = self._below(len(self.edits.starts))
        within = torch.rand(category.shape, device=category.device) * self.edits.counts[category]
        chosen = self.edits.starts[category] + within.long()
        variant = self._below(self.pictures.latents.shape[1])
        before = self.pictures.latents[self.edits.before[chosen], variant]
        after = self.pictures.latents[self.edits.after[chosen], variant]
        before = before + self.config.image_noise * torch.randn_like(before)
        shown = self._chance(1 - self.config.image_dropout)[:, None, None, None]
        return after, self._drop_words(self.edits.instructions[chosen]), before * shown

    def _below(self, limit: int) -> Tensor:
        size = (self.config.denoisers.batch,)
        return torch.randint(limit, size, device=self.silence.device)

    def _chance(self, probability: float) -> Tensor:
        return torch.rand(self.config.denoisers.batch, device=self.silence.device) < probability

    def _drop_words(self, words: Tensor) -> Tensor:
        dropped = self._chance(self.config.caption_dropout)
        return torch.where(dropped[:, None], self.silence, words)


def _loss(nets: Denoisers, batches: Batches, alphas: Tensor) -> Tensor:
    pictures, captions = batches.text_to_image()
    after, instructions, before = batches.edit()
    words = nets.text_encoder(torch.cat([captions, instructions]))[0]
    captions, instructions = words.chunk(2)
    plain = _velocity_loss(nets.text_to_image, pictures, captions, None, alphas)
    return plain + _velocity_loss(nets.edit, after, instructions, before, alphas)


def _velocity_loss(
    unet: UNet2DConditionModel, clean: Tensor, words: Tensor, image: Tensor | None, alphas: Tensor
) -> Tensor:
    """Mean square error of the predicted velocity; the image to edit goes in as more channels."""
    when = torch.randint(len(alphas), clean.shape[:1], device=clean.device)
    signal, spread = alphas[when].sqrt(), (1 - alphas[when]).sqrt()
    signal, spread = signal[:, None, None, None], spread[:, None, None, None]
    noise = torch.randn_like(clean)
    noisy = signal * clean + spread * noise
    seen = noisy if image is None else torch.cat([noisy, image], dim=1)
    seen = seen.contiguous(memory_format=torch.channels_last)
    velocity = unet(seen, when, encoder_hidden_states=words).sample
    return nn.functional.mse_loss(velocity.float(), signal * noise - spread * clean)


def _text_encoder(config: Config, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=LONGEST_TEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=config.text_width,
        )
    )


def _unet(config: Config, in_channels: int) -> UNet2DConditionModel:
    """Attention to the words at 8 x 8 and 4 x 4 only: at 16 x 16 it costs more than it gives."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=config.latent_channels,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=config.unet_heads,
        cross_attention_dim=config.text_width,
        norm_num_groups=16,
    )
