from __future__ import annotations

from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from families.facts import MROPE, Family, Images
from families.qwen2_5_vl import IDS, processor
from families.qwen2_5_vl import video as timed_video


def config(text: dict) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        text_config={"rope_parameters": MROPE, **text},
        vision_config=dict(
            depth=2,
            embed_dim=16,
            hidden_size=text["hidden_size"],
            mlp_ratio=2,
            num_heads=2,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        **IDS,
    )


def video(videos: Images) -> tuple[list[int], dict[str, Tensor]]:
    ids, inputs = timed_video(videos)
    return ids, {name: value for name, value in inputs.items() if name != "second_per_grid_ts"}


FAMILY = Family(
    Qwen2VLForConditionalGeneration, config, processor, "model.visual", video=video, mrope=True, bare_images=False
)
