"""What fits by its shape but not by its meaning is refused or said, and nothing else is.

And: how many images a net is shown at once, and how much memory large images take.
"""

import copy
import functools
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from bikd import views
from bikd.bikd import BiKD
from bikd.data import pixel_stats, toy_split
from bikd.measuring import NonFiniteLoss, evaluate
from bikd.memo import answer
from bikd.methods import CE, KD
from bikd.own_data import distill, hold_out
from bikd.protocol import Protocol
from bikd.sources import Chosen, Images
from bikd.training import train
from bikd.views import DeviceImages, Views, evaluation_batch

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)  # how the teachers were trained, unless they say


def bright(counts=(60, 40, 30), seed=0):
    "Images whose class is how bright they are, and their labels. All of them are rather dark."
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    light = torch.tensor([5.0, 25.0, 45.0])[labels][:, None, None, None]
    pixels = torch.rand(len(labels), 3, 8, 8, generator=g) * 20 + light
    return pixels.to(torch.uint8), labels


def coloured(counts=(60, 40, 30), seed=0):
    "Images whose class is their brightest channel, and their labels."
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    pixels = torch.randint(0, 100, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=g)
    pixels[torch.arange(len(labels)), labels] += 60
    return pixels, labels


@functools.cache
def taught(images=bright, mean=0.5, std=0.5):
    "A net that knows all the images, scaled by this mean and std."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        pixels, labels = images()
        x = (pixels / 255 - mean) / std
        adam = torch.optim.Adam(net.parameters(), 1e-2 if std > 0.1 else 1e-3)
        for _ in range(300 if std > 0.1 else 1500):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            adam.step()
    assert (net(x).argmax(1) == labels).float().mean() > 0.95
    return net


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def distilled(*images, teacher=None, student=None, **options):
    "What `distill` gives back, and its warnings."
    quick = dict(epochs=1, batch_size=16, lr=0.01, pad=1, flip=False, show=False) | HALF
    if "method" not in options:
        quick["k"] = 1
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = distill(
            teacher or taught(), student or small_net(), *(images or bright()), **quick | options
        )
    assert all(w.filename == __file__ for w in said)  # they point at the line of the call
    return done, [str(w.message) for w in said]


def refused(words, **options):
    with pytest.raises(ValueError, match=words):
        distilled(**options)


# --- the teacher, as it is shown the images


def test_a_teacher_that_knows_the_images_is_not_complained_of_and_stands_beside_the_student():
    done, said = distilled()
    assert said == []
    assert done.history.teacher_train_acc_pct.iloc[-1] > 95
    assert done.history.teacher_val_acc_pct.iloc[-1] > 95


def test_its_accuracy_is_printed_before_the_first_epoch(capsys):
    distilled(show=True)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("the teacher is right on ")
    assert "of the training images and" in first and "of the validation images" in first


def test_without_a_teacher_nothing_is_said_of_one():
    done, said = distilled(method="ce")
    assert said == []
    assert not [column for column in done.history.columns if "teacher" in column]


@pytest.mark.parametrize(
    "trained, shown",
    [
        (dict(mean=0.5, std=0.5), dict(mean=None, std=None)),  # the training images' own
        (dict(mean=0.0, std=1.0), HALF),
        (dict(mean=0.0, std=1 / 255), HALF),
        (dict(mean=0.5, std=0.5), dict(mean=[0.0] * 3, std=[1.0] * 3)),
    ],
)
def test_a_teacher_trained_on_pixels_scaled_otherwise_is_noticed_and_the_scaling_named(
    trained, shown
):
    done, said = distilled(teacher=taught(**trained), method="kd", **shown)
    assert done.history.teacher_train_acc_pct.iloc[-1] < 85
    (found,) = [s for s in said if "knows its images better" in s]
    mean, std = (f"[{', '.join([f'{trained[k]:.4g}'] * 3)}]" for k in ("mean", "std"))
    assert f"mean={mean}, std={std}" in found


def test_a_teacher_trained_on_the_channels_in_reverse_order_is_noticed():
    pixels, labels = coloured()
    _, said = distilled(pixels.flip(1), labels, teacher=taught(coloured))
    assert any("reverse order (images[:, ::-1])" in s for s in said)
    again, said = distilled(pixels.flip(1).numpy()[:, ::-1], labels, teacher=taught(coloured))
    assert said == []
    assert again.history.teacher_train_acc_pct.iloc[-1] > 95


def test_a_teacher_that_numbers_the_classes_otherwise_is_noticed():
    pixels, labels = bright()
    turned = torch.tensor([2, 0, 1])[labels]
    _, said = distilled(pixels, turned)
    assert any("class 0 for 1, 1 for 2, 2 for 0" in s for s in said)
    swapped = torch.tensor([0, 2, 1])[labels]
    _, said = distilled(pixels, swapped, method="kd")
    assert any("class 1 for 2, 2 for 1" in s for s in said)


def test_validation_images_with_other_numbers_than_the_training_images_are_noticed():
    pixels, labels = bright((20, 20, 20), seed=1)
    _, said = distilled(*bright(), pixels, (labels + 1) % 3)
    assert [s for s in said if "of the validation images it mostly takes class" in s]


def test_a_teacher_that_guesses_is_noticed():
    class Guesses(nn.Module):
        "Looks at the noise of one pixel."

        def forward(self, x):
            return x[:, :, 0, 0]

    _, said = distilled(teacher=Guesses())
    assert any("guessing gives 33.3 %" in s for s in said)


def test_a_teacher_that_always_says_the_head_is_near_chance_although_it_is_mostly_right():
    class SaysZero(nn.Module):
        def forward(self, x):
            return x.new_tensor([2.0, 1.0, -1.0]).repeat(len(x), 1) + 0 * x.mean()

    done, said = distilled(*bright((300, 20, 20)), teacher=SaysZero(), method="kd")
    assert done.history.teacher_train_acc_pct.iloc[-1] > 85
    assert any("33.3 % of the training images" in s for s in said)


def test_a_student_that_ends_with_more_than_its_teacher_is_noticed():
    class HalfRight(nn.Module):
        "Knows the classes, and takes half of all images for class 0."

        def __init__(self):
            super().__init__()
            self.net = taught()

        def forward(self, x):
            half = x[:, 0, 0, 0] > x.mean((1, 2, 3))
            return torch.where(half[:, None], x.new_tensor([9.0, 0.0, 0.0]), self.net(x))

    recipe = dict(method="kd", soft_weight=0.0, epochs=30, lr=0.05, pad=0)
    _, said = distilled(teacher=HalfRight(), **recipe)
    assert any("the student ends with" in s and "its teacher has" in s for s in said)


def test_the_look_at_the_nets_leaves_no_trace_in_the_student():
    net = nn.Sequential(small_net(), nn.Dropout(0.2))
    other = copy.deepcopy(net)
    done, _ = distilled(student=net)
    recipe = Protocol(epochs=1, batch_size=16, lr=0.01)
    stats = torch.full((3,), 0.5), torch.full((3,), 0.5)
    method = BiKD(**done.method.model_dump())
    train(other, method, done.split, recipe, teacher=taught(), stats=stats, show=False)
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- answers that are no logits


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_probabilities_are_refused(who):
    net = taught() if who == "teacher" else small_net()
    refused(f"the {who} answers with probabilities", **{who: nn.Sequential(net, nn.Softmax(1))})


def test_probabilities_in_percent_and_hard_labels_are_refused():
    class Percent(nn.Module):
        def forward(self, x):
            return 100 * taught()(x).softmax(1)

    class Hard(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(taught()(x).argmax(1), CLASSES).float()

    refused("sum to 100", teacher=Percent())
    refused("sum to 1", teacher=Hard(), method="kd")


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_log_softmax_is_mentioned_and_changes_nothing_but_rounding(who):
    plain = dict(teacher=taught(), student=nn.Sequential(small_net()).double())
    other = copy.deepcopy(plain)
    other[who].add_module("last", nn.LogSoftmax(1))
    before, said = distilled(**plain)
    assert said == []
    after, said = distilled(**other)
    assert len(said) == 1 and f"the {who} answers with logarithms" in said[0]
    logits = [d.student(torch.zeros(1, 3, 8, 8).double()).log_softmax(1) for d in (before, after)]
    torch.testing.assert_close(*logits)


def test_a_sigmoid_is_mentioned():
    _, said = distilled(teacher=nn.Sequential(taught(), nn.Sigmoid()))
    assert any("as those of a sigmoid do" in s for s in said)


@pytest.mark.parametrize("method", ["kd", "bikd", "cckd"])
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_teacher_that_is_not_finite_is_refused_as_the_teacher(method, value):
    class Masks(nn.Module):
        def forward(self, x):
            return taught()(x).index_fill(1, torch.tensor([2]), value)

    refused("the teacher answers with NaN or infinity for class 2", teacher=Masks(), method=method)


def test_train_blames_the_teacher_too_and_no_learning_rate_before_a_step():
    class Masks(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3].index_fill(1, torch.tensor([2]), -torch.inf)

    last = nn.Linear(64, 3)
    net = nn.Sequential(nn.Flatten(), last)
    with pytest.raises(NonFiniteLoss, match="the teacher's logit of class 2 is -inf") as error:
        train(net, KD(), toy_split(), Protocol(epochs=1), teacher=Masks(), show=False)
    assert "learning rate" not in str(error.value)
    last.bias.data += torch.inf
    with pytest.raises(NonFiniteLoss, match="No step has been made yet") as error:
        train(net, CE(), toy_split(), Protocol(epochs=1), show=False)
    assert "learning rate" not in str(error.value)


# --- parameters of 16 bits


def only_norm_in(dtype):
    net = small_net()
    net[1].to(dtype)
    return net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda dtype: small_net().to(dtype), only_norm_in])
@pytest.mark.parametrize("method", ["ce", "kd", "bikd"])
def test_students_of_16_bits_are_refused_in_words(dtype, make, method, tmp_path):
    name = str(dtype).removeprefix("torch.")
    refused(f"is {name}: so few bits", student=make(dtype), method=method, memo=tmp_path)
    assert not any(tmp_path.iterdir())


def test_train_refuses_them_as_well():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).bfloat16()
    with pytest.raises(ValueError, match="student.float()"):
        train(net, CE(), toy_split(), Protocol(epochs=1), show=False)


def test_what_the_message_advises_works_and_a_teacher_of_16_bits_is_no_obstacle():
    halved = copy.deepcopy(taught()).bfloat16()
    done, said = distilled(teacher=halved, student=small_net().bfloat16().float(), precision="bf16")
    assert said == []
    assert {p.dtype for p in done.student.parameters()} == {torch.float32}


# --- images


@pytest.mark.parametrize("method", ["bikd", "cckd", "l2rw"])
def test_validation_images_that_are_not_balanced_are_noticed_where_they_are_learned_from(method):
    _, said = distilled(*bright(), *bright((40, 2, 1), seed=1), method=method)
    assert any("not balanced: 40 of class 0, 1 of class 2" in s for s in said)


def test_balanced_ones_and_those_that_are_only_measured_on_are_not():
    for counts, method in (((20, 20, 20), "bikd"), ((20, 20, 19), "bikd"), ((40, 2, 1), "kd")):
        _, said = distilled(*bright(), *bright(counts, seed=1), method=method)
        assert said == []


def test_validation_images_that_are_trained_on_are_noticed():
    pixels, labels = bright((40, 40, 40))
    _, said = distilled(pixels, labels, pixels[::2], labels[::2])
    assert any("60 of 60 validation images are training images too" in s for s in said)


def test_pixels_that_were_scaled_before_they_became_whole_numbers_are_noticed():
    pixels, labels = bright()
    _, said = distilled(pixels // 50, labels, method="ce")
    assert any("no pixel of the training images is above 1" in s for s in said)


def test_a_standard_deviation_in_pixel_values_is_refused():
    refused("divide by 255", std=[57.0] * 3)


# --- how many images at once


class Counts(nn.Module):
    "Notes the largest batch it was shown."

    def __init__(self):
        super().__init__()
        self.most = torch.zeros(1)
        self.head = nn.Linear(3, 3)

    def __deepcopy__(self, memo):
        return self  # also the teacher's copy notes it here

    def forward(self, x):
        self.most.fill_(max(self.most.item(), len(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["bikd", "kd", "cckd"])
def test_no_net_is_shown_more_images_at_once_than_their_size_allows(method):
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(24)
    pixels = torch.randint(0, 255, (72, 3, 224, 224), dtype=torch.uint8)
    teacher, student = Counts(), Counts()
    distilled(
        pixels, labels, pixels, labels, teacher=teacher, student=student, method=method,
        batch_size=8,
    )  # fmt: skip
    assert (teacher.most.item(), student.most.item()) == (21, 21)


def test_small_images_are_evaluated_a_thousand_at_once():
    for size, batch in ((28, 1000), (32, 1000), (33, 941), (96, 112)):
        assert evaluation_batch(size) == batch
    images = Images(torch.zeros(2001, 1, 28, 28, dtype=torch.uint8), torch.zeros(2001).long())
    gallery = DeviceImages(images, Views(28), torch.zeros(1), torch.ones(1))
    assert [len(x) for x, _ in gallery.plain()] == [1000, 1000, 1]


# --- large images


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_by_batch_gives_the_same_bits_as_padding_once(monkeypatch, channels):
    split = toy_split(60)
    if channels == 3:
        split = replace(split, train=in_colour(split.train), val=in_colour(split.val))
        split = replace(split, test=in_colour(split.test))
    ends = []
    for small in (64, 0):
        monkeypatch.setattr(views, "_SMALL", small)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        recipe = Protocol(epochs=2, batch_size=20)
        state, progress = train(net, BiKD(k=2), split, recipe, teacher=net_of(channels), show=False)
        ends.append((list(net.parameters()), progress.history))
        assert type(state.train.stored).__name__ == ("_PaddedOnce" if small else "_PaddedByBatch")
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert repr(ends[0][1]) == repr(ends[1][1])


def in_colour(images):
    return Images(images.pixels.repeat(1, 3, 1, 1), images.labels)


def net_of(channels):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 3))


def test_a_part_of_large_images_is_used_like_a_copy_of_it(monkeypatch):
    split = toy_split(60)
    copied = hold_out(split.train, 2)
    monkeypatch.setattr(views, "_SMALL", 0)
    chosen = hold_out(split.train, 2)
    for part, other in zip(chosen, copied, strict=True):
        assert isinstance(part, Chosen) and isinstance(other, Images)
        assert torch.equal(part.pixels, other.pixels) and torch.equal(part.labels, other.labels)
    halves = [replace(split, train=train, val=val) for train, val in (chosen, copied)]
    assert halves[0].hash == halves[1].hash
    stats = [torch.cat(pixel_stats(half)) for half in halves]
    assert torch.equal(*stats)
    ids = torch.tensor([3, 0])
    galleries = [
        DeviceImages(half.train.joined(half.val), half.views, *pixel_stats(half)) for half in halves
    ]
    a, b = (gallery(ids, ids) for gallery in galleries)
    assert torch.equal(a, b)
    net = net_of(1)
    assert torch.equal(*(evaluate(net, gallery) for gallery in galleries))
    assert torch.equal(*(answer(net, gallery, ids, ids) for gallery in galleries))


MEASURE = """
import resource, sys
import numpy as np
import torch
from torch import nn
import bikd

torch.set_num_threads(1)
n = 600
pixels = np.random.default_rng(0).integers(0, 255, (n, 224, 224, 3), dtype=np.uint8)
pixels = pixels.transpose(0, 3, 1, 2)
if sys.argv[1] == "copied":
    pixels = np.ascontiguousarray(pixels)
labels = np.arange(n) % 3


def net():
    layers = nn.Conv2d(3, 4, 7, stride=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def go(m, **options):
    options |= dict(epochs=1, batch_size=8, show=False)
    bikd.distill(net(), net(), pixels[:m], labels[:m], **options)


method = dict(method=sys.argv[2]) | (dict(k=1) if sys.argv[2] == "bikd" else {})
go(30, **method)
before = peak()
go(n, **method)
print(1 + (peak() - before) / pixels.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("layout", ["copied", "a view"])
@pytest.mark.parametrize("method", ["bikd", "cckd", "kd"])
def test_distilling_large_images_takes_at_most_2_6_times_their_bytes(layout, method, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEASURE), layout, method]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2.6


def test_an_array_in_a_file_is_read_and_not_copied(tmp_path):
    pixels, labels = bright()
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    (done, said), (plain, _) = distilled(mapped, labels), distilled(pixels, labels)
    assert said == []
    assert done.history.drop(columns="lr").equals(plain.history.drop(columns="lr"))
