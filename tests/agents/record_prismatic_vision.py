"""Write prismatic_vision.safetensors: timm's own outputs of two tiny towers, for test_prismatic_vision.py.

    python tests/agents/record_prismatic_vision.py

It needs timm (1.0.31 made the committed file), which nothing else here does.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
TOWERS = {
    "featurizer": ("vit_large_patch14_reg4_dinov2.lvd142m", {"mlp_ratio": 4.0}),
    "fused_featurizer": ("vit_so400m_patch14_siglip_224", {"mlp_ratio": 3.7362}),
}


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    recorded, patches = {"pictures": pictures}, []
    for name, (model, options) in TOWERS.items():
        tower = timm.create_model(model, pretrained=False, **SIZES, **options).eval()
        for parameter in tower.parameters():  # fresh weights leave the scales, norms and registers at their start
            parameter.add_(torch.randn_like(parameter) * 0.2)
        data = timm.data.resolve_data_config(tower.pretrained_cfg)
        mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
        pixels = (pictures.movedim(-1, 1).float() / 255 - mean) / std
        patches += tower.get_intermediate_layers(pixels, n={len(tower.blocks) - 2})
        weights = {key.replace(".gamma", ".scale_factor"): value for key, value in tower.state_dict().items()}
        recorded |= {f"{name}.{key}": value.contiguous() for key, value in weights.items()}
    recorded["patches"] = torch.cat(patches, dim=2)
    save_file(recorded, Path(__file__).with_name("prismatic_vision.safetensors"))


if __name__ == "__main__":
    main()
