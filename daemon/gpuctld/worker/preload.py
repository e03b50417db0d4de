"""What the fork server imports once, so that a worker starts in a fraction of a second.

Imported by name in the fork server only. Nothing here may touch CUDA: a child could not
initialise it again.
"""

from __future__ import annotations

import contextlib
import os

# Before torch: ask NVML instead of CUDA how many GPUs there are.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import diffusers
import torch  # noqa: F401
import transformers
from diffusers import DiffusionPipeline  # noqa: F401
from transformers import CLIPTextModel, PreTrainedTokenizerFast  # noqa: F401

from gpuctld.worker import main  # noqa: F401

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Newer versions of transformers compile 900 patterns at a process's first load of a model: 0.3 s.
with contextlib.suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("clip")
