"""All methods through the one training loop: resumed, estimated two ways, refused, recorded."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import conv_net
from pydantic import PrivateAttr

from bikd.baselines import BKD
from bikd.data import load_split, toy_split
from bikd.experiment import Parameters, make_plan
from bikd.lfme import LFME, Experts
from bikd.measuring import evaluate
from bikd.methods import KD, Bilevel, Distillation, get_method, table_rows
from bikd.presets import preset
from bikd.protocol import Protocol
from bikd.runs import make_config, run
from bikd.state import set_up, train_batches
from bikd.training import train, train_epoch

SPLIT = toy_split(n_classes=6)
STUDENTS = [
    m for m in table_rows("table1") + table_rows("controls") if not get_method(m).trains_teacher_net
]


def make_net(seed, width=6, n_classes=6):
    return conv_net(width, n_classes=n_classes, seed=seed).double()


def make_teacher(method):
    "What the method learns from: its experts, a wider net or nothing."
    if method.name == "lfme":
        return method.join([make_net(i, 12, 2) for i in range(3)], SPLIT)
    return make_net(1, 12) if method.needs_teacher else None


def trained(method, epochs=4, **options):
    "All numbers of a trained student, and its history."
    net = make_net(0)
    protocol = Protocol(epochs=epochs, batch_size=20, lr=0.02)
    teacher = make_teacher(method)
    _, progress = train(net, method, SPLIT, protocol, teacher=teacher, show=False, **options)
    return torch.cat([t.double().flatten() for t in net.state_dict().values()]), progress.history


@pytest.mark.parametrize("name", STUDENTS)
def test_an_interrupted_run_of_any_method_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    cls = get_method(name)
    real = cls.begin_epoch

    def cut_off(self, epoch, decays):
        if epoch == 2:
            raise KeyboardInterrupt
        real(self, epoch, decays)

    whole, history = trained(cls())
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(cls, "begin_epoch", cut_off)
        trained(cls(), checkpoint=tmp_path / "c.pt")
    again, history_again = trained(cls(), checkpoint=tmp_path / "c.pt")
    assert torch.equal(whole, again)
    assert history == history_again
    assert len(history) == 4


@pytest.mark.parametrize("name", [m for m in STUDENTS if get_method(m).bilevel])
def test_every_bilevel_method_is_the_same_by_double_backward(name):
    cls: Any = get_method(name)
    a, b = (trained(cls(estimator=e), 2)[0] for e in ("jvp", "double_backward"))
    assert (a - b).norm() < 1e-10 * a.norm()


@pytest.mark.parametrize("name", ["l2rw", "rwkd"])
def test_a_virtual_step_of_weights_zero_may_be_left_out(name, monkeypatch):
    short, _ = trained(get_method(name)(), 2)
    monkeypatch.setattr(get_method(name), "at_theta", False)
    long, _ = trained(get_method(name)(), 2)
    assert (short - long).norm() < 1e-12 * long.norm()


def test_methods_differ():
    ends = {m: trained(get_method(m)(), 2)[0] for m in STUDENTS}
    for i, a in enumerate(STUDENTS):
        for b in STUDENTS[i + 1 :]:
            assert not torch.equal(ends[a], ends[b]), (a, b)


def test_lfme_hears_its_experts_less_as_the_student_learns(tmp_path):
    method = LFME()
    protocol = Protocol(epochs=30, batch_size=20, lr=0.05)
    state = set_up(make_net(0), method, SPLIT, protocol, teacher=make_teacher(method))
    assert state.teacher is not None
    assert isinstance(state.teacher.net, Experts)
    assert evaluate(state.teacher.net, state.val).shape == (48, 6)
    ids = [b.ids for b in train_batches(state, 0)]
    assert len(ids) == len(SPLIT.train) // 20
    assert all(len(i) == 20 for i in ids)
    shown = state.train.labels[torch.cat(ids)].bincount(minlength=6)
    assert shown.max() - shown.min() <= 4
    method._expert = [1.0] * 3  # experts that know it all
    heard = [method.heard]
    for epoch in range(30):
        train_epoch(state, epoch, lambda *a: None)
        method.after_epoch(evaluate(state.student, state.val), state.val.labels)
        heard.append(method.heard)
    assert heard[0] == [1.0] * 3
    assert sum(heard[-1]) < 1.5, heard[-1]


REFUSED = [
    ("bikd", "val"),
    ("rwkd", "val"),
    ("l2rw", "val"),
    ("mwn", "val"),
    ("mwn_ci", "val"),
    ("lfme", "val"),
    ("cckd", "val"),
    ("bsce", "counts"),
    ("bkd", "counts"),
    ("dive", "counts"),
    ("cckd", "counts"),
    ("bsce_val", "counts"),
    ("ltkd", "groups"),
    ("lfme", "groups"),
]


@pytest.mark.parametrize("name,lacks", REFUSED)
def test_a_method_that_needs_what_the_data_lack_says_so_before_training(name, lacks):
    def without(images, c):
        return images.take(torch.nonzero(images.labels != c)[:, 0])

    split = dict(
        val=replace(SPLIT, val=without(SPLIT.val, 3)),
        counts=replace(SPLIT, train=without(SPLIT.train, 3)),
        groups=toy_split(n_classes=2),
    )[lacks]
    words = dict(
        val="validation images of every class, and class 3 has none",
        counts="class 3 has no training image",
        groups="one of the groups empty",
    )[lacks]
    student = make_net(0, n_classes=split.n_classes)
    before = student[0].weight.clone()
    teacher = make_net(1, n_classes=split.n_classes)
    method = get_method(name)()
    with pytest.raises(ValueError, match=f"method '{name}' needs.*{words}"):
        train(student, method, split, Protocol(epochs=1), teacher=teacher, show=False)
    assert torch.equal(before, student[0].weight)


def test_the_plan_of_the_whole_table_names_every_teacher_first():
    plan = make_plan(Parameters(methods="all controls", seeds="0 1"))
    ids = [c.run_id for c in plan.configs]
    assert len(ids) == len(set(ids)) == 2 * (1 + 3 + len(STUDENTS))
    for c in plan.configs:
        assert all(ids.index(t) < ids.index(c.run_id) for t in c.teachers), c.run_id
    lfme = next(c for c in plan.configs if c.method == "lfme")
    assert [t.split("-")[0] for t in lfme.teachers] == [
        "expert_head",
        "expert_medium",
        "expert_tail",
    ]
    assert lfme.teacher_run is None
    original = make_plan(Parameters(methods="dive", preset="original")).configs
    assert [c.method for c in original] == ["teacher_bsce", "dive"]
    assert original[1].teacher_run == original[0].run_id
    assert original[0].net == "resnet20"
    with pytest.raises(ValueError, match="needs expert_runs, 3 in number"):
        make_config("mnist5k", 100, 0, "lfme", teacher_run="t")
    with pytest.raises(ValueError, match="takes no teacher_run"):
        make_config("mnist5k", 100, 0, "bsce", teacher_run="t")


def test_every_preset_makes_every_method():
    for name in ("clean", "table1", "paper", "original", "released", "released-cifar10"):
        for m in table_rows("table1") + table_rows("controls"):
            preset(name, m)
    table = {m: preset("table1", m)[0] for m in STUDENTS}
    # τ = 4 is what the paper names; DiVE's stays (05b)
    for m, t in table.items():
        if t.needs_teacher:
            assert t.model_dump()["temperature"] == (3.0 if m == "dive" else 4.0), m
    bkd, recipe = preset("original", "bkd")
    assert isinstance(bkd, BKD)
    assert bkd.deferred
    assert bkd.temperature == 2.0
    assert recipe.lr_at(0) < recipe.lr
    assert recipe.batch_size == 128


def test_records_of_controls_and_experts(tmp_path):
    one = dict(epochs=1)
    control = run(make_config("mnist5k", 100, 0, "ce_val", protocol=one), tmp_path, show=False)
    split = load_split("mnist5k", 100, 0)
    # groups as drawn, so that rows compare
    assert control.summary["split_hash"] == split.hash
    assert control.summary["n_per_class"] == split.n_per_class
    assert control.summary["test_acc_pct_val_selected"] is None
    assert control.class_weights.n.sum() == len(split.train) + len(split.val)
    expert = make_config("mnist5k", 100, 0, "expert_tail", net="resnet8", protocol=one)
    tail = run(expert, tmp_path, show=False)
    assert len(tail.summary["per_class_acc_pct"]) == 3
    assert tail.student()(torch.zeros(1, 1, 28, 28)).shape == (1, 3)
    assert tail.summary["split_hash"] == split.hash


def test_fewer_validation_images_leave_the_training_set_alone(tmp_path):
    kw: dict[str, Any] = dict(protocol=dict(epochs=1), n_val=2)
    r = run(make_config("mnist5k", 100, 0, "ce", **kw), tmp_path, show=False)
    full = run(make_config("mnist5k", 100, 0, "ce", protocol=dict(epochs=1)), tmp_path, show=False)
    assert r.folder != full.folder
    assert r.metrics.test_acc_pct.tolist() == full.metrics.test_acc_pct.tolist()
    assert r.summary["split_hash"] != full.summary["split_hash"]
    student = make_config("mnist5k", 100, 0, "kd", teacher_run="t", **kw)
    with pytest.raises(ValueError, match="n_val"):
        run(student, tmp_path, split=load_split("mnist5k", 100, 0))


def test_a_bilevel_method_of_ones_own_needs_three_answers():
    class PerLoss(Bilevel, Distillation):
        "One weight per loss for all samples, moved against its slope."

        name = "per_loss"
        _w: torch.Tensor = PrivateAttr(
            default_factory=lambda: torch.full((2,), 0.5, dtype=torch.float64)
        )

        def virtual_weights(self, losses, step):
            return self._w.expand_as(losses).clone().requires_grad_()

        def weights(self, losses, step):
            return self._w.expand_as(losses)

        def learn(self, w, g_w):
            self._w = (self._w - 10 * g_w.sum(0)).clamp(0, 1)
            return True

    method = PerLoss()
    trained(method, epochs=2)
    assert not torch.equal(method._w, torch.full_like(method._w, 0.5))


def test_statistics_come_from_images_as_they_are():
    answers = {}

    class Ask(KD):
        name = "ask"

        def begin(self, setting):
            answers.update({part: setting.teacher(part) for part in ("train", "val")})

    teacher = make_net(1, 12)
    state = set_up(make_net(0), Ask(), SPLIT, Protocol(), teacher=teacher)
    for part, images in (("train", SPLIT.train), ("val", SPLIT.val)):
        plain = (images.pixels.double() / 255 - state.train.mean) / state.train.std
        assert (answers[part][0] - teacher.eval()(plain)).abs().max() < 1e-9
        assert torch.equal(answers[part][1], images.labels)
