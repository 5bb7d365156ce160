"""Our numbers against other libraries' and other nets."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from bikd.bikd import BiKD
from bikd.data import toy_split
from bikd.hypergradient import hypergradient
from bikd.losses import hard_loss, soft_loss
from bikd.methods import KD
from bikd.models import create_model
from bikd.protocol import Protocol
from bikd.runs import confusion_matrix, expected_calibration_error
from bikd.training import train
from bikd.weight_net import WeightNet


def test_ece_and_confusion_agree_with_torchmetrics():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 7), torch.randint(7, (500,))
    ours = expected_calibration_error(logits, labels)
    theirs = MulticlassCalibrationError(7, n_bins=15)(logits, labels)
    assert abs(ours - theirs) < 1e-6
    confusion = MulticlassConfusionMatrix(7)(logits, labels)
    assert torch.equal(confusion_matrix(logits, labels), confusion)


@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0])
def test_losses_and_their_gradients_agree_with_torch_in_float64(tau):
    torch.manual_seed(0)
    s = (10 * torch.randn(64, 9, dtype=torch.float64)).requires_grad_()
    t = 10 * torch.randn(64, 9, dtype=torch.float64)
    y = torch.randint(9, (64,))
    ours = 0.3 * hard_loss(s, y).mean() + 0.7 * soft_loss(s, t, tau).mean()
    theirs = 0.3 * F.cross_entropy(s, y) + 0.7 * tau**2 * F.kl_div(
        (s / tau).log_softmax(1), (t / tau).log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert abs(ours - theirs) < 1e-10
    a, b = (torch.autograd.grad(loss, s)[0] for loss in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda s: soft_loss(s, t[:4], tau), (s[:4].detach().requires_grad_(),)
    )


def patches(x):
    "Four of 4×4 pixels from each image, `(B, 4, 16)`."
    return x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(x), 4, 16)


class Attention(nn.Module):
    "No convolution, no BatchNorm: patches, self-attention, LayerNorm."

    def __init__(self, C=3):
        super().__init__()
        self.patch = nn.Linear(16, 12)
        self.qkv = nn.Linear(12, 36)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, C)

    def forward(self, x):
        p = self.patch(patches(x))
        q, k, v = self.qkv(p).chunk(3, -1)
        return self.head(self.norm(p + (q @ k.mT / 12**0.5).softmax(-1) @ v).mean(1))


class Encoder(nn.Module):
    """PyTorch's own encoder layer.

    Its fused attention has neither a forward-mode nor a second derivative.
    """

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(16, 12)
        self.body = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(self.patch(patches(x))).mean(1))


class PlainConv(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(288, 3)
        )


@pytest.mark.parametrize(
    "teacher,student", [(Attention, PlainConv), (PlainConv, Attention), (PlainConv, Encoder)]
)
def test_any_module_is_teacher_or_student(teacher, student):
    split, protocol = toy_split(), Protocol(epochs=3, batch_size=10, lr=0.01)
    t = teacher().double()
    students = {}
    for m in (KD(), BiKD(k=2), BiKD(k=2, estimator="double_backward")):
        torch.manual_seed(0)
        net = student().double()
        start = [p.clone() for p in net.parameters()]
        train(net, m, split, protocol, teacher=t, show=False)
        students[m.name + getattr(m, "estimator", "")] = net
        assert all((p - q).abs().max() > 1e-6 for p, q in zip(net.parameters(), start, strict=True))

    def far(a, b):
        pairs = zip(students[a].parameters(), students[b].parameters(), strict=True)
        return max((p - q).abs().max().item() for p, q in pairs)

    assert far("bikdjvp", "bikddouble_backward") < 1e-10 < 1e-5 < far("bikdjvp", "kd")


def test_frozen_parameters_stay_frozen():
    torch.manual_seed(0)
    student = PlainConv()
    weight = student.get_parameter("0.weight")
    student[0].requires_grad_(False)
    before = weight.clone()
    protocol = Protocol(epochs=1, batch_size=10, lr=0.05)
    train(student, BiKD(k=1), toy_split(), protocol, teacher=Attention(), show=False)
    assert torch.equal(before, weight)


@pytest.mark.parametrize("net", ["resnet8", "resnet8x4"])
def test_jvp_equals_double_backward_in_float32_at_the_papers_batch(net):
    torch.manual_seed(0)
    student, phi = create_model(net, 100), WeightNet()
    x, xv, t = torch.randn(100, 3, 32, 32), torch.randn(100, 3, 32, 32), 3 * torch.randn(100, 100)
    y, yv = torch.randint(100, (2, 100))

    def by(estimator):
        given = dict(lr=0.1, temperature=4.0, estimator=estimator)
        return torch.cat(
            [g.flatten() for g in hypergradient(student, phi, x, y, t, xv, yv, **given)]
        )

    a, b = by("jvp"), by("double_backward")
    assert (a - b).norm() / b.norm() < 1e-5
