"""Bad input in one table: the right exception, a message in words, and nothing written.

A message says what was given, what is allowed and what to do. Each case is a name, a call that gets
a folder, words that the message must hold and, where it is not ValueError, the exception.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from nets import conv_net
from pydantic import ValidationError
from torch import nn

from bikd import losses, models
from bikd.basics import PlainError, RecordError
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
N_CLASSES = SPLIT.n_classes
ONE_EPOCH = Protocol(epochs=1, batch_size=10, lr=0.02)
TEACHER = make_config("mnist5k", 100, 0, "teacher", net="resnet8", protocol=dict(epochs=1))
STUDENT = make_config("mnist5k", 100, 0, "ce", net="resnet8", protocol=dict(epochs=1))
RECORDS = "given"  # the folder in which each case finds the records of these two


# --- nets that are no students


class ReturnsTuple(nn.Module):
    "Logits and something else."

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x), x


class ReturnsClasses(nn.Module):
    "Class numbers instead of logits."

    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x).round().long()


class Diverged(nn.Module):
    "Its last weights are NaN."

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        weight, _ = self.net[-1].parameters()
        weight.data.fill_(float("nan"))

    def forward(self, x):
        return self.net(x)


class NormalisesAfterPooling(nn.Module):
    "BatchNorm after global pooling: for a batch of one it sees one value per channel."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(4, N_CLASSES),
        )

    def forward(self, x):
        return self.net(x)


def frozen(net):
    return net.requires_grad_(False)


# --- images, labels and logits


def labels_with(changes):
    "The training labels, some of them replaced: `changes` maps an image's index to its label."
    y = LABELS.clone()
    for index, label in changes.items():
        y[index] = label
    return y


def only_classes(images, *classes):
    "The images of these classes."
    wanted = torch.isin(images.labels, torch.tensor(classes))
    return images.take(wanted.nonzero()[:, 0])


def negatives():
    "The split of the records, its test images inverted."
    split = load_split("mnist5k", 100)
    return replace(split, test=Images(255 - split.test.pixels, split.test.labels))


def logits(*shape):
    return torch.zeros(*shape)


# --- calls that work unless an argument says otherwise


def distill_toy(
    images=PIXELS,
    labels=LABELS,
    *,
    val=None,  # validation pixels and labels
    teacher=None,
    student=None,
    **options,
):
    "`bikd.distill` on the toy split."
    defaults = dict(epochs=1, batch_size=10, pad=1, show=False)
    if "method" not in options:
        defaults["k"] = 1
    if val is not None:
        defaults |= dict(val_images=val.pixels, val_labels=val.labels)
    teacher = teacher or conv_net()
    student = student or conv_net()
    return distill(teacher, student, images, labels, **defaults | options)


def distill_between_nets_that_share_a_layer():
    teacher = conv_net()
    student = nn.Sequential(*teacher[:5], nn.Linear(64, N_CLASSES))
    return distill_toy(teacher=teacher, student=student)


def train_toy(method=None, *, split=SPLIT, student=None, protocol=ONE_EPOCH, **options):
    "`bikd.training.train` on the toy split."
    defaults: dict[str, Any] = dict(teacher=conv_net(), show=False)
    return train(student or conv_net(), method or BiKD(), split, protocol, **defaults | options)


def hypergradient_of(*, lr=0.1, temperature=4.0, estimator="jvp", **tensors):
    "The hypergradient of small nets on five training images and four validation images."
    defaults: dict[str, Any] = dict(
        student=conv_net().double(),
        weight_net=WeightNet().double(),
        x=torch.randn(5, 1, 8, 8).double(),
        y=torch.tensor([0, 1, 2, 0, 1]),
        teacher_logits=torch.randn(5, 3).double(),
        x_val=torch.randn(4, 1, 8, 8).double(),
        y_val=torch.tensor([0, 1, 2, 0]),
    )
    return hypergradient(**defaults | tensors, lr=lr, temperature=temperature, estimator=estimator)


def weight_gradient_of(weights=None, grads=None):
    "The gradient by the weights of five losses of one parameter."
    x = torch.randn(5)

    def losses(theta):
        return (theta["a"] * x)[:, None] ** 2

    def val_loss(theta):
        return theta["a"].sum() ** 2

    weights = torch.ones(5, 1) if weights is None else weights
    return weight_gradient(losses, val_loss, dict(a=torch.ones(1)), weights, 0.1, grads=grads)


def plan_of(**parameters):
    return make_plan(Parameters(**parameters))


def plan_into_a_file(folder):
    (folder / "x").write_text("")
    return plan_of(runs_dir=str(folder / "x"))


# --- runs beside the records that are there


def run_beside(
    folder,  # that of the case, which holds the records
    method="ce",
    *,
    rho=100,
    seed=0,
    teacher_run=None,
    protocol=None,
    settings=None,
    **options,  # of `run`
):
    "A run of one epoch in the folder of the records."
    cfg = make_config(
        "mnist5k",
        rho,
        seed,
        method,
        net="resnet8",
        protocol=dict(epochs=1) | (protocol or {}),
        settings=settings,
        teacher_run=teacher_run,
    )
    return run(cfg, folder / RECORDS, show=False, **options)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def load_a_damaged_record(folder):
    flip_a_bit(folder / RECORDS / STUDENT.run_id / "summary.json")
    return run_beside(folder)


def learn_from_a_damaged_teacher(folder):
    flip_a_bit(folder / RECORDS / TEACHER.run_id / "student.safetensors")
    return run_beside(folder, "kd", teacher_run=TEACHER.run_id)


def find_a_record_without_summary(folder):
    (folder / RECORDS / STUDENT.run_id / "summary.json").unlink()
    return find_runs(folder / RECORDS)


def find_a_record_twice(folder):
    shutil.copytree(folder / RECORDS / STUDENT.run_id, folder / RECORDS / "copy")
    return find_runs(folder / RECORDS)


def read_a_file_that_is_a_folder(folder):
    path = folder / RECORDS / STUDENT.run_id / "metrics.csv"
    path.unlink()
    path.mkdir()
    return Run(path.parent).metrics


def average_records_of_two_kinds(folder):
    shutil.copytree(folder / RECORDS, folder / "x" / RECORDS)
    run_beside(folder / "x", protocol=dict(epochs=2))
    return accuracy_table(find_runs(folder / "x" / RECORDS))


class Case(NamedTuple):
    name: str
    call: Callable[[Path], object]  # gets the folder of the case
    words: str  # that the message holds
    error: type[Exception] | tuple[type[Exception], ...] = ValueError


CASES = [
    # pixels and labels of one's own
    Case("float pixels", lambda d: distill_toy(PIXELS / 255), "expected uint8"),
    Case(
        "NaN pixels",
        lambda d: distill_toy(torch.full(PIXELS.shape, float("nan"))),
        "expected uint8",
    ),
    Case(
        "infinite pixels",
        lambda d: distill_toy(torch.full(PIXELS.shape, float("inf"))),
        "expected uint8",
    ),
    Case("pixels of rank 2", lambda d: distill_toy(PIXELS.flatten(1)), "shape"),
    Case("oblong images", lambda d: distill_toy(PIXELS[..., :6]), "H = W"),
    Case("two channels", lambda d: distill_toy(PIXELS.expand(-1, 2, -1, -1)), "channels"),
    Case("no images", lambda d: distill_toy(PIXELS[:0], labels=LABELS[:0]), "no image"),
    Case(
        "fewer labels than images", lambda d: distill_toy(labels=LABELS[:-1]), "one for each image"
    ),
    Case(
        "one-hot labels",
        lambda d: distill_toy(labels=torch.eye(N_CLASSES)[LABELS]),
        "one for each image",
    ),
    Case("float labels", lambda d: distill_toy(labels=LABELS.float()), "integers"),
    Case("boolean labels", lambda d: distill_toy(labels=LABELS > 0), "integers"),
    Case(
        "labels as words", lambda d: distill_toy(labels=np.array(["cat"] * len(LABELS))), "integers"
    ),
    Case("a negative label", lambda d: distill_toy(labels=labels_with({0: -1})), "negative"),
    Case(
        "a label beyond the net",
        lambda d: distill_toy(labels=labels_with(dict.fromkeys(range(4), N_CLASSES))),
        "logits of shape (1, 4)",
    ),
    Case(
        "one class",
        lambda d: distill_toy(
            PIXELS[LABELS == 0],
            labels=LABELS[LABELS == 0],
            student=conv_net(n_classes=1),
            teacher=conv_net(n_classes=1),
        ),
        "one class",
    ),
    Case(
        "an empty class",
        lambda d: distill_toy(PIXELS[LABELS != 1], labels=LABELS[LABELS != 1]),
        "class 1 has no image",
    ),
    Case(
        "validation images without labels",
        lambda d: distill_toy(val_images=SPLIT.val.pixels),
        "together",
    ),
    Case(
        "validation set misses a class",
        lambda d: distill_toy(val=only_classes(SPLIT.val, 0, 2)),
        "class 1 has none",
    ),
    Case(
        "validation images of another size",
        lambda d: distill_toy(val=Images(SPLIT.val.pixels[..., :6, :6], SPLIT.val.labels)),
        "validation images",
    ),
    Case(
        "more set aside than there are", lambda d: hold_out(SPLIT.train, 50), "cannot be set aside"
    ),
    Case("mean without std", lambda d: distill_toy(mean=[0.5]), "together"),
    Case("std of zero", lambda d: distill_toy(mean=[0.5], std=[0.0]), "std"),
    Case(
        "mean of three channels for one",
        lambda d: distill_toy(mean=[0.5] * 3, std=[0.2] * 3),
        "channel",
    ),
    Case("mean that is NaN", lambda d: distill_toy(mean=[float("nan")], std=[0.2]), "mean"),
    Case("a crop beyond the image", lambda d: distill_toy(pad=-1), "pad"),
    # nets
    Case(
        "teacher with other classes",
        lambda d: distill_toy(teacher=conv_net(n_classes=N_CLASSES + 1)),
        "teacher",
    ),
    Case(
        "student with other classes",
        lambda d: distill_toy(student=conv_net(n_classes=N_CLASSES + 1)),
        "student",
    ),
    Case(
        "student without parameters",
        lambda d: distill_toy(student=nn.Flatten()),
        "nothing to train",
    ),
    Case("frozen student", lambda d: distill_toy(student=frozen(conv_net())), "nothing to train"),
    Case("student returns a tuple", lambda d: distill_toy(student=ReturnsTuple()), "tuple"),
    Case("teacher returns a tuple", lambda d: distill_toy(teacher=ReturnsTuple()), "tuple"),
    Case(
        "student for other channels", lambda d: distill_toy(student=conv_net(channels=3)), "student"
    ),
    Case(
        "batch of one with BatchNorm",
        lambda d: train_toy(
            CE(), student=NormalisesAfterPooling(), protocol=Protocol(epochs=1, batch_size=1)
        ),
        "batch_size",
    ),
    Case("no teacher", lambda d: train_toy(KD(), teacher=None), "needs a teacher"),
    Case(
        "a diverged student",
        lambda d: train_toy(CE(), student=Diverged()),
        "hard loss is nan",
        NonFiniteLoss,
    ),
    Case(
        "a diverged teacher",
        lambda d: train_toy(KD(), teacher=Diverged()),
        "the teacher's logit of class 0 is nan",
        NonFiniteLoss,
    ),
    Case("a device that is not there", lambda d: distill_toy(device="cuda:77"), "not available"),
    Case("an unknown net", lambda d: models.create_model("resnet9", 10), "resnet{8, 14"),
    Case("a net without classes", lambda d: models.create_model("resnet8", 0), "num_classes"),
    Case("a net that is a name", lambda d: distill_toy(student="resnet8"), "the student is a str"),
    Case(
        "student and teacher share a layer",
        lambda d: distill_between_nets_that_share_a_layer(),
        "share parameters",
    ),
    Case(
        "a teacher of integers", lambda d: distill_toy(teacher=ReturnsClasses()), "expected logits"
    ),
    Case("a method with three teachers", lambda d: distill_toy(method="lfme"), "taught by 3 nets"),
    Case(
        "k in a method without", lambda d: distill_toy(method="kd", k=3), "neither of method 'kd'"
    ),
    Case(
        "pixels scaled like pixels",
        lambda d: distill_toy(mean=[127.0], std=[50.0]),
        "divide by 255",
    ),
    Case(
        "images set aside beside images given",
        lambda d: distill_toy(val=SPLIT.val, val_per_class=2),
        "one of the two",
    ),
    Case(
        "a head for a net that has one",
        lambda d: distill_toy(head_init="kaiming"),
        "would change nothing",
    ),
    Case("a seed that is not whole", lambda d: distill_toy(seed=1.5), "whole number"),
    Case("half a pixel of padding", lambda d: distill_toy(pad=1.5), "whole numbers"),
    Case(
        "float pixels in a split",
        lambda d: train_toy(split=replace(SPLIT, train=Images(PIXELS.float() / 255, LABELS))),
        "expected uint8",
    ),
    Case(
        "labels of 32 bits in a split",
        lambda d: train_toy(
            split=replace(SPLIT, val=Images(SPLIT.val.pixels, SPLIT.val.labels.int()))
        ),
        "int64",
    ),
    Case(
        "a negative label in a split",
        lambda d: train_toy(split=replace(SPLIT, train=Images(PIXELS, labels_with({0: -100})))),
        "from 0 on",
    ),
    Case("a memo of no size", lambda d: train_toy(KD(), memo_gib=float("nan")), "memo_gib"),
    Case(
        "weights that overflow in the last step",
        lambda d: distill_toy(method="ce", batch_size=100, lr=1e38, weight_decay=100.0),
        "parameters",
        NonFiniteLoss,
    ),
    # splits
    Case("rho below 1", lambda d: long_tailed_counts(100, 10, 0.5), ">= 1"),
    Case("rho infinite", lambda d: long_tailed_counts(100, 10, float("inf")), "rho"),
    Case("rho NaN", lambda d: long_tailed_counts(100, 10, float("nan")), "rho"),
    Case("rho huge", lambda d: load_split("mnist5k", 1e6), "would leave class"),
    Case("a data set that nobody knows", lambda d: load_split("mnist6k", 10), "mnist5k"),
    Case(
        "a data folder that is not there",
        lambda d: load_split("fashion_mnist", 10, data_dir=d / "none"),
        "none",
        (ValueError, OSError),
    ),
    Case(
        "an empty data folder",
        lambda d: load_split("cifar10", 10, data_dir=d),
        "cifar-10-python.tar.gz",
        PlainError,
    ),
    Case("no validation images left", lambda d: load_split("mnist5k", 10, n_val=0), "1 to"),
    # losses
    Case(
        "logits and labels of other lengths",
        lambda d: losses.hard_loss(logits(4, 3), torch.zeros(5).long()),
        "shape (4,)",
    ),
    Case(
        "label beyond the logits",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0, 3])),
        "0 to 2",
    ),
    Case(
        "a label that PyTorch would ignore",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0, -100])),
        "0 to 2",
    ),
    Case(
        "logits and more",
        lambda d: losses.hard_loss((logits(4, 3), None), LABELS[:4]),  # type: ignore[arg-type]
        "is a tuple",
    ),
    Case(
        "temperature infinite",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), float("inf")),
        "temperature",
    ),
    Case(
        "float labels in a loss",
        lambda d: losses.hard_loss(logits(2, 3), torch.tensor([0.0, 1.0])),
        "integer class numbers",
    ),
    Case(
        "student and teacher of other shapes",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 2), 4.0),
        "(4, 2)",
    ),
    Case(
        "temperature zero",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), 0.0),
        "temperature",
    ),
    Case(
        "temperature negative",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3), -1.0),
        "temperature",
    ),
    Case(
        "student and teacher of other dtypes",
        lambda d: losses.soft_loss(logits(4, 3), logits(4, 3).double(), 4.0),
        "float64",
    ),
    # hypergradient
    Case("estimator nobody knows", lambda d: hypergradient_of(estimator="magic"), "jvp"),
    Case("learning rate zero", lambda d: hypergradient_of(lr=0.0), "lr"),
    Case(
        "hypergradient of a frozen student",
        lambda d: hypergradient_of(student=frozen(conv_net().double())),
        "nothing to train",
    ),
    Case(
        "weights of float32, losses of float64",
        lambda d: hypergradient_of(weight_net=WeightNet()),
        "float32",
    ),
    Case(
        "teacher logits of another batch",
        lambda d: hypergradient_of(teacher_logits=torch.randn(4, 3).double()),
        "(4, 3)",
    ),
    Case(
        "weights without a second dimension",
        lambda d: weight_gradient_of(torch.ones(5)),
        "expected (B, K)",
    ),
    Case("one weight for all", lambda d: weight_gradient_of(torch.ones(1, 1)), "differ in shape"),
    Case(
        "a gradient of another net",
        lambda d: weight_gradient_of(grads=[torch.zeros(1), torch.zeros(1)]),
        "grads have shapes",
    ),
    Case(
        "learning rate infinite",
        lambda d: hypergradient_of(lr=float("inf")),
        "finite learning rate",
    ),
    Case(
        "an empty validation batch",
        lambda d: hypergradient_of(
            x_val=torch.randn(0, 1, 8, 8).double(), y_val=torch.zeros(0).long()
        ),
        "0 validation images",
    ),
    Case(
        "a weight net with one output",
        lambda d: hypergradient_of(weight_net=nn.Linear(2, 1).double()),
        "returns (5, 1)",
    ),
    Case(
        "a frozen weight net",
        lambda d: hypergradient_of(weight_net=frozen(WeightNet().double())),
        "nothing to learn with",
    ),
    # numbers about answers
    Case(
        "logits that are NaN in the calibration error",
        lambda d: expected_calibration_error(logits(4, 3) * float("nan"), LABELS[:4]),
        "NaN",
    ),
    Case("one label for many logits", lambda d: accuracy_pct(logits(4, 3), LABELS[:1]), "(1,)"),
    Case(
        "labels beyond the logits in a confusion matrix",
        lambda d: confusion_matrix(logits(4, 3), torch.full((4,), 7)),
        "0 to 2",
    ),
    Case("no bin", lambda d: calibration(logits(4, 3), LABELS[:4], bins=0), "bins=0"),
    Case(
        "test images without a class",
        lambda d: summarise(
            [dict(test_acc_pct=1.0, val_acc_pct=1.0)],
            logits(4, 3),
            torch.zeros(4).long(),
            [5, 4, 3],
        ),
        "of 1 classes",
    ),
    Case("an interval of what is no number", lambda d: interval([5.0, float("nan")]), "finite"),
    # settings
    Case("no hidden layer", lambda d: plan_of(methods="bikd", change="hidden=[]"), "hidden"),
    Case(
        "a hidden layer of nothing",
        lambda d: plan_of(methods="bikd", change="hidden=[0]"),
        "hidden",
    ),
    Case(
        "temperature beyond reason",
        lambda d: plan_of(methods="kd", temperature=1e200),
        "temperature",
    ),
    Case("learning rate beyond float32", lambda d: plan_of(methods="ce", lr=1e300), "lr"),
    Case(
        "a value given twice over",
        lambda d: plan_of(methods="ce", lr=0.5, change="lr=.01"),
        "parameter of its own",
    ),
    Case(
        "a change named twice",
        lambda d: plan_of(methods="ce", change="momentum=0 momentum=0.5"),
        "twice",
    ),
    Case("k zero", lambda d: BiKD(k=0), "k"),
    Case("k not whole", lambda d: BiKD(k=2.5), "k"),  # type: ignore[arg-type]
    Case("temperature zero in a method", lambda d: KD(temperature=0.0), "temperature"),
    Case(
        "k larger than an epoch, counted by epoch",
        lambda d: train_toy(
            BiKD(k=9, update_rule="per_epoch"), protocol=Protocol(epochs=9, batch_size=10)
        ),
        "batches of an epoch",
    ),
    Case("temperature NaN", lambda d: KD(temperature=float("nan")), "temperature"),
    Case("a field nobody knows", lambda d: distill_toy(colour="red"), "colour"),
    Case("learning rate negative", lambda d: Protocol(lr=-1.0), "lr"),
    Case("epochs zero", lambda d: Protocol(epochs=0), "epochs"),
    Case("momentum of one", lambda d: Protocol(momentum=1.0), "momentum"),
    Case("decay after the end", lambda d: Protocol(decay_at=(1.5,)), "decay_at"),
    Case("a method nobody knows", lambda d: get_method("nope"), "bikd"),
    Case("a preset nobody knows", lambda d: preset("dirty", "kd"), "clean"),
    Case("weight net without hidden units", lambda d: WeightNet(hidden=(0,)), "hidden"),
    # parameters of the notebook
    Case("rho as a word", lambda d: Parameters(rho="many"), "valid number", ValidationError),  # type: ignore[arg-type]
    Case("k in no method", lambda d: plan_of(k=3, methods="ce kd"), "would change nothing"),
    Case(
        "k larger than a run, before its teacher is trained",
        lambda d: plan_of(methods="bikd", k=10**6),
        "never move",
    ),
    Case(
        "k larger than a run",
        lambda d: train_toy(BiKD(k=10**6, update_rule="count_then_test")),
        "never move",
    ),
    Case("a seed below zero", lambda d: plan_of(seeds="-1"), "whole numbers"),
    Case("runs_dir is a file", plan_into_a_file, "is a file"),
    Case("no such device", lambda d: plan_of(device="abacus"), "cpu"),
    Case(
        "memo of negative size",
        lambda d: Parameters(memo_gib=-1.0),
        "greater than or equal",
        ValidationError,
    ),
    # files of experiments
    Case("no mapping", lambda d: read_graph(["mnist5k"]), "mapping"),  # type: ignore[arg-type]
    Case(
        "an experiment of nothing",
        lambda d: read_graph(dict(runs_dir="x", experiments=[dict(methods=[])])).jobs(),
        "empty list",
    ),
    Case(
        "a device nobody has",
        lambda d: read_graph(dict(runs_dir="x", experiments=[{}], device="abacus")),
        "device",
    ),
    Case(
        "a report with our name",
        lambda d: read_graph(
            dict(
                runs_dir="x",
                experiments=[{}],
                reports=dict(provenance=dict(notebook="nbs/table1.ipynb")),
            )
        ),
        "another name",
    ),
    # runs, beside records that are there
    Case(
        "a run on a device that is not there",
        lambda d: run_beside(d, rho=50, device="cuda:77"),
        "not available",
    ),
    Case(
        "a run whose φ never moves",
        lambda d: run_beside(d, "bikd", settings=dict(k=10**6), teacher_run=TEACHER.run_id),
        "never move",
    ),
    Case(
        "a run with a memo of no size",
        lambda d: run_beside(d, rho=50, memo_gib=float("nan")),
        "memo_gib",
    ),
    Case(
        "a teacher that is not there",
        lambda d: run_beside(d, "kd", teacher_run="nobody"),
        "no finished teacher",
        RecordError,
    ),
    Case(
        "a teacher of another split",
        lambda d: run_beside(d, "kd", seed=1, teacher_run=TEACHER.run_id),
        "saw other images",
        RecordError,
    ),
    Case(
        "a teacher of another kind",
        lambda d: run_beside(
            d, "dive", settings=dict(balanced_teacher=True), teacher_run=TEACHER.run_id
        ),
        "'teacher_bsce' was expected",
        RecordError,
    ),
    Case(
        "a teacher of other pixels",
        lambda d: run_beside(
            d, "kd", protocol=dict(normalisation="released"), teacher_run=TEACHER.run_id
        ),
        "scaled by",
        RecordError,
    ),
    Case(
        "images that the record does not know",
        lambda d: run_beside(d, split=negatives()),
        "other images",
        RecordError,
    ),
    Case("a damaged record", load_a_damaged_record, "damaged or foreign", RecordError),
    Case(
        "a damaged teacher",
        learn_from_a_damaged_teacher,
        "damaged or foreign",
        RecordError,
    ),
    Case(
        "a record that lost its summary",
        find_a_record_without_summary,
        "no summary.json",
        RecordError,
    ),
    Case("a copied record", find_a_record_twice, "are the same run", RecordError),
    Case(
        "a file that is a folder",
        read_a_file_that_is_a_folder,
        "has no metrics.csv",
        RecordError,
    ),
    Case(
        "records of two kinds averaged",
        average_records_of_two_kinds,
        "cannot be averaged",
    ),
]


# These cases damage the records themselves.
DAMAGING = {
    "a damaged record",
    "a damaged teacher",
    "a record that lost its summary",
    "a file that is a folder",
}


def test_the_table_is_long_and_its_names_differ(root):
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert names >= DAMAGING
    assert f"{len(CASES)} cases" in (root / "LIMITS.md").read_text()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    "A teacher's and a student's, of one epoch each."
    folder = tmp_path_factory.mktemp("records")
    for cfg in (TEACHER, STUDENT):
        run(cfg, folder, show=False)
    return folder


def assert_unchanged(given, records):
    "Each file of the records is as it was."
    for path in records.rglob("*"):
        if path.is_file():
            assert (given / path.relative_to(records)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_words(tmp_path, monkeypatch, records, case):
    shutil.copytree(records, tmp_path / RECORDS)
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(case.error) as caught:
        case.call(tmp_path)
    assert case.words in str(caught.value), str(caught.value)
    if case.name not in DAMAGING:
        assert_unchanged(tmp_path / RECORDS, records)
    made = {str(p.relative_to(tmp_path)) for p in set(tmp_path.rglob("*")) - before}
    # what the case itself made, and a lock beside files that were looked for
    allowed = re.compile(r"x|given/copy|\.bikd-fetch\.lock")
    assert all(allowed.match(name) for name in made), made
