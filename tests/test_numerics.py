"""Every loss in float32 against float64, and every gradient against differences of the loss.

On a thousand draws, extreme logits among them.
"""

import pytest
import torch

from bikd.losses import hard_loss, soft_loss
from bikd.methods import Setting, Step, get_method, table_rows

N_PER_CLASS = (400, 200, 100, 50, 20, 10, 5, 3, 2)
C, B = len(N_PER_CLASS), 1000
METHODS = [
    m for m in dict.fromkeys(table_rows("table1") + table_rows("controls")) if m != "teacher"
]


def draws(scale, n=B, seed=0):
    "Student's and teacher's logits in float64 (exact in float32), and labels."
    g = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(n, C, generator=g) for _ in range(2))
    y = torch.randint(0, C, (n,), generator=g)
    if scale >= 1e3:
        s[:9], t[:9] = scale * torch.eye(C), -scale * torch.eye(C)
        y[:9] = torch.arange(9)  # sure and right, sure and wrong
    return s.double(), t.double(), y


def losses(name, s, t, y):
    "The method's losses `(B, K)`, begun with a teacher that says t."
    method = get_method(name)()
    method.begin(Setting(N_PER_CLASS, 0, dtype=s.dtype, epochs=9, teacher=lambda part: (t, y)))
    method.begin_epoch(0, 0)
    return method.losses(Step(s, y, t if method.needs_teacher else None, torch.arange(len(y)), 0))


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("name", METHODS)
def test_float32_is_float64_up_to_rounding(name, scale):
    s, t, y = draws(scale)
    exact, ours = losses(name, s, t, y), losses(name, s.float(), t.float(), y)
    assert exact.isfinite().all()
    assert ours.isfinite().all()
    assert ours.dtype == torch.float32
    error = (ours.double() - exact).abs() / (scale + exact.abs())
    # At 1e4 a logit divided by the temperature is rounded by 5e-4. Where a teacher's two first
    # classes tie, that much probability moves.
    assert error.max() < (1e-4 if scale == 1e4 else 2e-5), (name, error.max().item())


@pytest.mark.parametrize("name", METHODS)
def test_extreme_logits_have_finite_gradients(name):
    s, t, y = draws(1e4)
    s = s.float().requires_grad_()
    (g,) = torch.autograd.grad(losses(name, s, t.float(), y).sum(), s)
    assert g.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_losses(name):
    s, t, y = draws(2.0, n=6)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses(name, z, t, y), (s,), atol=1e-6)


def test_hard_and_soft_loss_by_the_book():
    "Against formulas written out in float64, without log-softmax."
    s, t, y = draws(3.0)
    p, tau = s.softmax(1), 4.0
    assert (hard_loss(s, y) + p.gather(1, y[:, None])[:, 0].log()).abs().max() < 1e-10
    a, b = ((z / tau).exp() / (z / tau).exp().sum(1, keepdim=True) for z in (t, s))
    assert (soft_loss(s, t, tau) - tau**2 * (a * (a / b).log()).sum(1)).abs().max() < 1e-10
    assert (soft_loss(s.float(), s.float(), tau) == 0).all()
    assert (soft_loss(s, t, tau) >= 0).all()


def test_second_derivatives_exist_where_double_backward_needs_them():
    s, t, y = draws(2.0, n=4)
    s.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda z: torch.stack([hard_loss(z, y), soft_loss(z, t, 4.0)], 1), (s,)
    )
