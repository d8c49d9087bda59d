"""Layers of many kinds, each trained as in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzz.zoo.entry import FEATURES, Around, dense_net, images, in_format, network, steps


class Mean(nn.Module):
    """Normalize over all dimensions from the second on."""

    def __init__(self, first: int = 2) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.first).mean(-1)


@network()
def dense(num_classes: int) -> nn.Module:
    return dense_net(num_classes)


@network(optim="adam")
def dense_by_adam(num_classes: int) -> nn.Module:
    return dense_net(num_classes)


@network(optim="adamw")
def dense_by_adamw(num_classes: int) -> nn.Module:
    return dense_net(num_classes)


@network(optim="lars")
def dense_by_lars(num_classes: int) -> nn.Module:
    return dense_net(num_classes)


@network()
def deep(num_classes: int) -> nn.Module:
    hidden = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ELU())]
    return nn.Sequential(nn.Linear(FEATURES, 16), *hidden, nn.Linear(16, num_classes))


@network()
def no_bias(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.Tanh(), nn.Linear(8, num_classes, bias=False))


@network()
def one_layer(num_classes: int) -> nn.Module:
    return nn.Linear(FEATURES, num_classes)


@network()
def conv1d(num_classes: int) -> nn.Module:
    layers = [nn.Conv1d(3, 6, 3, stride=2, padding=1), nn.SiLU(), nn.Conv1d(6, 6, 3, dilation=2, groups=3)]
    return nn.Sequential(nn.Unflatten(1, (3, 36)), *layers, Mean(), nn.Linear(6, num_classes))


@network()
def conv2d(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2, groups=4)]
    return nn.Sequential(images(), *layers, Mean(), nn.Linear(8, num_classes))


@network(optim="lars")
def separable(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 9, 3, groups=3, padding="same", padding_mode="circular"), nn.Conv2d(9, 5, 1), nn.Mish()]
    return nn.Sequential(images(), *layers, nn.Flatten(), nn.Linear(180, num_classes))


@network()
def conv3d(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (4, 3, 3, 3)), nn.Conv3d(4, 5, 2), nn.ReLU(), Mean(), nn.Linear(5, num_classes)
    )


@network()
def transposed_conv(num_classes: int) -> nn.Module:
    layers = [nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2)]
    return nn.Sequential(images(), *layers, Mean(), nn.Linear(4, num_classes))


@network()
def channels_last(num_classes: int) -> nn.Module:
    net = nn.Sequential(images(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), Mean(), nn.Linear(6, num_classes))
    return in_format(net, torch.channels_last)


@network()
def channels_last_3d(num_classes: int) -> nn.Module:
    net = nn.Sequential(nn.Unflatten(1, (4, 3, 3, 3)), nn.Conv3d(4, 5, 2), nn.ReLU(), Mean(), nn.Linear(5, num_classes))
    return in_format(net, torch.channels_last_3d)


@network()
def pooled(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2), nn.LPPool2d(2, 2, stride=1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(images(), *layers, nn.Flatten(), nn.Linear(6, num_classes))


@network()
def upsampled(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Upsample(scale_factor=1.5, mode="bilinear"), Mean()]
    return nn.Sequential(images(), *layers, nn.Linear(2, num_classes))


@network()
def unfolded(num_classes: int) -> nn.Module:
    layers = [nn.Unfold(3, stride=3), nn.Conv1d(27, 8, 1), nn.PReLU(8), nn.Flatten(), nn.Linear(32, num_classes)]
    return nn.Sequential(images(), *layers)


@network()
def gated(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 12), nn.GLU(), nn.Linear(6, 6), nn.Softmax(1), nn.Linear(6, num_classes))


@network()
def bilinear(num_classes: int) -> nn.Module:
    return Around(lambda net, x: net.pair(x[:, :20], x[:, 20:50]), pair=nn.Bilinear(20, 30, num_classes))


@network()
def einsum(num_classes: int) -> nn.Module:
    weight = nn.Parameter(torch.randn(9, 12, num_classes) / 10)
    return Around(lambda net, x: torch.einsum("nsf,sfc->nc", x.view(-1, 9, 12), net.weight), weight=weight)


def _tokens(x: Tensor) -> Tensor:
    return (x[:, :24] * 4).long().clamp(-8, 7) + 8


@network()
def embedding(num_classes: int) -> nn.Module:
    """Most of the 40 rows of the embedding are never used."""
    return Around(
        lambda net, x: net.head(net.table(_tokens(x)).mean(1)),
        table=nn.Embedding(40, 6, padding_idx=3),
        head=nn.Linear(6, num_classes),
    )


@network(refused="sparse")
def sparse_embedding(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.head(net.table(_tokens(x)).mean(1)),
        table=nn.Embedding(40, 6, sparse=True),
        head=nn.Linear(6, num_classes),
    )


@network()
def embedding_bag(num_classes: int) -> nn.Module:
    return Around(
        lambda net, x: net.head(net.table(_tokens(x))),
        table=nn.EmbeddingBag(16, 6, mode="sum"),
        head=nn.Linear(6, num_classes),
    )


class Last(nn.Module):
    """A recurrent layer's output at the last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0][:, -1]


@network()
def rnn(num_classes: int) -> nn.Module:
    layer = nn.RNN(12, 7, num_layers=2, nonlinearity="relu", batch_first=True)
    return nn.Sequential(steps(), Last(layer), nn.Linear(7, num_classes))


@network()
def lstm(num_classes: int) -> nn.Module:
    layer = nn.LSTM(12, 6, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
    return nn.Sequential(steps(), Last(layer), nn.Linear(8, num_classes))


@network()
def gru(num_classes: int) -> nn.Module:
    return nn.Sequential(steps(), Last(nn.GRU(12, 6, batch_first=True)), nn.Linear(6, num_classes))


@network()
def lstm_cell(num_classes: int) -> nn.Module:
    def forward(net: Any, x: Tensor) -> Any:
        state: Any = None
        for step in x.view(-1, 9, 12).unbind(1):
            state = net.cell(step, state)
        return net.head(state[0])

    return Around(forward, cell=nn.LSTMCell(12, 6), head=nn.Linear(6, num_classes))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return x + self.attention(x, x, x, need_weights=False)[0]


@network()
def attention(num_classes: int) -> nn.Module:
    return nn.Sequential(steps(), Attention(12), Mean(1), nn.Unflatten(0, (-1, 1)), nn.Linear(1, num_classes))


@network()
def transformer(num_classes: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(steps(), encoder, nn.Flatten(), nn.Linear(FEATURES, num_classes))


@network()
def packed_sequence(num_classes: int) -> nn.Module:
    """Sequences whose lengths depend on their first number."""

    def forward(net: Any, x: Tensor) -> Any:
        lengths = (x[:, 0] > 0).long().cpu() * 4 + 5
        packed = nn.utils.rnn.pack_padded_sequence(x.view(-1, 9, 12), lengths, batch_first=True, enforce_sorted=False)
        return net.head(net.layer(packed)[1][-1])

    return Around(forward, layer=nn.GRU(12, 6, batch_first=True), head=nn.Linear(6, num_classes))


@network()
def softmax_of_logits(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, num_classes), nn.LogSoftmax(1))


@network()
def functional_layers(num_classes: int) -> nn.Module:
    weights = nn.ParameterList([torch.randn(8, FEATURES) / 10, torch.randn(num_classes, 8) / 3])
    return Around(
        lambda net, x: functional.linear(functional.hardtanh(functional.linear(x, net.weights[0])), net.weights[1]),
        weights=weights,
    )
