"""The report in a browser: curves drawn, values under the mouse, no error, readable on a phone."""

import json
import threading

import pytest

from sngpt_jax.report.live import LiveRuns, make_server
from sngpt_jax.report.page import page, report
from sngpt_jax.report.reading import read_run
from tests import fake_run
from tests.browser import DESKTOP, PHONE, needs_browser, opened

pytestmark = [pytest.mark.slow, needs_browser]
HOSTILE = "</script><img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser
        assert browser.problems == []


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A page of two seeds and one other run with a sparse code and hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    longer = {"steps": 400, "every": 100}
    runs = [fake_run.make(folder / f"a_seed{seed}", seed=seed, **longer) for seed in (1, 2)]
    evil = fake_run.make(folder / "evil", seed=5, levels=2, **longer)
    config = json.loads((evil / "config.json").read_text())
    config["eval"]["sample_prompt"] = HOSTILE
    (evil / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (evil / "metrics.jsonl").read_text().splitlines()]
    inherited = [line | {"toString": 1.5, "constructor": line["step"]} for line in lines]
    (evil / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in inherited))
    runs.append(evil.rename(folder / "<b>&amp;<img src=x onerror=document.title='taken'>"))
    (folder / "page.html").write_text(page(report([read_run(run) for run in runs], "now")))
    return f"file://{folder}/page.html"


def chart(name):
    return f"document.querySelector('[data-chart=\"{name}\"]')"


def drawn(browser, name, what="path.curve"):
    return browser.ask(f"{chart(name)}.querySelectorAll('{what}').length")


def box_of(browser, name):
    """Left edge of the curves, their width, and a height within the chart, in the window."""
    browser.ask(f"{chart(name)}.scrollIntoView({{block: 'center'}})")
    place = f"{chart(name)}.querySelector('svg').getBoundingClientRect()"
    box = browser.ask(f"JSON.parse(JSON.stringify({place}))")
    return box["x"] + 54, box["width"] - 54 - 10, box["y"] + 60


def text_of(browser, part):
    return browser.ask(f"document.getElementById('{part}').innerText")


def choose(browser, menu, value):
    found = f"document.getElementById('{menu}')"
    browser.ask(f"{found}.value = '{value}', {found}.dispatchEvent(new Event('input'))")


def test_curves_are_drawn(browser, url):
    browser.open(url)
    assert browser.ask("document.title") == "Report of 3 runs"
    # three runs as measured, their running means, and the mean of the group
    assert drawn(browser, "train_loss") == 3 + 3 + 1
    assert drawn(browser, "train_loss", "path.band") == 1
    # three runs with a dot a validation, and the mean of the group
    assert drawn(browser, "val_bpb") == 3 + 1 and drawn(browser, "val_bpb", "circle") == 3 * 5
    assert drawn(browser, "lr") == 3 + 1
    assert drawn(browser, "code/level1/dead") == drawn(browser, "code/cos") == 1
    d = browser.ask(f"{chart('lr')}.querySelector('path.curve').getAttribute('d')")
    assert d.count("L") == 399
    # runs, differences, environments
    assert browser.ask("document.querySelectorAll('table').length") == 3
    assert browser.problems == []


def test_the_mouse_shows_the_values_of_all_runs(browser, url):
    browser.open(url)
    left, inner, y = box_of(browser, "val_loss")
    browser.mouse("mouseMoved", left + 0.51 * inner, y)
    tip = browser.ask(f"{chart('val_loss')}.querySelector('.tip').innerText")
    assert tip.startswith("step 200\n")
    for seed in (1, 2, 5):
        assert f"{fake_run.loss(200, seed):.5g}" in tip
    mean = (fake_run.loss(200, 1) + fake_run.loss(200, 2)) / 2
    assert f"{mean:.5g}" in tip and "a, mean" in tip
    visible = "[...document.querySelectorAll('.tip')].filter((tip) => !tip.hidden).length"
    assert browser.ask(visible) == 1
    assert drawn(browser, "lr", "line.cursor") == 1  # the crosshair is in all charts
    browser.mouse("mouseMoved", 5, 5)
    assert browser.ask(visible) == 0


def test_metrics_named_as_what_every_object_inherits_are_drawn_for_their_run_alone(browser, url):
    browser.open(url, DESKTOP)
    browser.ask("document.getElementById('more').querySelector('details').open = true")
    for name in ("toString", "constructor"):
        assert drawn(browser, name) == 1
    assert drawn(browser, "train_loss") > 1


def test_dragging_zooms_all_charts(browser, url):
    browser.open(url)
    left, inner, y = box_of(browser, "lr")
    button = {"button": "left", "clickCount": 1}
    browser.mouse("mousePressed", left + 0.5 * inner, y, **button)
    browser.mouse("mouseMoved", left + 0.75 * inner, y, **button)
    browser.mouse("mouseReleased", left + 0.75 * inner, y, **button)
    assert browser.ask("[view.from, view.to]") == pytest.approx([200, 300], abs=2)
    choose(browser, "range", "0.5")
    assert browser.ask("[view.from, view.to]") == [200, 400]


def test_runs_and_scales_can_be_chosen(browser, url):
    browser.open(url)
    click_group = "document.querySelectorAll('#scores input')[0].click()"
    browser.ask(click_group)
    assert drawn(browser, "val_loss") == 1
    browser.ask(click_group)
    browser.ask("document.getElementById('singles').click()")
    assert drawn(browser, "val_loss") == 1 + 1  # the mean of the group, and the other run
    browser.ask(f"{chart('val_loss')}.querySelector('button').click()")
    assert drawn(browser, "val_loss") == 2
    for axis, last in (("tokens", 400 * 524_288), ("time", 40)):
        choose(browser, "axis", axis)
        assert browser.ask("view.last") == last
    assert browser.problems == []


def test_the_axis_leaves_outliers_out_until_asked(browser, url):
    browser.open(url)
    found = "view.charts.find((chart) => chart.spec.id === 'grad_norm')"
    highest = f"{found}.range({found}.lines, 0, 400)[1]"
    assert browser.ask(highest) < 0.1  # of 1 / step, whose quartiles are at 1/300 and 1/100
    browser.ask(f"{chart('grad_norm')}.querySelectorAll('button')[1].click()")
    assert browser.ask(highest) > 1


def test_a_phone_can_read_it(browser, url):
    browser.open(url, PHONE, "dark")
    assert browser.ask("document.documentElement.clientWidth") == 390
    assert browser.overflow() <= 0
    fits = "(svg) => svg.getBoundingClientRect().right <= 390"
    assert browser.ask(f"[...document.querySelectorAll('.chart svg')].every({fits})")
    browser.ask("document.querySelector('#config details').open = true")
    assert browser.overflow() <= 0


def test_the_theme_follows_the_system_until_it_is_chosen(browser, url):
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(url, DESKTOP, "light")
    light = browser.ask(ground)
    browser.open(url, DESKTOP, "dark")
    dark = browser.ask(ground)
    assert light != dark
    for expected in (light, dark, dark):  # light, dark, the system's again
        browser.ask("document.getElementById('theme').click()")
        assert browser.ask(ground) == expected


def test_texts_are_shown_as_they_are(browser, url):
    browser.open(url)
    assert browser.ask("document.images.length") == 0
    assert "onerror=document.title='taken'>" in text_of(browser, "scores")
    assert HOSTILE in text_of(browser, "config")
    assert browser.ask("document.title") == "Report of 3 runs"


def test_numbers_that_no_run_has_are_drawn(browser, tmp_path):
    directory = fake_run.make(tmp_path / "run")
    values = [(0, 3.0, 0), (0.5, 1e-320, -1), (3, -1e308, 1e300), (4, 1e308, 5), (5, 1e38, 4)]
    values += [(6, -1e38, 1e38), (1e300, 2, 9)]
    found = [
        {"step": s, "train_loss": x, "elapsed_seconds": t, "lr": -x, "constructor": 1, "x" * 900: x}
        for s, x, t in values
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    (tmp_path / "page.html").write_text(page(report([read_run(directory)], "now")))
    browser.open(f"file://{tmp_path}/page.html", PHONE)
    browser.ask("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    for axis in ("tokens", "time", "step"):
        choose(browser, "axis", axis)
    browser.ask("document.querySelectorAll('.tools button').forEach((button) => button.click())")
    assert drawn(browser, "train_loss") == 1 and browser.overflow() <= 0 and browser.problems == []


def test_a_page_that_is_served_follows_the_run(browser, tmp_path):
    directory = fake_run.make(tmp_path / "run", finished=False, levels=1)
    other = fake_run.make(tmp_path / "other", seed=2, steps=60)
    with make_server(LiveRuns([directory, other]), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            browser.open(f"http://localhost:{server.server_address[1]}/")
            browser.ask("document.querySelectorAll('#scores input')[1].click()")
            browser.ask("window.scrollTo(0, 700)")
            top = browser.ask("window.scrollY")
            (directory / "summary.json").write_text('{"val_bpb": 1.25, "steps": 40}')
            with (directory / "metrics.jsonl").open("a") as file:
                file.write('{"step": 80, "train_loss": 0.5}\n')
            browser.ask("refresh()")
            assert "1.2500" in text_of(browser, "scores")
            assert browser.ask("[view.last, window.scrollY]") == [80, top] and top > 0
            assert drawn(browser, "train_loss") == 1  # the other one is still hidden
            assert text_of(browser, "live") == "· live"
            assert browser.problems == []
        finally:
            server.shutdown()
    for _ in range(50):  # a connection that is still open may answer once more
        browser.ask("refresh()")
        if "has ended" in text_of(browser, "live"):
            break
    assert "has ended" in text_of(browser, "live")
    browser.problems.clear()  # that nobody answers is one
    browser.open("about:blank")  # or it would go on asking
