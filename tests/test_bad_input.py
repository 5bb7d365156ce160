"""Bad input in one table: the right exception, a message that says what was given, what is allowed and what to do, and nothing written.

Columns: a name, a call that gets an empty folder, the exception, and words the message must hold.
"""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from bikd import losses, models
from bikd.basics import ParameterError, PlainError, RecordError
from bikd.bikd import BiKD
from bikd.data import load_split, long_tailed_counts, toy_split
from bikd.experiment import Parameters, make_plan
from bikd.graph import read_graph
from bikd.hypergradient import hypergradient, weight_gradient
from bikd.measuring import NonFiniteLoss, accuracy_pct
from bikd.methods import CE, KD, get_method
from bikd.own_data import distill, hold_out
from bikd.presets import preset
from bikd.protocol import Protocol
from bikd.report import accuracy_table
from bikd.runs import (
    Run,
    calibration,
    confusion_matrix,
    expected_calibration_error,
    find_runs,
    make_config,
    run,
    summarise,
)
from bikd.sources import Images
from bikd.table import interval
from bikd.training import train
from bikd.weight_net import WeightNet

torch.manual_seed(0)
SPLIT = toy_split()
PIXELS, LABELS = SPLIT.train
N, C = len(LABELS), SPLIT.n_classes
QUICK = Protocol(epochs=1, batch_size=10, lr=0.02)


def net(C=C, width=4, channels=1):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, C),
    )


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x), x


class Diverged(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
        self.net[-1].weight.data.fill_(float("nan"))

    def forward(self, x):
        return self.net(x)


class Pooling(
    nn.Module
):  # BatchNorm after global pooling: one value per channel for a batch of one
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(4, C),
        )

    def forward(self, x):
        return self.net(x)


class Whole(nn.Module):  # class numbers instead of logits
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x).round().long()


def labels(*changes):
    y = LABELS.clone()
    [y.__setitem__(i, v) for i, v in changes]
    return y


def own(student=None, teacher=None, x=PIXELS, y=LABELS, *val, **kw):
    return distill(
        teacher or net(),
        student or net(),
        x,
        y,
        *val,
        **dict(epochs=1, batch_size=10, show=False, pad=1)
        | ({} if "method" in kw else dict(k=1))
        | kw,
    )


def on(split, method=None, student=None, protocol=QUICK, **kw):
    return train(
        student or net(), method or BiKD(), split, protocol, **dict(teacher=net(), show=False) | kw
    )


def only(images, *classes):
    return images.take(torch.isin(images.labels, torch.tensor(classes)).nonzero()[:, 0])


def plan(**kw):
    return make_plan(Parameters(**kw))


def logits(*shape):
    return torch.zeros(*shape)


def asked(
    d,
    method="ce",
    protocol={},
    settings=None,
    **kw,  # a run, in the folder `given`, which may hold records already
):
    more = {k: kw.pop(k) for k in list(kw) if k in ("teacher_run", "expert_runs", "n_val")}
    return run(
        make_config(
            "mnist5k",
            kw.pop("rho", 100),
            kw.pop("seed", 0),
            method,
            net="resnet8",
            protocol=dict(epochs=1) | protocol,
            settings=settings,
            **more,
        ),
        d / "given",
        show=False,
        **kw,
    )


def hyper(**kw):
    given = dict(
        student=net().double(),
        weight_net=WeightNet().double(),
        x=torch.randn(5, 1, 8, 8).double(),
        y=torch.tensor([0, 1, 2, 0, 1]),
        teacher_logits=torch.randn(5, 3).double(),
        x_val=torch.randn(4, 1, 8, 8).double(),
        y_val=torch.tensor([0, 1, 2, 0]),
    )
    more = {k: kw.pop(k) for k in list(kw) if k not in given}
    return hypergradient(**given | kw, **dict(lr=0.1, temperature=4.0) | more)


def slopes(
    w=torch.ones(5, 1),
    grads=None,  # five losses of one parameter
):
    x = torch.randn(5)
    return weight_gradient(
        lambda t: (t["a"] * x)[:, None] ** 2,
        lambda t: t["a"].sum() ** 2,
        dict(a=torch.ones(1)),
        w,
        0.1,
        grads=grads if grads is None else [*grads, *grads],
    )


TEACHER, STUDENT = (
    make_config("mnist5k", 100, 0, m, net="resnet8", protocol=dict(epochs=1))
    for m in ("teacher", "ce")
)


def negative():
    s = load_split("mnist5k", 100)
    return replace(s, test=Images(255 - s.test.pixels, s.test.labels))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


V, P = ValueError, ParameterError
CASES = [
    # pixels and labels of one's own
    ("float pixels", lambda d: own(x=PIXELS / 255), V, "expected uint8"),
    ("NaN pixels", lambda d: own(x=torch.full(PIXELS.shape, float("nan"))), V, "expected uint8"),
    (
        "infinite pixels",
        lambda d: own(x=torch.full(PIXELS.shape, float("inf"))),
        V,
        "expected uint8",
    ),
    ("pixels of rank 2", lambda d: own(x=PIXELS.flatten(1)), V, "shape"),
    ("oblong images", lambda d: own(x=PIXELS[..., :6]), V, "H = W"),
    ("two channels", lambda d: own(x=PIXELS.expand(-1, 2, -1, -1)), V, "channels"),
    ("no images", lambda d: own(x=PIXELS[:0], y=LABELS[:0]), V, "no image"),
    ("fewer labels than images", lambda d: own(y=LABELS[:-1]), V, "one for each image"),
    ("one-hot labels", lambda d: own(y=torch.eye(C)[LABELS]), V, "one for each image"),
    ("float labels", lambda d: own(y=LABELS.float()), V, "integers"),
    ("boolean labels", lambda d: own(y=LABELS > 0), V, "integers"),
    ("labels as words", lambda d: own(y=np.array(["cat"] * N)), V, "integers"),
    ("a negative label", lambda d: own(y=labels((0, -1))), V, "negative"),
    (
        "a label beyond the net",
        lambda d: own(y=labels(*((i, C) for i in range(4)))),
        V,
        "logits of shape (1, 4)",
    ),
    (
        "one class",
        lambda d: own(x=PIXELS[LABELS == 0], y=LABELS[LABELS == 0], student=net(1), teacher=net(1)),
        V,
        "one class",
    ),
    (
        "an empty class",
        lambda d: own(x=PIXELS[LABELS != 1], y=LABELS[LABELS != 1]),
        V,
        "class 1 has no image",
    ),
    (
        "validation images without labels",
        lambda d: own(None, None, PIXELS, LABELS, SPLIT.val.pixels),
        V,
        "together",
    ),
    (
        "validation set misses a class",
        lambda d: own(None, None, PIXELS, LABELS, *only(SPLIT.val, 0, 2)),
        V,
        "class 1 has none",
    ),
    (
        "validation images of another size",
        lambda d: own(None, None, PIXELS, LABELS, SPLIT.val.pixels[..., :6, :6], SPLIT.val.labels),
        V,
        "validation images",
    ),
    (
        "more set aside than there are",
        lambda d: hold_out(SPLIT.train, 50),
        V,
        "cannot be set aside",
    ),
    ("mean without std", lambda d: own(mean=[0.5]), V, "together"),
    ("std of zero", lambda d: own(mean=[0.5], std=[0.0]), V, "std"),
    ("mean of three channels for one", lambda d: own(mean=[0.5] * 3, std=[0.2] * 3), V, "channel"),
    ("mean that is NaN", lambda d: own(mean=[float("nan")], std=[0.2]), V, "mean"),
    ("a crop beyond the image", lambda d: own(pad=-1), V, "pad"),
    # nets
    ("teacher with other classes", lambda d: own(teacher=net(C + 1)), V, "teacher"),
    ("student with other classes", lambda d: own(student=net(C + 1)), V, "student"),
    ("student without parameters", lambda d: own(student=nn.Flatten()), V, "nothing to train"),
    ("frozen student", lambda d: own(student=net().requires_grad_(False)), V, "nothing to train"),
    ("student returns a tuple", lambda d: own(student=Tuple()), V, "tuple"),
    ("teacher returns a tuple", lambda d: own(teacher=Tuple()), V, "tuple"),
    ("student for other channels", lambda d: own(student=net(channels=3)), V, "student"),
    (
        "batch of one with BatchNorm",
        lambda d: on(SPLIT, CE(), Pooling(), Protocol(epochs=1, batch_size=1)),
        V,
        "batch_size",
    ),
    ("no teacher", lambda d: on(SPLIT, KD(), teacher=None), V, "needs a teacher"),
    (
        "a diverged student",
        lambda d: on(SPLIT, CE(), Diverged()),
        NonFiniteLoss,
        "hard loss is nan",
    ),
    (
        "a diverged teacher",
        lambda d: on(SPLIT, KD(), teacher=Diverged()),
        NonFiniteLoss,
        "soft loss is nan",
    ),
    ("a device that is not there", lambda d: own(device="cuda:77"), V, "not available"),
    ("an unknown net", lambda d: models.create_model("resnet9", 10), V, "resnet{8, 14"),
    ("a net without classes", lambda d: models.create_model("resnet8", 0), V, "num_classes"),
    ("a net that is a name", lambda d: own(student="resnet8"), V, "the student is a str"),
    (
        "student and teacher share a layer",
        lambda d: own(
            student=nn.Sequential(*(shared := net())[:5], nn.Linear(64, C)), teacher=shared
        ),
        V,
        "share parameters",
    ),
    ("a teacher of integers", lambda d: own(teacher=Whole()), V, "expected logits"),
    ("a method with three teachers", lambda d: own(method="lfme"), V, "taught by 3 nets"),
    ("k in a method without", lambda d: own(method="kd", k=3), V, "neither of method 'kd'"),
    ("pixels scaled like pixels", lambda d: own(mean=[127.0], std=[50.0]), V, "divide by 255"),
    (
        "images set aside beside images given",
        lambda d: own(None, None, PIXELS, LABELS, *SPLIT.val, val_per_class=2),
        V,
        "one of the two",
    ),
    (
        "a head for a net that has one",
        lambda d: own(head_init="kaiming"),
        V,
        "would change nothing",
    ),
    ("a seed that is not whole", lambda d: own(seed=1.5), V, "whole number"),
    ("half a pixel of padding", lambda d: own(pad=1.5), V, "whole numbers"),
    (
        "float pixels in a split",
        lambda d: on(replace(SPLIT, train=Images(PIXELS.float() / 255, LABELS))),
        V,
        "expected uint8",
    ),
    (
        "labels of 32 bits in a split",
        lambda d: on(replace(SPLIT, val=Images(SPLIT.val.pixels, SPLIT.val.labels.int()))),
        V,
        "int64",
    ),
    (
        "a negative label in a split",
        lambda d: on(replace(SPLIT, train=Images(PIXELS, labels((0, -100))))),
        V,
        "from 0 on",
    ),
    ("a memo of no size", lambda d: on(SPLIT, KD(), memo_gib=float("nan")), V, "memo_gib"),
    (
        "weights that overflow in the last step",
        lambda d: own(method="ce", batch_size=100, lr=1e38, weight_decay=100.0),
        NonFiniteLoss,
        "parameters",
    ),
    # splits
    ("rho below 1", lambda d: long_tailed_counts(100, 10, 0.5), V, ">= 1"),
    ("rho infinite", lambda d: long_tailed_counts(100, 10, float("inf")), V, "rho"),
    ("rho NaN", lambda d: long_tailed_counts(100, 10, float("nan")), V, "rho"),
    ("rho huge", lambda d: load_split("mnist5k", 1e6), V, "would leave class"),
    ("a data set that nobody knows", lambda d: load_split("mnist6k", 10), V, "mnist5k"),
    (
        "a data folder that is not there",
        lambda d: load_split("fashion_mnist", 10, data_dir=d / "none"),
        (V, OSError),
        "none",
    ),
    (
        "an empty data folder",
        lambda d: load_split("cifar10", 10, data_dir=d),
        PlainError,
        "cifar-10-python.tar.gz",
    ),
    ("no validation images left", lambda d: load_split("mnist5k", 10, n_val=0), V, "1 to"),
    # losses
    (
        "logits and labels of other lengths",
        lambda d: losses.hard_loss(logits(4, 3), torch.zeros(5).long()),
        V,
        "shape (4,)",
    ),
    (
        "label beyond the logits",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0, 3])),
        V,
        "0 to 2",
    ),
    (
        "a label that PyTorch would ignore",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0, -100])),
        V,
        "0 to 2",
    ),
    (
        "logits and more",
        lambda d: losses.hard_loss((logits(4, 3), None), LABELS[:4]),
        V,
        "is a tuple",
    ),
    (
        "temperature infinite",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), float("inf")),
        V,
        "temperature",
    ),
    (
        "float labels in a loss",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0.0, 1.0])),
        V,
        "integer class numbers",
    ),
    (
        "student and teacher of other shapes",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 2), 4.0),
        V,
        "(4, 2)",
    ),
    (
        "temperature zero",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), 0.0),
        V,
        "temperature",
    ),
    (
        "temperature negative",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), -1.0),
        V,
        "temperature",
    ),
    (
        "student and teacher of other dtypes",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3).double(), 4.0),
        V,
        "float64",
    ),
    # hypergradient
    ("estimator nobody knows", lambda d: hyper(estimator="magic"), V, "jvp"),
    ("learning rate zero", lambda d: hyper(lr=0.0), V, "lr"),
    (
        "hypergradient of a frozen student",
        lambda d: hyper(student=net().double().requires_grad_(False)),
        V,
        "nothing to train",
    ),
    (
        "weights of float32, losses of float64",
        lambda d: hyper(weight_net=WeightNet()),
        V,
        "float32",
    ),
    (
        "teacher logits of another batch",
        lambda d: hyper(teacher_logits=torch.randn(4, 3).double()),
        V,
        "(4, 3)",
    ),
    ("weights without a second dimension", lambda d: slopes(w=torch.ones(5)), V, "expected (B, K)"),
    ("one weight for all", lambda d: slopes(w=torch.ones(1, 1)), V, "differ in shape"),
    (
        "a gradient of another net",
        lambda d: slopes(grads=(torch.zeros(1),)),
        V,
        "grads have shapes",
    ),
    ("learning rate infinite", lambda d: hyper(lr=float("inf")), V, "finite learning rate"),
    (
        "an empty validation batch",
        lambda d: hyper(x_val=torch.randn(0, 1, 8, 8).double(), y_val=torch.zeros(0).long()),
        V,
        "0 validation images",
    ),
    (
        "a weight net with one output",
        lambda d: hyper(weight_net=nn.Linear(2, 1).double()),
        V,
        "returns (5, 1)",
    ),
    (
        "a frozen weight net",
        lambda d: hyper(weight_net=WeightNet().double().requires_grad_(False)),
        V,
        "nothing to learn with",
    ),
    # numbers about answers
    (
        "logits that are NaN in the calibration error",
        lambda d: expected_calibration_error(logits(4, 3) * float("nan"), LABELS[:4]),
        V,
        "NaN",
    ),
    ("one label for many logits", lambda d: accuracy_pct(logits(4, 3), LABELS[:1]), V, "(1,)"),
    (
        "labels beyond the logits in a confusion matrix",
        lambda d: confusion_matrix(logits(4, 3), torch.full((4,), 7)),
        V,
        "0 to 2",
    ),
    ("no bin", lambda d: calibration(logits(4, 3), LABELS[:4], bins=0), V, "bins=0"),
    (
        "test images without a class",
        lambda d: summarise(
            [dict(test_acc_pct=1.0, val_acc_pct=1.0)],
            logits(4, 3),
            torch.zeros(4).long(),
            [5, 4, 3],
        ),
        V,
        "of 1 classes",
    ),
    ("an interval of what is no number", lambda d: interval([5.0, float("nan")]), V, "finite"),
    # settings
    ("no hidden layer", lambda d: plan(methods="bikd", change="hidden=[]"), V, "hidden"),
    ("a hidden layer of nothing", lambda d: plan(methods="bikd", change="hidden=[0]"), V, "hidden"),
    (
        "temperature beyond reason",
        lambda d: plan(methods="kd", temperature=1e200),
        V,
        "temperature",
    ),
    ("learning rate beyond float32", lambda d: plan(methods="ce", lr=1e300), V, "lr"),
    (
        "a value given twice over",
        lambda d: plan(methods="ce", lr=0.5, change="lr=.01"),
        V,
        "parameter of its own",
    ),
    (
        "a change named twice",
        lambda d: plan(methods="ce", change="momentum=0 momentum=0.5"),
        V,
        "twice",
    ),
    ("k zero", lambda d: BiKD(k=0), V, "k"),
    ("k not whole", lambda d: BiKD(k=2.5), V, "k"),
    ("temperature zero in a method", lambda d: KD(temperature=0.0), V, "temperature"),
    (
        "k larger than an epoch, counted by epoch",
        lambda d: on(
            SPLIT, BiKD(k=9, update_rule="per_epoch"), protocol=Protocol(epochs=9, batch_size=10)
        ),
        V,
        "batches of an epoch",
    ),
    ("temperature NaN", lambda d: KD(temperature=float("nan")), V, "temperature"),
    ("a field nobody knows", lambda d: own(colour="red"), V, "colour"),
    ("learning rate negative", lambda d: Protocol(lr=-1.0), V, "lr"),
    ("epochs zero", lambda d: Protocol(epochs=0), V, "epochs"),
    ("momentum of one", lambda d: Protocol(momentum=1.0), V, "momentum"),
    ("decay after the end", lambda d: Protocol(decay_at=(1.5,)), V, "decay_at"),
    ("a method nobody knows", lambda d: get_method("nope"), V, "bikd"),
    ("a preset nobody knows", lambda d: preset("dirty", "kd"), V, "clean"),
    ("weight net without hidden units", lambda d: WeightNet(hidden=(0,)), V, "hidden"),
    # parameters of the notebook
    ("rho as a word", lambda d: Parameters(rho="many"), ValidationError, "valid number"),
    ("k in no method", lambda d: plan(k=3, methods="ce kd"), V, "would change nothing"),
    (
        "k larger than a run, before its teacher is trained",
        lambda d: plan(methods="bikd", k=10**6),
        V,
        "never move",
    ),
    (
        "k larger than a run",
        lambda d: on(SPLIT, BiKD(k=10**6, update_rule="count_then_test")),
        V,
        "never move",
    ),
    ("a seed below zero", lambda d: plan(seeds="-1"), V, "whole numbers"),
    (
        "runs_dir is a file",
        lambda d: ((d / "x").write_text(""), plan(runs_dir=str(d / "x"))),
        V,
        "is a file",
    ),
    ("no such device", lambda d: plan(device="abacus"), V, "cpu"),
    (
        "memo of negative size",
        lambda d: Parameters(memo_gib=-1.0),
        ValidationError,
        "greater than or equal",
    ),
    # files of experiments
    ("no mapping", lambda d: read_graph(["mnist5k"]), V, "mapping"),
    (
        "an experiment of nothing",
        lambda d: read_graph(dict(runs_dir="x", experiments=[dict(methods=[])])).jobs(),
        V,
        "empty list",
    ),
    (
        "a device nobody has",
        lambda d: read_graph(dict(runs_dir="x", experiments=[{}], device="abacus")),
        V,
        "device",
    ),
    (
        "a report with our name",
        lambda d: read_graph(
            dict(
                runs_dir="x",
                experiments=[{}],
                reports=dict(provenance=dict(notebook="nbs/table1.ipynb")),
            )
        ),
        V,
        "another name",
    ),
    # runs, beside records that are there
    (
        "a run on a device that is not there",
        lambda d: asked(d, rho=50, device="cuda:77"),
        V,
        "not available",
    ),
    (
        "a run whose φ never moves",
        lambda d: asked(d, "bikd", settings=dict(k=10**6), teacher_run=TEACHER.run_id),
        V,
        "never move",
    ),
    (
        "a run with a memo of no size",
        lambda d: asked(d, rho=50, memo_gib=float("nan")),
        V,
        "memo_gib",
    ),
    (
        "a teacher that is not there",
        lambda d: asked(d, "kd", teacher_run="nobody"),
        RecordError,
        "no finished teacher",
    ),
    (
        "a teacher of another split",
        lambda d: asked(d, "kd", seed=1, teacher_run=TEACHER.run_id),
        RecordError,
        "saw other images",
    ),
    (
        "a teacher of another kind",
        lambda d: asked(
            d, "dive", settings=dict(balanced_teacher=True), teacher_run=TEACHER.run_id
        ),
        RecordError,
        "'teacher_bsce' was expected",
    ),
    (
        "a teacher of other pixels",
        lambda d: asked(d, "kd", dict(normalisation="released"), teacher_run=TEACHER.run_id),
        RecordError,
        "scaled by",
    ),
    (
        "images that the record does not know",
        lambda d: asked(d, split=negative()),
        RecordError,
        "other images",
    ),
    (
        "a damaged record",
        lambda d: (flip(d / "given" / STUDENT.run_id / "summary.json"), asked(d))[1],
        RecordError,
        "damaged or foreign",
    ),
    (
        "a damaged teacher",
        lambda d: (
            flip(d / "given" / TEACHER.run_id / "student.safetensors"),
            asked(d, "kd", teacher_run=TEACHER.run_id),
        )[1],
        RecordError,
        "damaged or foreign",
    ),
    (
        "a record that lost its summary",
        lambda d: (
            (d / "given" / STUDENT.run_id / "summary.json").unlink(),
            find_runs(d / "given"),
        ),
        RecordError,
        "no summary.json",
    ),
    (
        "a copied record",
        lambda d: (
            shutil.copytree(d / "given" / STUDENT.run_id, d / "given" / "copy"),
            find_runs(d / "given"),
        ),
        RecordError,
        "are the same run",
    ),
    (
        "a file that is a folder",
        lambda d: (
            (p := d / "given" / STUDENT.run_id / "metrics.csv").unlink(),
            p.mkdir(),
            Run(p.parent).metrics,
        ),
        RecordError,
        "has no metrics.csv",
    ),
    (
        "records of two kinds averaged",
        lambda d: (
            shutil.copytree(d / "given", d / "x" / "given"),
            asked(d / "x", protocol=dict(epochs=2)),
            accuracy_table(find_runs(d / "x" / "given")),
        ),
        V,
        "cannot be averaged",
    ),
]


def test_the_table_is_long_and_its_names_differ(root):
    assert (
        len({c[0] for c in CASES}) == len(CASES)
        and f"{len(CASES)} cases" in (root / "LIMITS.md").read_text()
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    "A teacher's and a student's, of one epoch each."
    folder = tmp_path_factory.mktemp("records")
    for cfg in (TEACHER, STUDENT):
        run(cfg, folder, show=False)
    return folder


@pytest.mark.parametrize("call,error,words", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_refused_in_words(tmp_path, monkeypatch, records, call, error, words):
    shutil.copytree(records, tmp_path / "given")
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call(tmp_path)
    assert words in str(caught.value), str(caught.value)
    made = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before}
    own_work = words in (
        "damaged or foreign",
        "no summary.json",
        "has no metrics.csv",
    )  # the case itself has damaged a record
    assert own_work or all(
        (tmp_path / "given" / p.relative_to(records)).read_bytes() == p.read_bytes()
        for p in records.rglob("*")
        if p.is_file()
    )
    assert all(re.match(r"x|given/copy|\.bikd-fetch\.lock", name) for name in made), (
        made
    )  # what the case itself made, and a lock beside files that were looked for
