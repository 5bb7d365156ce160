"""The notebooks as a reader meets them: a real JupyterLab and a real Voilà, in a real browser.

Screenshots stay in $BIKD_SCREENSHOTS, if that is set, else in pytest's temporary folder.
"""

import os
import re
import shlex
from pathlib import Path

import pytest
from lab import CHROMIUM, ask, browser, lab, run_all, voila

pytest.importorskip("playwright")
pytest.importorskip("voila")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("BIKD_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def server(root):
    with lab(root / "nbs", IN_TEST="1") as at:
        yield at  # IN_TEST: run_experiment trains one epoch, in a folder that goes away


def ran_well(seen):
    assert [c["error"] for c in seen if c["error"]] == []
    assert [c for c in seen if not re.search(r"\d", c["prompt"])] == []
    return "\n".join(c["text"] for c in seen), sum(c["images"] for c in seen)


def test_lab_wants_its_token(server):
    url, token = server
    assert ask(f"{url}/api/contents")[0] == 403
    assert ask(f"{url}/api/contents", token)[0] == 200
    assert url.startswith("http://127.0.0.1:")


def test_an_experiment_runs_and_shows_its_table_and_pictures(server, screenshots):
    with browser() as page:
        text, images = ran_well(run_all(page, server, "run_experiment.ipynb"))
        page.screenshot(path=screenshots / "run_experiment.png", full_page=True)
        assert images >= 5
        assert page.locator(".jp-OutputArea-output table").count() >= 5
        assert re.search(r"teacher\s+1\s+resnet20\s+\d+\.\d+", text)
        assert re.search(r"bikd\s+1\s+resnet8\s+\d+\.\d+", text)
        assert "nothing is stuck" in text


def test_figure_3_shows_a_picture_and_counts_its_claims(server, screenshots):
    with browser() as page:
        text, images = ran_well(run_all(page, server, "figure3.ipynb"))
        page.screenshot(path=screenshots / "figure3.png", full_page=True)
        assert images == 1
        assert "tail samples get larger hard weights" in text
        assert re.search(r"\[\S+, \S+\] \(n = 3\)\s+holds", text)


def use_the_explorer(page, screenshots, name):
    "Move, choose and click, as a reader would; the page has to follow."
    left, right = (page.locator(".bikd-panel").nth(i) for i in (0, 1))
    left.wait_for(timeout=90_000)
    right.wait_for(timeout=90_000)

    def picture(panel):
        return panel.locator("canvas.bikd-map").evaluate("c => c.toDataURL()")

    def ink(panel):
        count = """c => {
            const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return new Uint32Array(pixels.buffer).filter(p => p).length;
        }"""
        return panel.locator("canvas.bikd-sample").evaluate(count)

    def title(panel):
        return panel.locator(".bikd-title").inner_text()

    assert "BiKD, mnist5k" in title(left)
    assert "hard weight, epoch 30 of 30" in title(left)
    assert page.locator(".bikd-alarm").count() == 2
    before = picture(left)
    assert picture(right) != before  # another run
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    left.locator(".bikd-title", has_text="epoch 25 of 30").wait_for(timeout=10_000)
    moved = picture(left)
    assert moved != before
    page.get_by_role("button", name="soft", exact=True).click()
    left.locator(".bikd-title", has_text="soft weight").wait_for(timeout=10_000)
    assert picture(left) != moved
    page.locator(".widget-dropdown", has_text="class").locator("select").select_option("9")
    said = left.locator(".bikd-said", has_text="3 images weigh")  # class 9 at ρ = 100
    said.wait_for(timeout=10_000)
    assert ink(left) == 0
    # Click on a sample of class 9. Only the picture tells where they lie, so ask each place of a
    # grid until one answers.
    area = left.locator("canvas.bikd-map")
    for x in range(60, 360, 12):
        for y in range(12, 300, 12):
            area.click(position=dict(x=x, y=y))
            if (x - 60) // 12 % 4 == 3 and y == 12:
                page.wait_for_timeout(100)
        if "class 9" in left.locator(".bikd-said").inner_text():
            break
    left.locator(".bikd-said", has_text="class 9").wait_for(timeout=10_000)
    assert ink(left) > 1000
    page.screenshot(path=screenshots / f"{name}.png", full_page=True)
    assert page.errors == []


def test_the_explorer_in_lab(server, screenshots):
    with browser() as page:
        ran_well(run_all(page, server, "explore.ipynb"))
        use_the_explorer(page, screenshots, "explore-lab")


# Who has no token meets the login page, or nothing.
WITHOUT_TOKEN = (
    "/",
    "/?token=nbs/explore.ipynb",
    "/voila/render/nbs/explore.ipynb",
    "/voila/tree",
)


def test_the_explorer_under_voila(root, screenshots):
    (command,) = re.findall(r"&& voila (.*)", (root / "README.md").read_text())
    with voila(shlex.split(command), root) as (url, token), browser() as page:
        for address in WITHOUT_TOKEN:
            status, body = ask(url + address)
            assert status in (403, 404) or b'name="password"' in body, (address, status)
        assert len(token) >= 32
        page.goto(f"{url}/?token={token}", timeout=90_000)
        use_the_explorer(page, screenshots, "explore-voila")
