"""BiKD's update rule against a small reference written from the formulas alone.

The reference keeps its own copy of everything: it unrolls the virtual step and differentiates through it (double backward), accumulates in a plain list, and
does SGD and Adam by hand. It shares with the library only the order of the images and the nets' initial weights. Both run in float64, over several epochs, so
that epoch ends, decays and short last batches are passed; student and phi must agree to 1e-8 at the end.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from nets import conv_net
from torch import nn
from torch.func import functional_call

from bikd.bikd import BiKD
from bikd.data import toy_split
from bikd.presets import preset
from bikd.protocol import Protocol
from bikd.training import train
from bikd.views import endless_batches, epoch_batches

EPOCHS, BATCH, TAU = 5, 10, 4.0


def make_net(seed, width):
    return conv_net(width, activation=nn.Tanh, seed=seed).double()


def adam(params, grads, m, v, t, lr, l2):
    "One step of Kingma and Ba's Adam with an L2 term, in place."
    for p, g, m_, v_ in zip(params, grads, m, v):
        g = g + l2 * p
        m_.mul_(0.9).add_(0.1 * g)
        v_.mul_(0.999).add_(0.001 * g * g)
        p -= lr * (m_ / (1 - 0.9**t)) / ((v_ / (1 - 0.999**t)).sqrt() + 1e-8)


def reference(
    student,
    teacher,
    phi_layers,
    split,
    *,
    k,
    rule,
    mean,
    l2,
    phi_decay,
    swap,
    teacher_mode,
    mix,
    weight_decay,
    mean_std,
    lr=0.05,
):
    "Algorithm 1 (rule='paper') or the released script's loop (rule='released'), by double backward."
    names = [n for n, _ in student.named_parameters()]
    theta = [p.detach().clone() for p in student.parameters()]
    buffers = {n: b.clone() for n, b in student.named_buffers()}
    velocity = [None] * len(theta)
    phi = [p.detach().clone() for p in phi_layers]
    m, v, t, acc, count, steps = (
        *([torch.zeros_like(p) for p in phi] for _ in range(2)),
        0,
        None,
        0,
        0,
    )
    pixels = {part: F.pad(getattr(split, part).pixels, (1, 1, 1, 1)) for part in ("train", "val")}
    labels = {part: getattr(split, part).labels for part in ("train", "val")}

    def images(part, batch):
        x = torch.stack(
            [
                pixels[part][i, :, w // 3 : w // 3 + 8, w % 3 : w % 3 + 8]
                for i, w in zip(batch.ids, batch.views)
            ]
        )
        return (x.double() / 255 - mean_std[0]) / mean_std[1]

    def forward(params, x, keep_buffers=False):
        state = buffers if keep_buffers else {n: b.clone() for n, b in buffers.items()}
        return functional_call(student, {**dict(zip(names, params)), **state}, (x,))

    def both(logits, t_logits, y):
        log_s, p_t = (logits / TAU).log_softmax(1), (t_logits / TAU).softmax(1)
        return F.cross_entropy(logits, y, reduction="none"), TAU**2 * (
            p_t * (p_t.log() - log_s)
        ).sum(1)

    def f_phi(net, ce_t, ce_s):
        h = torch.stack([ce_s, ce_t] if swap else [ce_t, ce_s], 1)
        for w, b in zip(net[:-2:2], net[1:-2:2]):
            h = torch.tanh(h @ w.T + b)
        return torch.sigmoid(h @ net[-2].T + net[-1])

    teacher = copy.deepcopy(teacher).train(teacher_mode == "train")
    for epoch in range(EPOCHS):
        drops = sum(epoch >= round(f * EPOCHS) for f in (2 / 3, 5 / 6))
        eta, eta_phi = lr * 0.1**drops, 1e-3 * phi_decay**drops
        if rule == "released":
            acc, count = None, 0
        val = endless_batches(len(split.val), BATCH, split.views, 0, epoch)
        for batch in epoch_batches(len(split.train), BATCH, split.views, 0, epoch):
            x, y = images("train", batch), labels["train"][batch.ids]
            with torch.no_grad():
                t_logits = teacher(x)
            ce_t = F.cross_entropy(t_logits, y, reduction="none")
            # the virtual step, on a graph from phi to the validation loss
            net = [p.clone().requires_grad_() for p in phi]
            th = [p.clone().requires_grad_() for p in theta]
            h, s = both(forward(th, x), t_logits, y)
            w = f_phi(net, ce_t, h.detach())
            grads = torch.autograd.grad((w[:, 0] * h + w[:, 1] * s).mean(), th, create_graph=True)
            virtual = [p - eta * g for p, g in zip(th, grads)]
            vb = next(val)
            xv, yv = images("val", vb), labels["val"][vb.ids]
            out = forward(virtual, xv)
            loss = F.cross_entropy(out, yv)
            if mix:
                with torch.no_grad():
                    tv = teacher(xv)
                hv, sv = both(out, tv, yv)
                loss = (hv + sv).mean()
            hyper = torch.autograd.grad(loss / k if mean else loss, net)
            acc = list(hyper) if acc is None else [a + g for a, g in zip(acc, hyper)]
            if rule == "released":
                count += 1
            if count % k == 0:
                t += 1
                adam(phi, acc, m, v, t, eta_phi, l2)
                acc = None
            if rule == "paper":
                count += 1
            # the real step: forward again, with the weights of the new phi, momentum and weight decay
            th = [p.clone().requires_grad_() for p in theta]
            h, s = both(forward(th, x, keep_buffers=True), t_logits, y)
            w = f_phi(phi, ce_t, h.detach())
            grads = torch.autograd.grad((w[:, 0] * h + w[:, 1] * s).mean(), th)
            for i, g in enumerate(grads):
                d = g + weight_decay * theta[i]
                velocity[i] = d if velocity[i] is None else 0.9 * velocity[i] + d
                theta[i] = theta[i] - eta * velocity[i]
            steps += 1
    return theta, phi, buffers, steps, t


CASES = {
    "paper": dict(
        rule="paper",
        mean=False,
        l2=0.0,
        phi_decay=1.0,
        swap=False,
        teacher_mode="eval",
        mix=False,
        k=5,
    ),
    "released": dict(
        rule="released",
        mean=True,
        l2=1e-4,
        phi_decay=0.8,
        swap=True,
        teacher_mode="train",
        mix=False,
        k=5,
    ),
    "released-cifar10": dict(
        rule="released",
        mean=True,
        l2=1e-4,
        phi_decay=0.8,
        swap=True,
        teacher_mode="train",
        mix=True,
        k=1,
    ),
}


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
    from bikd.data import pixel_stats
    from bikd.methods import Setting

    fresh.begin(Setting(tuple(split.n_per_class), 0, "cpu", torch.float64))
    mean_std = [t.double() for t in pixel_stats(split, protocol.normalisation)]
    theta, phi, buffers, steps, moves = reference(
        start,
        teacher,
        list(fresh.weight_net.parameters()),
        split,
        weight_decay=protocol.weight_decay,
        mean_std=mean_std,
        **CASES[name] | dict(k=k),
    )

    assert steps == EPOCHS * 5 >= 20
    assert moves == method.report()["phi_moves"] > 2
    for ours, ref in zip(student.parameters(), theta):
        assert (ours - ref).abs().max() < 1e-8
    for ours, ref in zip(method.weight_net.parameters(), phi):
        assert (ours - ref).abs().max() < 1e-8
    for n, b in student.named_buffers():
        assert (b - buffers[n]).abs().max() < 1e-8
    # the reference really trained both nets, and the case is not trivial
    assert max((p - q).abs().max() for p, q in zip(theta, start.parameters())) > 1e-2
    assert max((p - q).abs().max() for p, q in zip(phi, fresh.weight_net.parameters())) > 1e-3


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
        method, protocol = preset(
            name, "bikd", dict(epochs=EPOCHS, batch_size=BATCH, lr=0.05), dict(k=3) | settings
        )
        student = make_net(0, 5)
        train(student, method, split, protocol, teacher=make_net(1, 12), show=False)
        results.append(
            torch.cat(
                [
                    p.detach().flatten()
                    for p in (*student.parameters(), *method.weight_net.parameters())
                ]
            )
        )
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
    ],
)
def test_each_protocol_field_changes_the_run(field, value):
    split, results = toy_split(), []
    for fields in ({}, {field: value}):
        student = make_net(0, 5)
        train(
            student,
            BiKD(k=2),
            split,
            Protocol(**dict(epochs=6, batch_size=BATCH, lr=0.05) | fields),
            teacher=make_net(1, 12),
            show=False,
        )
        results.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert (results[0] - results[1]).abs().max() > 1e-9
