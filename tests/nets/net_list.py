"""The nets of docs/nets.md: each from its package's own code, at small sizes, with random weights, and its input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hodec.compare import tensors_in
from hodec.inputs import as_input

Loss = Callable[[nn.Module, Any], Tensor]


def to_noise(net: nn.Module, x: Any) -> Tensor:
    """Mean squared distance of all that a net gives from fixed noise: a loss that any net has."""
    noise = torch.Generator().manual_seed(1)
    given = [y for y in tensors_in(as_input(x, net).run(net)) if y.is_floating_point()]
    return sum((y - torch.randn(y.shape, generator=noise)).square().mean() for y in given)


@dataclass(frozen=True)
class Net:
    """One row of the page.

    Attributes:
        group: heading of the page that it stands under.
        packages: what has to be installed.
        about: which variant it is, in words.
        build: draws its weights from the global generator.
        example: its input, batch first, as ``make_plan`` takes.
        loss: of the training step; it need not mean anything.
    """

    group: str
    packages: tuple[str, ...]
    about: str
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    loss: Loss = to_noise

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def images(side: int, *, batch: int = 2, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, side, side)


def tokens(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(3, 90, (batch, length))


# -- timm ------------------------------------------------------------------------------------------------------------


def timm_net(variant: str, side: int = 64, **sizes: Any) -> Net:
    def build() -> nn.Module:
        import timm

        return timm.create_model(variant, pretrained=False, num_classes=100, **sizes)

    given = ", ".join(f"{key} {value}" for key, value in sizes.items() if key != "img_size")
    about = f"`{variant}`" + (f", {given}" if given else "")
    return Net("timm", ("timm",), f"{about}; {side} x {side}", build, images(side))


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=100, img_size=64, patch_size=8, num_blocks=3, embed_dim=96)


TIMM = {
    "resnet": timm_net("resnet18"),
    "resnext": timm_net("resnext26ts"),
    "convnext": timm_net("convnext_atto", depths=(1, 1, 2, 1)),
    "efficientnetv2": timm_net("tf_efficientnetv2_b0"),
    "mobilenetv4": timm_net("mobilenetv4_conv_small"),
    "regnet": timm_net("regnety_002", depth=7),
    "densenet": timm_net("densenet121", block_config=(2, 3, 3, 2)),
    "nfnet": timm_net("nfnet_l0", depths=(1, 1, 1, 1), channels=(256, 256, 512, 512)),
    "swin": timm_net(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2), num_heads=(2, 4)
    ),
    "vit": timm_net("vit_tiny_patch16_224", img_size=64, depth=3),
    "maxvit": timm_net("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1, 1, 1)),
    "mixer": Net("timm", ("timm",), "`MlpMixer`, 3 blocks of width 96; 64 x 64", mixer, images(64)),
}

# -- transformers ----------------------------------------------------------------------------------------------------

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**WIDTHS, "vocab_size": 99}
PICTURES = {**WIDTHS, "image_size": 32, "patch_size": 8}


def of_transformers(cls: str, config: str, settings: Mapping[str, Any], example: Callable[[], Any]) -> Net:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, cls)(getattr(transformers, config)(**settings))

    return Net("transformers", ("transformers",), f"`{cls}`", build, example)


def clip() -> nn.Module:
    import transformers as t

    text = t.CLIPTextConfig(**TEXT, max_position_embeddings=16, bos_token_id=1, eos_token_id=98)
    vision = t.CLIPVisionConfig(**PICTURES)
    return t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32))


def ids(**more: Callable[[], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": tokens(), **{key: make() for key, make in more.items()}}


NO_CACHE = {"use_cache": False}
WHISPER = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 20,
    "max_target_positions": 16, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, **NO_CACHE,
}  # fmt: skip
WAV2VEC2 = {
    **WIDTHS, "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32,
    "mask_time_prob": 0.0,
}  # fmt: skip

TRANSFORMERS = {
    "BERT": of_transformers(
        "BertForMaskedLM", "BertConfig", TEXT, ids(attention_mask=lambda: torch.ones(2, 12).long())
    ),
    "GPT-2": of_transformers(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
         "eos_token_id": 2, **NO_CACHE},
        ids(),
    ),
    "Llama (GQA)": of_transformers(
        "LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2, **NO_CACHE}, ids()
    ),
    "Mixtral": of_transformers(
        "MixtralForCausalLM", "MixtralConfig",
        {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4, **NO_CACHE}, ids(),
    ),
    "ViT": of_transformers(
        "ViTForImageClassification", "ViTConfig", PICTURES, lambda: {"pixel_values": images(32)()}
    ),
    "DINOv2": of_transformers("Dinov2Model", "Dinov2Config", PICTURES, lambda: {"pixel_values": images(32)()}),
    "CLIP": Net("transformers", ("transformers",), "`CLIPModel`", clip, ids(pixel_values=images(32))),
    "T5": of_transformers(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, **NO_CACHE},
        ids(decoder_input_ids=lambda: tokens(6)),
    ),
    "Whisper": of_transformers(
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER,
        lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(6)},
    ),
    "wav2vec2": of_transformers(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2, lambda: {"input_values": torch.randn(2, 1600)}
    ),
    "Qwen": of_transformers(
        "Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 16, **NO_CACHE}, ids()
    ),
    "Mamba": of_transformers(
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **NO_CACHE}, ids(),
    ),
}  # fmt: skip

# -- torchvision: detection, segmentation, video ---------------------------------------------------------------------

BARE = {"weights": None, "weights_backbone": None}


def torchvision_net(
    about: str, group: str, settings: Mapping[str, Any], example: Callable[[], Any], **more: Any
) -> Net:
    def build() -> nn.Module:
        import torchvision.models as models

        home = models
        *rooms, name = about.split(".")
        for room in rooms:
            home = getattr(home, room)
        return getattr(home, name)(**settings)

    return Net(group, ("torchvision",), f"`{about.rpartition('.')[2]}`", build, example, **more)


def pictures() -> tuple[list[Tensor]]:
    return ([torch.rand(3, 96, 96), torch.rand(3, 80, 112)],)


def detection_loss(net: nn.Module, x: tuple[list[Tensor]]) -> Tensor:
    """The losses of a detector for one object a picture."""
    found = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])} for _ in x[0]]
    return sum(net(x[0], found).values())


DETECTION = {**BARE, "num_classes": 5, "min_size": 96, "max_size": 128}
TORCHVISION = {
    # every box is kept, or random nets would give none: outputs that cannot differ
    "fasterrcnn": torchvision_net(
        "detection.fasterrcnn_mobilenet_v3_large_320_fpn", "torchvision",
        {**DETECTION, "box_score_thresh": 0.0, "box_detections_per_img": 8}, pictures, loss=detection_loss,
    ),
    "retinanet": torchvision_net(
        "detection.retinanet_resnet50_fpn", "torchvision",
        {**DETECTION, "score_thresh": 0.0, "detections_per_img": 8}, pictures, loss=detection_loss,
    ),
    "deeplabv3": torchvision_net(
        "segmentation.deeplabv3_mobilenet_v3_large", "torchvision", {**BARE, "num_classes": 5}, images(64)
    ),
    "lraspp": torchvision_net(
        "segmentation.lraspp_mobilenet_v3_large", "torchvision", {**BARE, "num_classes": 5}, images(64)
    ),
    "r3d": torchvision_net(
        "video.r3d_18", "torchvision", {"weights": None, "num_classes": 20}, lambda: torch.randn(2, 3, 4, 32, 32)
    ),
}  # fmt: skip

# -- the rest --------------------------------------------------------------------------------------------------------


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def noisy() -> dict[str, Tensor]:
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
    }


def monai_unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, channels=(8, 16, 32, 64), strides=(2, 2, 2), num_res_units=1)


class Recurrent(nn.Module):
    """Tokens -> embedding -> two recurrent layers -> a class."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.rnn = cell(64, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0][:, -1])


def recurrent(cell: type[nn.LSTM] | type[nn.GRU]) -> Net:
    about = f"`nn.Embedding`, two layers of `nn.{cell.__name__}`, `nn.Linear`"
    return Net("others", (), about, lambda: Recurrent(cell), lambda: tokens(16))


OTHERS = {
    "UNet (diffusers)": Net("others", ("diffusers",), "`UNet2DConditionModel`", diffusers_unet, noisy),
    "3-D UNet": Net(
        "others",
        ("monai",),
        "`UNet` of monai, 4 levels; 16 x 16 x 16",
        monai_unet,
        lambda: torch.randn(2, 1, 16, 16, 16),
    ),
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
}

NETS: dict[str, Net] = {**TIMM, **TRANSFORMERS, **TORCHVISION, **OTHERS}
PACKAGES = sorted({name for net in NETS.values() for name in net.packages})
