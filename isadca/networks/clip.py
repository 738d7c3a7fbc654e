"""CLIP's text and image encoders (pre-norm transformers). Names are transformers' checkpoint keys.

References: CLIP, arXiv 2103.00020; OpenCLIP. Shapes: B rows, L tokens, W width, P projection width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from .layers import merge_heads, split_heads
from .sizes import CLIPTextConfig, CLIPVisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's activation; OpenCLIP's is the exact GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attend(q, k, v, causal=causal)))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = SelfAttention(config.width, config.n_heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, config.mlp_width, config.act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def clip_encoder(config) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))})


class CLIPText(nn.Module):
    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(config.vocab_size, config.width),
                "position_embedding": nn.Embedding(config.max_tokens, config.width)}),
            "encoder": clip_encoder(config),
            "final_layer_norm": nn.LayerNorm(config.width, eps=config.eps)})
        if config.projection_dim:
            self.text_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The context that Stable Diffusion conditions on: every token's last hidden state, normed.

        ids (B,L) -> (B,L,W). The padding is not masked: SD1.x was trained that way.
        """
        model, embeddings = self.text_model, self.text_model["embeddings"]
        positions = embeddings["position_embedding"].weight[: ids.shape[1]]
        x = embeddings["token_embedding"](ids) + positions  # (B,L) -> (B,L,W)
        for layer in model["encoder"]["layers"]:
            x = layer(x, causal=True)
        return model["final_layer_norm"](x)

    def embed(self, ids: Tensor) -> Tensor:
        """CLIP's text embedding (B,P), not normalised: the state at the FIRST end-of-text token, projected.

        The end-of-text id is the vocabulary's last, whatever config.json's eos_token_id says (SD1.5's says 2).
        """
        first_eos = (ids == self.config.vocab_size - 1).int().argmax(dim=1)
        pooled = self(ids)[torch.arange(len(ids), device=ids.device), first_eos]
        return self.text_projection(pooled)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        n_patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding(n_patches + 1, config.width)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (B,3,S,S) -> (B,n,W)
        cls = self.class_embedding.expand(len(x), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class CLIPVision(nn.Module):
    def __init__(self, config: CLIPVisionConfig = CLIPVisionConfig()):
        super().__init__()
        self.config = config
        self.vision_model = nn.ModuleDict({
            "embeddings": VisionEmbeddings(config),
            "pre_layrnorm": nn.LayerNorm(config.width, eps=config.eps),  # (sic) the published key
            "encoder": clip_encoder(config),
            "post_layernorm": nn.LayerNorm(config.width, eps=config.eps)})
        self.visual_projection = nn.Linear(config.width, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP-normalised pixels (B,3,S,S) -> the image embedding (B,P), not L2-normalised, and the hidden states
        before the last layer (B,1+n,W), which IP-Adapter's plus and full-face variants read."""
        model = self.vision_model
        x = model["pre_layrnorm"](model["embeddings"](pixels))
        for layer in model["encoder"]["layers"]:
            penultimate, x = x, layer(x, causal=False)
        return self.visual_projection(model["post_layernorm"](x[:, 0])), penultimate
