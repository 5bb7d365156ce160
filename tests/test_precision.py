"""`precision = bf16`: passes under autocast; weights, losses and statistics stay float32."""

import copy
from collections.abc import Callable

import pytest
import torch
from nets import conv_net

from bikd.basics import ParameterError
from bikd.bikd import BiKD
from bikd.data import toy_split
from bikd.experiment import Parameters, check_parameters, make_plan
from bikd.methods import CE, KD, Method
from bikd.protocol import Protocol
from bikd.runs import make_config
from bikd.training import train

SPLIT = toy_split(60)


def small_net(width=8):
    return conv_net(width, blocks=2, pool=False, seed=0)


def trained(method, precision, *, teacher=None, compile=False, epochs=2):
    student = small_net()
    protocol = Protocol(epochs=epochs, batch_size=20, lr=0.02, precision=precision)
    teacher = teacher or small_net(12)
    kw = dict(teacher=teacher, show=False, compile=compile)
    state, progress = train(student, method, SPLIT, protocol, **kw)
    return state, progress


def distance(a, b):
    a, b = (torch.cat([p.detach().flatten() for p in s.student.parameters()]) for s in (a, b))
    return ((a - b).norm() / a.norm()).item()


METHODS: dict[str, Callable[[], Method]] = {
    "ce": CE,
    "kd": KD,
    "bikd": lambda: BiKD(k=2),
    "bikd, double backward": lambda: BiKD(k=2, estimator="double_backward"),
    "bikd, jvp_bf16": lambda: BiKD(k=2, estimator="jvp_bf16"),
}


@pytest.mark.parametrize("name", METHODS)
def test_students_under_autocast_are_near_those_in_float32_and_kept_in_float32(name):
    (full, _), (low, progress) = (trained(METHODS[name](), p) for p in ("float32", "bf16"))
    assert 0 < distance(full, low) < 0.02
    assert all(t.dtype != torch.bfloat16 for t in low.student.state_dict().values())
    momenta = [s["momentum_buffer"] for s in low.optimizer.state.values()]
    assert momenta
    assert all(m.dtype == torch.float32 for m in momenta)
    assert all(isinstance(v, float | int) for v in progress.history[-1].values())


def test_the_hypergradient_under_autocast_is_the_exact_one_up_to_bfloat16s_rounding():
    def size(precision, estimator):
        _, progress = trained(BiKD(k=1, estimator=estimator), precision, epochs=1)
        return progress.history[-1]["phi_grad"]

    exact = size("float32", "double_backward")
    assert abs(size("bf16", "jvp") / exact - 1) < 0.05
    assert abs(size("bf16", "double_backward") / exact - 1) < 0.05


def test_the_compiled_pass_is_the_uncompiled_one_under_autocast_too():
    (plain, _), (compiled, progress) = (
        trained(BiKD(k=1), "bf16", compile=c) for c in (False, True)
    )
    assert progress.compiled
    assert distance(plain, compiled) < 1e-3


def test_precision_names_no_earlier_run_anew_and_is_shared_by_teacher_and_students():
    plain = make_config("mnist5k", 100.0, 0, "ce")
    assert plain.run_id == "ce-mnist5k-rho100-seed0-5843d618da"  # as in the records
    low = make_config("mnist5k", 100.0, 0, "ce", protocol=dict(precision="bf16"))
    assert low.run_id != plain.run_id
    plan = make_plan(Parameters(methods="kd bikd", precision="bf16"))
    assert [c.protocol.precision for c in plan.configs] == ["bf16"] * 3
    default = make_plan(Parameters(methods="kd bikd"))
    assert not {c.run_id for c in plan.configs} & {c.run_id for c in default.configs}


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(precision="fp8"), "precision"),
        (dict(change="precision=bf16"), "parameter of its own"),
        (dict(precision="bf16", methods="bikd", estimator="finite_difference"), "mostly rounding"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_trained(given, words):
    with pytest.raises(ParameterError, match=words):
        check_parameters(given)


def test_a_net_is_judged_as_it_was_trained():
    "Evaluation runs under autocast as well: its logits differ from those in float32, a little."
    state, _ = trained(CE(), "bf16")
    net = copy.deepcopy(state.student).eval()
    x, _ = next(state.test.plain())
    with torch.no_grad():
        full = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x).float()
    assert 0 < (full - low).abs().max() < 0.1
