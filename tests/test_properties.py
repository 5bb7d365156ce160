"""What holds of every split, view, loss and config, tried on a hundred drawn ones each."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bikd.data import draw_split, long_tailed_counts
from bikd.losses import hard_loss, soft_loss
from bikd.methods import get_method, methods_named
from bikd.own_data import hold_out
from bikd.protocol import Protocol
from bikd.runs import (
    RunConfig,
    calibration,
    confusion_matrix,
    expected_calibration_error,
    make_config,
    shot_groups,
)
from bikd.sources import Images, Source
from bikd.views import DeviceImages, Views, endless_batches, epoch_batches

settings.register_profile("bikd", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("bikd")
seeds, ratios = st.integers(0, 2**31), st.floats(1, 1e4)


def numbered(n_classes, per_class):
    "A pool of 2×2 images, no two alike."
    n = n_classes * per_class
    numbers = torch.arange(n)
    digits = torch.stack([numbers // 256**i % 256 for i in range(4)], 1)  # to the base 256
    return Images(digits.to(torch.uint8).reshape(n, 1, 2, 2), numbers % n_classes)


def numbers(images):
    return [int(v) for v in (images.pixels.flatten(1).long() * 256 ** torch.arange(4)).sum(1)]


@given(st.integers(1, 5000), st.integers(2, 200), ratios)
def test_counts_fall_from_n_max_to_at_least_one(n_max, C, rho):
    if int(n_max / rho) < 1:
        try:
            counts = long_tailed_counts(n_max, C, rho)  # rounding may still leave 1
        except ValueError as e:
            assert "without an image" in str(e)
            return
    else:
        counts = long_tailed_counts(n_max, C, rho)
    assert counts[0] == n_max
    assert counts[-1] >= 1
    assert sorted(counts, reverse=True) == counts
    assert all(-1e-6 < n_max * rho ** (-c / (C - 1)) - n < 1 + 1e-6 for c, n in enumerate(counts))


@given(st.integers(2, 6), st.integers(1, 20), st.integers(1, 5), ratios, seeds, st.data())
def test_a_split_is_what_it_says(C, n_max, n_val, rho, seed, data):
    rho = min(rho, n_max)
    pool = numbered(C, n_max + n_val + 2)
    test = Images(pool.pixels[:C] + 7, pool.labels[:C])
    source = Source("drawn", lambda folder: (pool, test), C, n_max, n_val, 1, 2)
    split = draw_split(source, pool, test, rho, seed)
    kept = numbers(split.train) + numbers(split.val)
    assert split.n_per_class == long_tailed_counts(n_max, C, rho)
    assert split.val.labels.bincount().tolist() == [n_val] * C
    assert torch.equal(split.test.pixels, test.pixels)
    assert len(set(kept)) == len(kept)  # disjoint
    labels = split.train.labels.tolist() + split.val.labels.tolist()
    assert [i % C for i in kept] == labels  # with their own labels
    assert draw_split(source, pool, test, rho, seed).hash == split.hash
    fewer = draw_split(source, pool, test, rho, seed, data.draw(st.integers(1, n_val)))
    assert numbers(fewer.train) == numbers(split.train)
    assert set(numbers(fewer.val)) <= set(numbers(split.val))
    # a smaller ρ only adds images
    lower = draw_split(source, pool, test, data.draw(st.floats(1, rho)), seed)
    assert set(numbers(split.train)) <= set(numbers(lower.train))
    assert numbers(lower.val) == numbers(split.val)


@given(st.integers(2, 6), st.integers(2, 9), seeds, st.data())
def test_a_hold_out_is_balanced_and_loses_no_image(C, n, seed, data):
    pool = numbered(C, n)
    per_class = data.draw(st.integers(1, n - 1))
    rest, val = hold_out(pool, per_class, seed)
    assert val.labels.bincount().tolist() == [per_class] * C
    assert sorted(numbers(rest) + numbers(val)) == numbers(pool)


@given(st.integers(1, 6), st.integers(0, 3), st.booleans(), st.integers(1, 3), seeds)
def test_a_view_is_pad_crop_flip(size, pad, flip, channels, seed):
    views, g = Views(size, pad, flip), torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8, generator=g)
    images = Images(pixels, torch.zeros(2, dtype=torch.long))
    # mean 0 and std 1/255: pixels as they are
    gallery = DeviceImages(images, views, torch.zeros(channels), torch.full((channels,), 1 / 255))
    all_views = torch.arange(views.n)
    shown = gallery(torch.ones_like(all_views), all_views)
    padded = np.pad(images.pixels[1].numpy(), ((0, 0), (pad, pad), (pad, pad)))
    offsets = range(2 * pad + 1)
    crops = [padded[:, y : y + size, x : x + size] for y in offsets for x in offsets]
    by_hand = np.stack(crops + ([c[:, :, ::-1] for c in crops] if flip else []))
    assert torch.allclose(shown, torch.from_numpy(by_hand.astype(np.float32)), atol=1e-3)
    assert torch.allclose(shown[views.identity], images.pixels[1].float(), atol=1e-3)


@given(st.integers(1, 60), st.integers(1, 70), seeds, st.integers(0, 50))
def test_an_epoch_shows_every_image_once(n, batch, seed, epoch):
    views = Views(4)
    batches = epoch_batches(n, batch, views, seed, epoch)
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == list(range(n))
    assert all(0 <= v < views.n for b in batches for v in b.views.tolist())
    again = epoch_batches(n, batch, views, seed, epoch)
    for a, b in zip(batches, again, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.views, b.views)
    stream = endless_batches(n, batch, views, seed, epoch)
    first_lap = [next(stream).ids for _ in batches]
    assert sorted(torch.cat(first_lap).tolist()) == list(range(n))
    second = torch.cat([next(stream).ids for _ in batches])
    assert sorted(second.tolist()) == list(range(n))
    assert n < 20 or not torch.equal(second, torch.cat(first_lap))


logits = st.tuples(st.integers(1, 6), st.integers(2, 8), st.floats(0.1, 1e4), seeds)


def draw(B, C, scale, seed):
    "Logits of student and teacher, labels, and an order of the classes."
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(C, (B,), generator=g)
    order = torch.randperm(C, generator=g)
    return student, teacher, labels, order


@given(logits, st.floats(0.1, 20), st.floats(-1e3, 1e3))
def test_losses_are_blind_to_a_shift_and_to_the_classes_names(what, tau, shift):
    s, t, y, order = draw(*what)
    hard, soft = hard_loss(s, y), soft_loss(s, t, tau)

    def near(a, b):
        return torch.allclose(a, b, rtol=1e-6, atol=1e-6 * what[2])

    assert (hard >= 0).all()
    assert (soft >= -1e-9 * what[2]).all()
    assert near(soft_loss(s, s, tau), torch.zeros(len(s), dtype=s.dtype))
    assert near(hard_loss(s + shift, y), hard)
    assert near(soft_loss(s + shift, t - shift, tau), soft)
    assert near(hard_loss(s[:, order], order.argsort()[y]), hard)
    assert near(soft_loss(s[:, order], t[:, order], tau), soft)
    # what a temperature means
    assert near(soft_loss(s, t, tau), tau**2 * soft_loss(s / tau, t / tau, 1.0))
    alone = torch.cat([soft_loss(s[i : i + 1], t[i : i + 1], tau) for i in range(len(s))])
    assert near(alone, soft)  # one value per sample


@given(st.lists(st.sampled_from([1, 19, 20, 21, 99, 100, 101, 5000]), min_size=1, max_size=100))
def test_groups_part_the_classes(counts):
    groups = shot_groups(counts)
    assert sorted(c for g in groups.values() for c in g) == list(range(len(counts)))
    fewer = groups["medium"] + groups["few"]
    assert all(counts[a] > counts[b] for a in groups["many"] for b in fewer)


@given(logits, st.integers(1, 30))
def test_calibration_and_confusion_count_every_image(what, bins):
    s, _, y, _ = draw(*what)
    table, m = calibration(s, y, bins), confusion_matrix(s, y)
    assert table.n.sum() == m.sum() == len(y)
    assert 0 <= expected_calibration_error(s, y, bins) <= 1
    assert round((table.n * table.accuracy).sum()) == m.diag().sum() == (s.argmax(1) == y).sum()
    inside = table[table.n > 0]
    assert (inside.confidence >= inside.low - 1e-9).all()
    assert (inside.confidence <= inside.high + 1e-9).all()


protocols = st.fixed_dictionaries(
    {},
    optional=dict(
        epochs=st.integers(1, 500),
        batch_size=st.integers(1, 500),
        lr=st.floats(1e-6, 10),
        momentum=st.floats(0, 0.99),
        weight_decay=st.floats(0, 1),
        warmup=st.floats(0, 0.9),
        decay_at=st.lists(st.floats(0.01, 1), max_size=4).map(tuple),
        lr_decay=st.floats(0.001, 1),
        first_epoch=st.sampled_from([0, 1]),
        augment=st.booleans(),
        normalisation=st.sampled_from(["train", "released"]),
    ),
)
bikd = st.fixed_dictionaries(
    {},
    optional=dict(
        k=st.integers(1, 50),
        temperature=st.floats(0.1, 20),
        phi_lr=st.floats(1e-6, 1),
        hidden=st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple),
        accumulation=st.sampled_from(["sum", "mean"]),
        outputs=st.sampled_from(["sigmoid", "softmax"]),
        phi_decay=st.floats(0.01, 1),
    ),
)


@given(st.floats(1, 380), st.integers(0, 10**6), protocols, bikd)
def test_a_config_comes_back_from_its_file_as_it_was(rho, seed, protocol, fields):
    cfg = make_config(
        "mnist5k", rho, seed, "bikd", protocol=protocol, settings=fields, teacher_run="t"
    )
    back = RunConfig.model_validate_json(cfg.model_dump_json(indent=1))
    assert back == cfg
    assert back.run_id == cfg.run_id
    assert back.make_method() == cfg.make_method()
    assert all(getattr(back.protocol, k) == v for k, v in protocol.items())
    assert all(getattr(back.make_method(), k) == v for k, v in fields.items())
    other = cfg.model_copy(update=dict(seed=seed + 1))
    assert other.run_id != cfg.run_id


@given(protocols, st.sampled_from(sorted(methods_named("all controls"))))
def test_every_method_and_protocol_come_back(protocol, name):
    p, m = Protocol(**protocol), get_method(name)()
    assert Protocol.model_validate_json(p.model_dump_json()) == p
    assert type(m).model_validate_json(m.model_dump_json()) == m
    rates = [p.lr_at(e) for e in range(p.epochs)]
    assert all(0 < r <= p.lr * (1 + 1e-9) for r in rates)
    assert p.warmup or rates == sorted(rates, reverse=True)
