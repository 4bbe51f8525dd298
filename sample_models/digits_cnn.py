"""The architecture of `digits_cnn.safetensors`, which holds weights only."""

from collections import OrderedDict

from torch import nn


def digits_cnn() -> nn.Module:
    """Build a convolutional network that reads handwritten digits, with 1,370 parameters.

    It takes flat images, [N, 64], and folds them into [N, 1, 8, 8] itself, so that `digits.npz`
    serves it as well as the fully connected `digits_mlp.pt`. It returns logits, [N, 10].

        hesscli compute digits_cnn.safetensors digits.npz --arch digits_cnn.py:digits_cnn
    """
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 8, 8)),
            conv=nn.Conv2d(1, 8, kernel_size=3, padding=1),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(8 * 4 * 4, 10),
        )
    )
