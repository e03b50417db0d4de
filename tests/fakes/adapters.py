"""LoRA files with random values for pipelines of the families."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

FILE = "pytorch_lora_weights.safetensors"


def save(model: Path, folder: Path) -> Path:
    """Write an adapter of rank 4 for the pipeline in ``model`` to ``folder``; the file."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    module = getattr(pipeline, part)
    module.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.5)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(module)}
    pipeline.save_lora_weights(folder, **layers)
    return folder / FILE
