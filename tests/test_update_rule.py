"""BiKD's update rule against a small reference written from the formulas alone.

The reference keeps its own copy of everything: it unrolls the virtual step and differentiates
through it (double backward), accumulates in a plain list, and does SGD and Adam by hand. It shares
with the library only the order of the images and the nets' initial weights. Both run in float64,
over several epochs, so that epoch ends, decays and short last batches are passed; student and phi
must agree to 1e-8 at the end.
"""

import copy
import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from nets import conv_net
from torch import nn
from torch.func import functional_call

from bikd.bikd import BiKD
from bikd.data import pixel_stats, toy_split
from bikd.hypergradient import weight_gradient
from bikd.methods import Setting
from bikd.presets import preset
from bikd.protocol import Protocol
from bikd.training import train
from bikd.views import endless_batches, epoch_batches

EPOCHS, BATCH, TAU = 5, 10, 4.0


def make_net(seed, width):
    return conv_net(width, activation=nn.Tanh, seed=seed).double()


@dataclass(frozen=True)
class Rule:
    "What the paper's text and the released script do differently."

    k: int  # batches between two moves of φ
    # The script counts a batch before it asks whether φ moves, and starts each epoch anew; the
    # paper's Algorithm 1 does neither.
    released: bool
    mean: bool  # the hypergradients of k batches: their mean, or their sum
    l2: float  # of φ's Adam
    phi_decay: float  # factor of φ's learning rate where the student's decays
    swap: bool  # f_φ gets the student's cross-entropy first
    teacher_mode: str
    mix: bool  # the validation loss holds the soft loss too


PAPER = Rule(
    k=5,
    released=False,
    mean=False,
    l2=0.0,
    phi_decay=1.0,
    swap=False,
    teacher_mode="eval",
    mix=False,
)
RELEASED = Rule(
    k=5,
    released=True,
    mean=True,
    l2=1e-4,
    phi_decay=0.8,
    swap=True,
    teacher_mode="train",
    mix=False,
)
RULES = {
    "paper": PAPER,
    "released": RELEASED,
    "released-cifar10": replace(RELEASED, mix=True, k=1),
}


class Adam:
    "Kingma and Ba's Adam with an L2 term."

    def __init__(self, params):
        self.m = [torch.zeros_like(p) for p in params]
        self.v = [torch.zeros_like(p) for p in params]
        self.t = 0

    def step(self, params, grads, lr, l2):
        "One step, in place."
        self.t += 1
        for p, g, m, v in zip(params, grads, self.m, self.v, strict=True):
            g = g + l2 * p
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p -= lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


class Sgd:
    "SGD with momentum 0.9 and weight decay."

    def __init__(self, weight_decay):
        self.weight_decay = weight_decay
        self.velocity = None

    def step(self, params, grads, lr):
        "The parameters after one step."
        d = [g + self.weight_decay * p for g, p in zip(grads, params, strict=True)]
        if self.velocity is not None:
            d = [0.9 * v + g for v, g in zip(self.velocity, d, strict=True)]
        self.velocity = d
        return [p - lr * g for p, g in zip(params, d, strict=True)]


def leaves(params):
    "Copies from which gradients are taken."
    return [p.clone().requires_grad_() for p in params]


def both_losses(logits, t_logits, y):
    "Hard and soft loss of each sample."
    log_s, p_t = (logits / TAU).log_softmax(1), (t_logits / TAU).softmax(1)
    soft = TAU**2 * (p_t * (p_t.log() - log_s)).sum(1)
    return F.cross_entropy(logits, y, reduction="none"), soft


class Reference:
    "Algorithm 1 or the released script's loop, by double backward."

    def __init__(self, rule, student, teacher, phi, split, mean_std, weight_decay):
        self.rule, self.split, self.mean_std = rule, split, mean_std
        self.student = student  # its modules alone: parameters and buffers are kept here
        self.teacher = copy.deepcopy(teacher).train(rule.teacher_mode == "train")
        self.names = [n for n, _ in student.named_parameters()]
        self.theta = [p.detach().clone() for p in student.parameters()]
        self.buffers = {n: b.clone() for n, b in student.named_buffers()}
        self.phi = [p.detach().clone() for p in phi]
        self.sgd, self.adam = Sgd(weight_decay), Adam(self.phi)
        self.accumulated, self.counted, self.steps = None, 0, 0

    def train(self, lr=0.05, phi_lr=1e-3):
        n_train, n_val = len(self.split.train), len(self.split.val)
        for epoch in range(EPOCHS):
            drops = sum(epoch >= round(f * EPOCHS) for f in (2 / 3, 5 / 6))
            rates = lr * 0.1**drops, phi_lr * self.rule.phi_decay**drops
            if self.rule.released:
                self.accumulated, self.counted = None, 0
            val = endless_batches(n_val, BATCH, self.split.views, 0, epoch)
            for batch in epoch_batches(n_train, BATCH, self.split.views, 0, epoch):
                self.step(self.batch("train", batch), self.batch("val", next(val)), *rates)

    def step(self, train, val, lr, phi_lr):
        "One batch: a hypergradient, perhaps a move of φ, and a step of the student."
        x, y = train
        t_logits = self.ask_teacher(x)
        ce_t = F.cross_entropy(t_logits, y, reduction="none")
        self.accumulate(self.hypergradient(train, val, t_logits, ce_t, lr))
        self.counted += self.rule.released
        if self.counted % self.rule.k == 0:
            self.adam.step(self.phi, self.accumulated, phi_lr, self.rule.l2)
            self.accumulated = None
        self.counted += not self.rule.released
        # forward again, with the weights of the new φ
        theta = leaves(self.theta)
        loss = self.train_loss(theta, self.phi, self.buffers, train, t_logits, ce_t)
        self.theta = self.sgd.step(self.theta, torch.autograd.grad(loss, theta), lr)
        self.steps += 1

    def hypergradient(self, train, val, t_logits, ce_t, lr):
        "By φ, on a graph from φ through the virtual step to the validation loss."
        phi, theta = leaves(self.phi), leaves(self.theta)
        loss = self.train_loss(theta, phi, self.copied_buffers(), train, t_logits, ce_t)
        grads = torch.autograd.grad(loss, theta, create_graph=True)
        virtual = [p - lr * g for p, g in zip(theta, grads, strict=True)]
        val_loss = self.val_loss(virtual, *val)
        return torch.autograd.grad(val_loss / self.rule.k if self.rule.mean else val_loss, phi)

    def accumulate(self, hypergradient):
        if self.accumulated is None:
            self.accumulated = list(hypergradient)
        else:
            pairs = zip(self.accumulated, hypergradient, strict=True)
            self.accumulated = [a + g for a, g in pairs]

    def train_loss(self, theta, phi, buffers, train, t_logits, ce_t):
        "The mean of the weighted losses. No gradient goes through what f_φ reads."
        x, y = train
        hard, soft = both_losses(self.forward(theta, buffers, x), t_logits, y)
        w = self.weights(phi, ce_t, hard.detach())
        return (w[:, 0] * hard + w[:, 1] * soft).mean()

    def val_loss(self, theta, x, y):
        logits = self.forward(theta, self.copied_buffers(), x)
        if not self.rule.mix:
            return F.cross_entropy(logits, y)
        hard, soft = both_losses(logits, self.ask_teacher(x), y)
        return (hard + soft).mean()

    def weights(self, phi, ce_t, ce_s):
        "f_φ: hidden layers with tanh, sigmoid at the end."
        h = torch.stack([ce_s, ce_t] if self.rule.swap else [ce_t, ce_s], 1)
        for w, b in zip(phi[:-2:2], phi[1:-2:2], strict=True):
            h = torch.tanh(h @ w.T + b)
        return torch.sigmoid(h @ phi[-2].T + phi[-1])

    def forward(self, theta, buffers, x):
        "The student's logits; `buffers` change as in training."
        params = dict(zip(self.names, theta, strict=True))
        return functional_call(self.student, {**params, **buffers}, (x,))

    def copied_buffers(self):
        "For passes that leave no trace in the student."
        return {n: b.clone() for n, b in self.buffers.items()}

    @torch.no_grad()
    def ask_teacher(self, x):
        return self.teacher(x)

    def batch(self, part, batch):
        "Images, cropped and scaled by hand, and their labels."
        images = getattr(self.split, part)
        padded = F.pad(images.pixels, (1, 1, 1, 1))
        crops = []
        for i, view in zip(batch.ids, batch.views, strict=True):
            top, left = view // 3, view % 3
            crops.append(padded[i, :, top : top + 8, left : left + 8])
        mean, std = self.mean_std
        return (torch.stack(crops).double() / 255 - mean) / std, images.labels[batch.ids]


def far(a, b):
    "The largest difference between two lists of tensors."
    return torch.stack([(p - q).abs().max() for p, q in zip(a, b, strict=True)]).max()


@pytest.mark.parametrize(
    "name,k", [*itertools.product(("paper", "released"), (2, 3, 5)), ("released-cifar10", 1)]
)
def test_rule_is_followed_step_for_step(name, k):
    split = toy_split()
    method, protocol = preset(
        name, "bikd", dict(epochs=EPOCHS, batch_size=BATCH, lr=0.05), dict(k=k)
    )
    teacher, student = make_net(1, 12), make_net(0, 5)
    start = copy.deepcopy(student)
    train(student, method, split, protocol, teacher=teacher, show=False)

    fresh, _ = preset(name, "bikd", settings=dict(k=k))
    fresh.begin(Setting(tuple(split.n_per_class), 0, "cpu", torch.float64))
    assert fresh.weight_net is not None
    assert method.weight_net is not None
    phi = list(fresh.weight_net.parameters())
    stats = [t.double() for t in pixel_stats(split, protocol.normalisation)]
    rule = replace(RULES[name], k=k)
    ref = Reference(rule, start, teacher, phi, split, stats, protocol.weight_decay)
    ref.train()

    assert ref.steps == EPOCHS * 5 >= 20
    assert ref.adam.t == method.report()["phi_moves"] > 2
    assert far(student.parameters(), ref.theta) < 1e-8
    assert far(method.weight_net.parameters(), ref.phi) < 1e-8
    for n, b in student.named_buffers():
        assert (b - ref.buffers[n]).abs().max() < 1e-8
    # the reference really trained both nets, and the case is not trivial
    assert far(ref.theta, start.parameters()) > 1e-2
    assert far(ref.phi, phi) > 1e-3


@pytest.mark.parametrize(
    "name,field,value",
    [
        ("released", "update_rule", "test_then_count"),
        ("released", "phi_decay", 1.0),
        ("released", "inputs", "teacher,student"),
        ("released", "phi_weight_decay", 0.0),
        ("paper", "update_rule", "count_then_test"),
        ("paper", "val_loss", "mix"),
        ("paper", "phi_optimizer", "sgd"),
        ("paper", "phi_clock", "epoch"),
        ("paper", "virtual_step", "optimizer"),
        ("paper", "outputs", "softmax"),
        ("paper", "hidden", (8,)),
        ("paper", "k", 2),
    ],
)
def test_each_switch_changes_the_run(name, field, value):
    "A switch that changes nothing would be a stub: flipped alone, each moves the student or phi."
    split = toy_split()
    results = []
    for settings in ({}, {field: value}):
        quick = dict(epochs=EPOCHS, batch_size=BATCH, lr=0.05)
        method, protocol = preset(name, "bikd", quick, dict(k=3) | settings)
        student = make_net(0, 5)
        train(student, method, split, protocol, teacher=make_net(1, 12), show=False)
        assert method.weight_net is not None
        parameters = (*student.parameters(), *method.weight_net.parameters())
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert results[0].shape != results[1].shape or (results[0] - results[1]).abs().max() > 1e-9


@pytest.mark.parametrize(
    "field,value",
    [
        ("batch_size", 7),
        ("weight_decay", 2e-4),
        ("first_epoch", 1),
        ("normalisation", "released"),
        ("teacher_mode", "train"),
        ("augment", False),
        ("augment_val", False),
        ("momentum", 0.0),
        ("decay_at", (0.5,)),
        ("lr_decay", 0.5),
        ("nesterov", True),
        ("virtual_first_epoch", 1),
    ],
)
def test_each_protocol_field_changes_the_run(field, value):
    split, results = toy_split(), []
    for fields in ({}, {field: value}):
        protocol = Protocol(**dict(epochs=6, batch_size=BATCH, lr=0.05) | fields)
        student = make_net(0, 5)
        train(student, BiKD(k=2), split, protocol, teacher=make_net(1, 12), show=False)
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert (results[0] - results[1]).abs().max() > 1e-9


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_virtual_step_like_the_optimizers_ends_where_the_optimizer_steps(nesterov):
    "Also once there is a velocity: the virtual student is the one that a real step would make."
    protocol = Protocol(epochs=2, batch_size=BATCH, lr=0.05, nesterov=nesterov)
    virtual_steps, before, after = [], [], []

    class Watched(BiKD):
        name = "watched"

        def learn(self, w, g_w):
            return False  # φ stays, so that the real step takes the weights of the virtual one

    def watch(losses, val_loss, theta, w, lr, estimator, grads, drift):
        step = [g + d for g, d in zip(grads, drift, strict=True)]
        before.append([p.clone() for p in theta.values()])
        virtual_steps.append([p - lr * s for p, s in zip(before[-1], step, strict=True)])
        return weight_gradient(losses, val_loss, theta, w, lr, estimator, grads, drift)

    student = make_net(0, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bikd.training.weight_gradient", watch)
        method = Watched(k=1, virtual_step="optimizer")
        train(student, method, toy_split(), protocol, teacher=make_net(1, 12), show=False)
    after = [*before[1:], [p.detach() for p in student.parameters()]]
    assert len(after) > 4
    for virtual, real in zip(virtual_steps, after, strict=True):
        for a, b in zip(virtual, real, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
