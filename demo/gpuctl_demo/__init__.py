"""The model that ships with gpuctl, the drawings it learned from, and its scorer."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"

STEPS = 10
"""Denoising steps of the demo, and the guidance of its calls: what the figures are measured at."""
GUIDANCE = 1.5
IMAGE_GUIDANCE = 1.0


def model_path(name: str) -> Path:
    """Where a shipped model lies: `shapes` (text to image), `shapes-edit` or `scorer`.

    Raises:
        FileNotFoundError: the installation lacks that file; the message names it.
    """
    path = MODELS / ("scorer.safetensors" if name == "scorer" else name)
    needed = path / "model_index.json" if path.suffix == "" else path
    if not needed.is_file():
        raise FileNotFoundError(f"{needed} is missing: gpuctl was installed without its demo model")
    return path
