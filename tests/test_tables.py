"""Table 1 and bfloat16 beside float32: rebuilt from records, and what the texts say of them."""

import pytest
from test_figures import made

from bikd.report import markdown_table
from bikd.select import by_setting, find_cells
from bikd.table import known_columns, precision_effects, table1, wide

RECORDS = "paper_figures/records"


@pytest.mark.parametrize(
    "notebook,names",
    [
        ("table1", ["table1.csv", "table1.md", "table1.tex", "table1_pairs.csv"]),
        ("precision", ["precision_bf16.csv", "precision_bf16.md"]),
    ],
)
def test_committed_tables_are_what_their_pages_write(root, tmp_path, notebook, names):
    files = made(root, notebook, tmp_path / "out")
    assert sorted(files) == names
    assert files == {name: (root / "paper_figures" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def jpeg(root):
    "Table 1 of CIFAR-10 (JPEG) at ρ = 100."
    runs = find_cells(root / RECORDS, ["cifar10_jpeg"])
    columns = known_columns(runs, ["cifar10_jpeg"], [100.0])["cifar10_jpeg"]
    methods = [r.config.method for r in runs if not r.config.method.startswith("expert")]
    return table1(runs, columns, list(dict.fromkeys(methods)))


def test_settings_are_not_mixed(root):
    groups = by_setting(find_cells(root / RECORDS, ["cifar10_jpeg"]))
    nets = {(s.teacher, s.student, s.epochs, s.precision) for s in groups}
    assert nets == {("resnet20", "resnet8", 60, "bf16"), ("resnet32x4", "resnet8x4", 30, "bf16")}
    for setting, runs in groups.items():
        assert {r.config.protocol.epochs for r in runs} == {setting.epochs}
        assert {r.config.net for r in runs} == {setting.teacher, setting.student}


def test_results_on_cifar10_jpeg_are_those_of_the_records(root, jpeg):
    text = (root / "RESULTS.md").read_text()
    assert markdown_table(wide(jpeg).rename_axis("method").reset_index()).strip() in text
    assert "## CIFAR-10 (JPEG), one seed" in text
    assert set(jpeg.n[jpeg["mean"].notna()]) == {1}
    mean = jpeg.pivot(index="method", columns="setting", values="mean")
    assert mean.notna().sum().tolist() == [19, 8]  # rows
    for setting, name in zip(mean, ("Small nets", "The paper's nets"), strict=True):
        m = mean[setting]
        said = f"{name}: BiKD's {m['bikd']:.2f} is {m['ce'] - m['bikd']:.2f} below CE and "
        assert f"{said}{m['kd'] - m['bikd']:.2f} below KD." in text
    gains = " and ".join(f"{g:.2f}" for g in mean.loc["bsce"] - mean.loc["bikd"])
    assert f"without a teacher, is {gains} points above BiKD" in text
    of_paper = [m for m in jpeg.method[jpeg.paper.notna()].unique() if m != "teacher"]
    assert mean.loc[of_paper].idxmax().tolist() == ["cckd", "dive"]
    assert mean.drop("teacher").idxmax().tolist() == ["bsce_val", "bsce"]
    off = -jpeg.delta.dropna().astype(float)
    assert f"below the paper's number, by {off.min():.1f} to {off.max():.1f} points" in text


def test_what_is_said_of_bfloat16_is_that_of_the_records(root):
    results, limits = ((root / f).read_text() for f in ("RESULTS.md", "LIMITS.md"))
    halves = []
    for dataset in ("mnist5k", "cifar10_jpeg"):
        runs = find_cells(root / RECORDS / "precision", [dataset])
        effects = precision_effects(runs).set_index("method")
        assert set(effects.n) == {3}
        assert set(effects.verdict) == {"open"}
        teacher, ce, kd, bikd = (effects.text[m] for m in ("teacher", "ce", "kd", "bikd"))
        rest = f"for the teacher, {ce} for CE, {kd} for KD and {bikd} for BiKD"
        assert f"{teacher} points {rest}" in results or f"it is {teacher} {rest}" in results
        teacher, ce, kd, bikd = (f"{effects.difference[m]:+.2f}" for m in effects.index)
        said = (
            f"{teacher} points for the teacher, {ce} for CE, {kd} for KD, {bikd} for BiKD",
            f"it is {teacher}, {ce}, {kd} and {bikd}",
        )
        assert any(text in limits for text in said), dataset
        halves.append((effects.high - effects.low) / 2)
    least, most = min(h.min() for h in halves), max(h.max() for h in halves)
    spread = f"All 95 % intervals contain zero, and they reach {least:.1f} to {most:.1f} points"
    assert spread in limits
