"""SD1.5 at its true shapes with random weights, 7 GB: enough for time and memory. For benchmark.py."""

import json
import sys
from pathlib import Path

from gpu import adapter_shapes
from safetensors.torch import save_file

from isadca.loading.load import default_weights
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.ip_adapter import IPAdapter
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_demo"))
from demo_files import config_json, save_pipeline  # noqa: E402


def random_sd15(folder: Path) -> Path:
    """A folder in SD1.5's layout, with an IP-Adapter and its image encoder; written once."""
    if (folder / "model_index.json").exists():
        return folder
    networks = {"unet": (UNet, UNetConfig()), "vae": (VAE, VAEConfig()), "text_encoder": (CLIPText, CLIPTextConfig()),
                "image_encoder": (CLIPVision, CLIPVisionConfig())}
    for name, (cls, config) in networks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        net = cls(config)
        file = "diffusion_pytorch_model" if name in ("unet", "vae") else "model"
        save_file({key: x.contiguous() for key, x in net.state_dict().items()}, folder / name / f"{file}.safetensors")
        settings = config_json(config) | ({"norm_num_groups": 32} if name in ("unet", "vae") else {})
        (folder / name / "config.json").write_text(json.dumps(settings))
        if name == "unet":
            adapter = IPAdapter(adapter_shapes(net, embed_dim=1024))
            save_file(adapter.state_dict(), folder / "ip-adapter_sd15.safetensors")
        del net
    tokenizer = default_weights().parent / "tokenizer"
    (folder / "tokenizer").mkdir(exist_ok=True)
    for file in tokenizer.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    save_pipeline(folder)
    return folder
