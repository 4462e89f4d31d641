"""The backbones, from pixels to [C3, C4, C5] at strides 8, 16 and 32 (paper Sec. 4.1).

    ResNet       torchvision's r18, r34, r50, r101; r101-dcn with deformable convolutions; r18-slim, half as wide
    Swin         torchvision's swin-t, swin-s, swin-b
    BatchNorm    statistics of the batch of all processes

Any other module that returns these maps and names their widths in `channels` works too: add it to BACKBONES.
formats/released.py converts weights from elsewhere.
"""
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.ops import FrozenBatchNorm2d, deform_conv2d


def make_backbone(name: str, frozen: bool, stride_in_1x1: bool = False) -> nn.Module:
    """One of BACKBONES with random weights. frozen: see ResNet and Swin; stride_in_1x1: ResNet only.

    Raises ValueError if there is no such name.
    """
    if name not in BACKBONES:
        raise ValueError(f"there is no backbone {name!r} here; if you added it, run the script that does")
    return BACKBONES[name](name, frozen, **{"stride_in_1x1": True} if stride_in_1x1 else {})


# -------------------------------------------------------------------------------------------------- ResNet


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's as one operation, in the precision of its input.

    Theirs turns the maps of a bfloat16 step into float32: ResNet-50 then keeps 113 instead of 68 MiB for an image of
    320 x 320. One operation instead of two takes 3 % less time for forward and backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


DEPTHS = {"r18": (BasicBlock, [2, 2, 2, 2]), "r34": (BasicBlock, [3, 4, 6, 3]), "r50": (Bottleneck, [3, 4, 6, 3]),
          "r101": (Bottleneck, [3, 4, 23, 3])}  # blocks of each stage


class ResNet(nn.Module):
    """torchvision's ResNet up to C5; forward returns [C3, C4, C5].

    frozen: batch norm, stem and first stage are constant, the recipe for ImageNet weights. Otherwise everything learns.
    stride_in_1x1: the stages halve the map in their first 1x1 convolution, as MSRA's weights need, not in the 3x3.
    """

    def __init__(self, name: str, frozen: bool, stride_in_1x1: bool = False):
        super().__init__()
        norm = FrozenBatchNorm if frozen else BatchNorm
        if name == "r18-slim":
            net = slim_resnet18(norm)
        else:
            net = resnet.ResNet(*DEPTHS[name.removesuffix("-dcn")], norm_layer=norm)
        stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.body = nn.ModuleDict({"stem": stem, "c2": net.layer1, "c3": net.layer2, "c4": net.layer3,
                                   "c5": net.layer4})
        for level in ("c3", "c4", "c5"):
            if stride_in_1x1:
                first = self.body[level][0]
                first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
            if name.endswith("-dcn"):
                for block in self.body[level]:
                    block.conv2 = DeformConv(block.conv2)
        self.channels = [self.body[level][0].downsample[0].out_channels for level in ("c3", "c4", "c5")]
        if frozen:
            self.body["stem"].requires_grad_(False)
            self.body["c2"].requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.body.values():
            x = stage(x)
            maps.append(x)
        return maps[2:]


class DeformConv(nn.Conv2d):
    """A 3x3 convolution with learnt positions and weights of its nine taps (Deformable ConvNets v2, Sec. 3.2).

    `offset` has 27 channels: (dy, dx) of each tap in cells, then the logits of the taps' weights. All are zero at the
    start: regular positions, weight 1/2.
    """

    def __init__(self, plain: nn.Conv2d):
        super().__init__(plain.in_channels, plain.out_channels, 3, plain.stride, padding=1, bias=False)
        self.weight = plain.weight
        self.offset = nn.Conv2d(plain.in_channels, 27, 3, plain.stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has too few digits for sampling positions
            x = x.float()
            offset, modulation = self.offset(x).split([18, 9], dim=1)
            return deform_conv2d(x, offset, self.weight, None, self.stride, self.padding, mask=modulation.sigmoid())


def slim_resnet18(norm) -> nn.Module:
    """ResNet-18 at half its width, 32 to 256 channels: small enough to learn from scratch on a CPU."""

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut = None
        if inputs != outputs:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm),
                             BasicBlock(outputs, outputs, norm_layer=norm))

    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), norm(32)
    net.layer1, net.layer2 = stage(32, 32, 1), stage(32, 64, 2)
    net.layer3, net.layer4 = stage(64, 128, 2), stage(128, 256, 2)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


# ---------------------------------------------------------------------------------------------------- Swin


SWINS = {"swin-t": (96, (2, 2, 6, 2)), "swin-s": (96, (2, 2, 18, 2)), "swin-b": (128, (2, 2, 18, 2))}  # width, depths
WINDOW = 7


class Swin(nn.Module):
    """torchvision's Swin Transformer with a LayerNorm for each output; forward returns [C3, C4, C5].

    frozen: patch embedding, first stage and the merging after it are constant. Stochastic depth rises to 0.2.
    """

    def __init__(self, name: str, frozen: bool):
        super().__init__()
        width, depths = SWINS[name]
        heads = [width * 2 ** stage // 32 for stage in range(4)]
        block = partial(SwinTransformerBlock, attn_layer=WindowAttention)
        self.features = SwinTransformer([4, 4], width, list(depths), heads, [WINDOW, WINDOW],
                                        stochastic_depth_prob=0.2, num_classes=1, block=block).features
        self.channels = [2 * width, 4 * width, 8 * width]
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        if frozen:
            self.features[:3].requires_grad_(False)
            for block in self.features[1]:
                block.stochastic_depth.p = 0.0

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = []
        for i, layer in enumerate(self.features):  # patches, stage 1, merging, stage 2, ..., stage 4
            x = layer(x)                           # (B, H, W, C)
            if i in (3, 5, 7):
                stages.append(x)
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, stages)]


class WindowAttention(ShiftedWindowAttention):
    """torchvision's, but a map of a single window is shifted too, as in the authors' program."""

    def define_relative_position_index(self) -> None:
        super().define_relative_position_index()
        # not persistent: checkpoints hold no constants
        self.register_buffer("relative_position_index", self.relative_position_index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C): attention within windows of 7x7 cells, in odd blocks shifted by 3 (Swin Sec. 3.2)."""
        (_, height, width, c), n, shift = x.shape, WINDOW, self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n)).roll((-shift, -shift), (1, 2))
        h, w = x.shape[1:3]
        qkv = self.qkv(to_windows(x)).unflatten(-1, (3, self.num_heads, c // self.num_heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)                                  # each (B, windows, heads, 49, C')
        bias = self.get_relative_position_bias()                                 # (1, heads, 49, 49)
        if shift:  # the roll joined the first rows and columns to the last: no attention between them
            row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
            row, column = (row >= h - n).int() + (row >= h - shift), (column >= w - n).int() + (column >= w - shift)
            region = to_windows((3 * row[:, None] + column)[None, ..., None])[0]  # (windows, 49, 1)
            bias = bias - 100.0 * (region != region.transpose(1, 2))[:, None]    # (windows, heads, 49, 49)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = self.proj(x.transpose(2, 3).flatten(3))                              # (B, windows, 49, C)
        x = x.unflatten(1, (h // n, w // n)).unflatten(3, (n, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.roll((shift, shift), (1, 2))[:, :height, :width]


def to_windows(x: Tensor) -> Tensor:
    """(B, h, w, C) to (B, windows, 49, C), windows and cells row by row."""
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)  # (B, rows, columns, 7, 7, C)
    return x.flatten(3, 4).flatten(1, 2)


# ------------------------------------------------------------------------------------- batch normalisation


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Each process's loss depends on it, so gradients are summed too.

    torch.distributed.nn.functional.all_reduce does the same, but torch 2.14 warns that it is deprecated.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverProcesses.apply(gradient)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the batch of all processes; on one process, nn.BatchNorm2d.

    torch.nn.SyncBatchNorm does the same, but on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            # contiguous: torch's CPU kernel for channels-last maps sums cell by cell in float32, an error of 1e-5
            return super().forward(x.contiguous() if self.training and x.device.type == "cpu" else x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        n = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)
        total, local_mean = SumOverProcesses.apply(torch.cat([n, n * mean])), mean
        # squares about the common mean: E[x^2] - E[x]^2 loses a small variance to rounding
        mean = total[1:] / total[0]
        var = SumOverProcesses.apply(n * (var + (local_mean - mean).square())) / total[0]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total[0] / (total[0] - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


# -------------------------------------------------------------------------------------------- all backbones


BACKBONES = dict.fromkeys(("r18-slim", "r18", "r34", "r50", "r101", "r101-dcn"), ResNet) | dict.fromkeys(SWINS, Swin)
