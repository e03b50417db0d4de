"""Every number that decides what comes out of a training run."""

import attrs


@attrs.frozen
class Schedule:
    """How long one network learns: whichever of `steps` and `seconds` is used up first."""

    steps: int
    seconds: float
    batch: int
    rate: float
    warmup: int = 200


@attrs.frozen
class Config:
    """One training run."""

    seed: int = 20260
    variants: int = 16
    """Jittered drawings per scene whose latents the denoisers learn from."""
    captions: int = 24
    """Captions per scene, and instructions per possible edit below."""
    instructions: int = 2
    vae: Schedule = Schedule(steps=4000, seconds=50, batch=128, rate=1e-3)
    denoisers: Schedule = Schedule(steps=20000, seconds=250, batch=512, rate=1e-3)
    scorer: Schedule = Schedule(steps=3000, seconds=20, batch=256, rate=2e-3)
    vae_channels: tuple[int, ...] = (24, 40, 56)
    latent_channels: int = 4
    kl_weight: float = 5e-4
    unet_channels: tuple[int, ...] = (48, 64, 80)
    unet_heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    caption_dropout: float = 0.1
    image_dropout: float = 0.1
    image_noise: float = 0.05
    """Noise on the latents of the image to edit, so that generated images can be edited too."""
    ema: float = 0.999
    prompts: int = 500
    """Held-out prompts of the evaluation, and held-out edits per category below."""
    edits: int = 200


FULL = Config()

TINY = Config(
    variants=1,
    captions=2,
    instructions=1,
    vae=Schedule(steps=3, seconds=20, batch=8, rate=1e-3, warmup=1),
    denoisers=Schedule(steps=3, seconds=20, batch=8, rate=1e-3, warmup=1),
    scorer=Schedule(steps=3, seconds=20, batch=8, rate=1e-3, warmup=1),
    prompts=4,
    edits=2,
)
"""Goes through every stage in seconds; what it makes is noise."""

PRESETS = {"full": FULL, "tiny": TINY}
EVALUATION_SEED = 7
EVALUATION_BATCH = 100
