"""Pipelines of many families, a few thousand weights each, made from configuration.

Every function returns a pipeline with random weights; :data:`FAMILIES` has, for each, what to call
it with. Prompts go through the text encoder as token numbers, so that its weights matter to the
picture and no tokenizer's vocabulary is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import attrs
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.fakes.tiny_models import WIDTH, text_encoder, unet, vae

WORDS = 40
SIDE = 32
"""Of pictures, in pixels."""

Pipeline = Any
Inputs = dict[str, Any]


@attrs.frozen
class Family:
    """How to make a pipeline of it, and how to call one."""

    build: Callable[[], Pipeline]
    inputs: Callable[[Pipeline], Inputs]


def render(name: str, pipeline: Pipeline) -> torch.Tensor:
    """A seeded picture or video, as floats."""
    pipeline.set_progress_bar_config(disable=True)
    device = _device(pipeline)
    with torch.no_grad():
        inputs = {"num_inference_steps": 2, **FAMILIES[name].inputs(pipeline)}
        generator = torch.Generator(device).manual_seed(11)
        with mock.patch.object(pipeline_qwenimage_edit, "calculate_dimensions", _small):
            made = pipeline(**inputs, generator=generator, output_type="pt")
    return (made.frames if hasattr(made, "frames") else made.images).float().cpu()


def _small(*_: float) -> tuple[int, int, None]:
    """QwenImageEdit scales what it edits to a megapixel: seconds of a CPU for each picture."""
    return SIDE, SIDE, None


def _device(pipeline: Pipeline) -> torch.device:
    """Where the weights are; ``pipeline.device`` asks the same."""
    return torch.device(pipeline.device)


# --- parts ------------------------------------------------------------------------------------


def _tokenizer() -> PreTrainedTokenizerFast:
    """Part of every saved pipeline; nobody asks it anything."""
    words = {f"w{number}": number for number in range(WORDS)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def _clip(cls: type = CLIPTextModel) -> Any:
    return text_encoder(WORDS, cls)


def _t5_sizes() -> dict[str, int]:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH}
    return {"vocab_size": WORDS, "num_layers": 1, "num_heads": 2, **sizes}


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5_sizes()))


def _umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_t5_sizes()))


def _decoder_sizes() -> dict[str, int]:
    return {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }


def _gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**_decoder_sizes()))


def _qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**_decoder_sizes()))


def _qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e6, "rope_type": "default"}
    text = {**_decoder_sizes(), "rope_parameters": rope, "tie_word_embeddings": True}
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def _video_vae(cls: type) -> Any:
    return cls(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _hidden(encoder: Any, tokens: int = 16) -> torch.Tensor:
    """What an encoder says of a fixed text; 1 x tokens x width."""
    numbers = (torch.arange(tokens, device=encoder.device) * 7 + 2).remainder(WORDS)[None]
    return encoder(numbers, output_hidden_states=True).hidden_states[-1]


def _pooled(encoder: Any) -> torch.Tensor:
    """What a CLIP encoder says of it in one vector."""
    numbers = torch.arange(16, device=encoder.device)[None]
    made = encoder(numbers)
    return made.text_embeds if hasattr(made, "text_embeds") else made.pooler_output


def _mask(hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _size() -> Inputs:
    return {"height": SIDE, "width": SIDE}


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")


# --- U-Nets -----------------------------------------------------------------------------------


def stable_diffusion() -> Pipeline:
    return StableDiffusionPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_clip(),
        unet=unet(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_inputs(pipeline: Pipeline) -> Inputs:
    hidden = _hidden(pipeline.text_encoder)
    return {"prompt_embeds": hidden, "negative_prompt_embeds": -hidden, **_size()}


def sdxl() -> Pipeline:
    network = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        text_encoder=_clip(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        unet=network,
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def _sdxl_inputs(pipeline: Pipeline) -> Inputs:
    both = (_hidden(pipeline.text_encoder), _hidden(pipeline.text_encoder_2))
    pooled = _pooled(pipeline.text_encoder_2)
    return {
        "prompt_embeds": torch.cat(both, dim=-1),
        "pooled_prompt_embeds": pooled,
        "guidance_scale": 1.0,
        **_size(),
    }


# --- transformers -----------------------------------------------------------------------------


def sd3() -> Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=_t5(),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=_tokenizer(),
    )


def _sd3_inputs(pipeline: Pipeline) -> Inputs:
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    words = [_hidden(encoder) for encoder in (*encoders, pipeline.text_encoder_3)]
    return {
        "prompt_embeds": torch.cat(words, dim=1),
        "pooled_prompt_embeds": torch.cat([_pooled(each) for each in encoders], dim=-1),
        "guidance_scale": 1.0,
        **_size(),
    }


def _flux(cls: type) -> Pipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
        transformer=transformer,
    )


def _flux_inputs(pipeline: Pipeline) -> Inputs:
    return {
        "prompt_embeds": _hidden(pipeline.text_encoder_2),
        "pooled_prompt_embeds": _pooled(pipeline.text_encoder),
        **_size(),
    }


def _kontext_inputs(pipeline: Pipeline) -> Inputs:
    area = {"max_area": SIDE * SIDE, "_auto_resize": False}
    return {**_flux_inputs(pipeline), **area, "image": _picture()}


def _qwen_image(cls: type, **more: Any) -> Pipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_video_vae(AutoencoderKLQwenImage),
        text_encoder=_qwen_vl(),
        tokenizer=_tokenizer(),
        transformer=transformer,
        **more,
    )


def _qwen_inputs(pipeline: Pipeline) -> Inputs:
    hidden = _hidden(pipeline.text_encoder)
    mask = {"prompt_embeds_mask": _mask(hidden)}
    return {"prompt_embeds": hidden, **mask, "true_cfg_scale": 1.0, **_size()}


def _qwen_edit_inputs(pipeline: Pipeline) -> Inputs:
    return {**_qwen_inputs(pipeline), "image": _picture()}


def z_image() -> Pipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=16, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=_qwen3(),
        tokenizer=_tokenizer(),
        transformer=transformer,
    )


def _z_image_inputs(pipeline: Pipeline) -> Inputs:
    words = [_hidden(pipeline.text_encoder)[0]]
    return {"prompt_embeds": words, "guidance_scale": 0.0, **_size()}


def pixart() -> Pipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        sample_size=SIDE // 8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def _masked_inputs(pipeline: Pipeline) -> Inputs:
    hidden = _hidden(pipeline.text_encoder)
    return {
        "prompt_embeds": hidden,
        "prompt_attention_mask": _mask(hidden),
        "negative_prompt": None,
        "guidance_scale": 1.0,
        **_size(),
    }


def _unbinned_inputs(pipeline: Pipeline) -> Inputs:
    return {**_masked_inputs(pipeline), "use_resolution_binning": False}


def sana() -> Pipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=SIDE // 8,
    )
    blocks: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        blocks |= {
            f"{side}_block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 8, 8, 8),
            f"{side}_layers_per_block": (1, 1, 1, 1),
            f"{side}_qkv_multiscales": ((), (), (), (5,)),
        }
    return SanaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_gemma(),
        vae=AutoencoderDC(latent_channels=4, attention_head_dim=4, **blocks),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def wan() -> Pipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=WIDTH,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_umt5(),
        vae=_video_vae(AutoencoderKLWan),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )


def _wan_inputs(pipeline: Pipeline) -> Inputs:
    hidden = _hidden(pipeline.text_encoder)
    return {"prompt_embeds": hidden, "guidance_scale": 1.0, "num_frames": 5, **_size()}


def aura_flow() -> Pipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=SIDE // 8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_umt5(),
        vae=vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def lumina() -> Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=SIDE // 8,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(64, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=_gemma(),
        tokenizer=_tokenizer(),
    )


FAMILIES: dict[str, Family] = {
    "StableDiffusion": Family(stable_diffusion, _stable_diffusion_inputs),
    "SDXL": Family(sdxl, _sdxl_inputs),
    "SD3": Family(sd3, _sd3_inputs),
    "Flux": Family(lambda: _flux(FluxPipeline), _flux_inputs),
    "FluxKontext": Family(lambda: _flux(FluxKontextPipeline), _kontext_inputs),
    "QwenImage": Family(lambda: _qwen_image(QwenImagePipeline), _qwen_inputs),
    "QwenImageEdit": Family(
        lambda: _qwen_image(QwenImageEditPipeline, processor=_tokenizer()), _qwen_edit_inputs
    ),
    "ZImage": Family(z_image, _z_image_inputs),
    "PixArt": Family(pixart, _unbinned_inputs),
    "Sana": Family(sana, _unbinned_inputs),
    "Wan": Family(wan, _wan_inputs),
    "AuraFlow": Family(aura_flow, _masked_inputs),
    "Lumina2": Family(lumina, _masked_inputs),
}
