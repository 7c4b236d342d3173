"""The Playground in a real browser, over a small world whose right order is known."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from film_world import EVIL, shown
from live_page import absent

from engine.errors import BundleError

pytestmark = pytest.mark.browser

with contextlib.suppress(ImportError):  # the fixture `browser` says what is missing
    from playwright.sync_api import expect


def order(page) -> list[str]:
    return page.eval_on_selector_all("#stage .row .title", "nodes => nodes.map(n => n.value)")


def click_title(page, item: str) -> None:
    page.locator(f".row .title[value='{item}']").click()
    expect(page.locator(".feed .fresh")).to_be_visible()


def test_the_page_shows_the_order_that_the_pipeline_gave(open_page, site):
    page = open_page("/?user=196")
    assert order(page) == shown(site.console, "196")
    assert page.title() == "196 · Playground · plexrank"
    first = page.locator(".row").first
    expect(first.locator(".title")).to_have_text("Il Postino (1994)")
    expect(first.locator(".num").first).to_contain_text("%")
    expect(page.locator(".chip").first).to_contain_text("films 3f9a2c71")
    expect(page.locator(".stages")).to_contain_text("rank 4.6")


def test_a_click_enters_the_feed_and_the_history_and_really_changes_the_order(open_page, site):
    page = open_page("/?user=196", still=False)
    before = order(page)
    assert "3" in before
    click_title(page, "3")  # Alien, for a user who had watched romances
    after = order(page)
    assert after == shown(site.console, "196") != before
    kept = [item for item in before if item in after]
    assert kept != [item for item in after if item in before], "only the clicked item went; nothing moved"
    expect(page.locator(".feed .fresh")).to_contain_text("Alien (1979)")
    expect(page.locator(".feed .fresh")).to_contain_text("history 3 → 4")
    expect(page.locator(".history li").first).to_contain_text("Alien (1979)")
    expect(page.locator("#said")).to_contain_text("click on Alien (1979) recorded")
    expect(page.locator("#users a[aria-current] .count")).to_contain_text("4")


def test_every_mark_of_movement_is_the_difference_of_the_two_orders(open_page):
    page = open_page("/?user=196")
    before = order(page)
    click_title(page, "3")
    after = order(page)
    kept_before, kept_after = [i for i in before if i in after], [i for i in after if i in before]
    expected = {}
    for item in after:
        gained = kept_before.index(item) - kept_after.index(item) if item in kept_before else None
        expected[item] = "new" if gained is None else f"{'▲' if gained > 0 else '▼'}{abs(gained)}" if gained else ""
    marks = page.eval_on_selector_all(
        "#stage .row",
        "rows => rows.map(r => [r.querySelector('.title').value, r.querySelector('.move').textContent.trim()])",
    )
    assert dict(marks) == expected
    moved = sum(bool(mark) for mark in expected.values())
    expect(page.locator(".head")).to_contain_text(f"{moved} of {len(after)} moved after the click on Alien (1979)")


def test_a_title_with_markup_is_text(open_page):
    page = open_page("/?user=3")
    click_title(page, "19")
    assert page.locator("#stage img").count() == 0
    assert "owned" not in page.title()
    expect(page.locator(".feed .fresh")).to_contain_text(EVIL)
    expect(page.locator(".history li").first).to_contain_text(EVIL)
    page.locator("#users a", has_text="<b>bold</b>").click()
    expect(page.locator("#ranking-title")).to_have_text("Ranking for <b>bold</b>")
    assert page.locator("#ranking-title b").count() == 0


@pytest.mark.parametrize("path", ["/?user=196", "/?user=nobody", "/?user="])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_scrolls_sideways_at_375_pixels(open_page, path, dark):
    page = open_page(path, width=375, dark=dark)
    for details in page.locator("#stage summary").all()[:3]:
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    if path == "/?user=196":
        page.locator(".row .title").nth(4).click()
        expect(page.locator(".feed .fresh")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_keyboard_alone_chooses_a_user_and_clicks_an_item(open_page, site):
    page = open_page("/?user=196")
    page.locator("#q").focus()
    page.keyboard.press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.dataset.user") == "5":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#ranking-title")).to_have_text("Ranking for 5")
    expect(page).to_have_url(re.compile(r"\?user=5$"))
    first = page.locator(".row .title").first
    first.focus()
    clicked = first.get_attribute("value")
    page.keyboard.press("Enter")
    expect(page.locator(".feed .fresh")).to_be_visible()
    assert site.console.user("5").history[0] == clicked
    assert page.evaluate("document.activeElement.classList.contains('title')"), "the focus is lost after a click"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".why[open]")).to_have_count(1)


def test_search_narrows_the_users_and_a_new_id_is_a_newcomer(open_page):
    page = open_page("/?user=196")
    page.locator("#q").fill("19")
    expect(page.locator("#users a")).to_have_count(2)  # 196 and 19
    page.locator("#q").fill("zoe")
    expect(page.locator("#users")).to_contain_text("No user begins with “zoe”")
    page.locator("#q").press("Enter")
    expect(page.locator("#ranking-title")).to_have_text("Ranking for zoe")
    expect(page.locator(".head")).to_contain_text("what a newcomer gets")
    expect(page.locator(".past")).to_contain_text("Nothing yet")


def test_why_shows_the_weights_that_the_model_gave(open_page):
    page = open_page("/?user=196")
    row = page.locator(".row", has_text="Il Postino")
    row.locator("summary").click()
    # Il Postino is Drama, Romance like all three: weights 1, e^-.15, e^-.3 -> 38, 33, 29 % of their sum.
    weights = row.locator(".weights li")
    expect(weights).to_have_count(3)
    for line, (title, share) in zip(weights.all(), [("Titanic", 38), ("Emma", 33), ("Sense", 28)], strict=True):
        expect(line).to_contain_text(title)
        expect(line).to_contain_text(f"{share} %")


def test_pointing_at_a_row_lights_its_part_of_the_history(open_page):
    page = open_page("/?user=196")
    page.locator(".row", has_text="Il Postino").hover()
    expect(page.locator("#lens")).to_have_text("Bars: weight for Il Postino (1994)")
    widths = page.eval_on_selector_all(".history .fill", "bars => bars.map(b => b.getAttribute('width'))")
    assert widths == ["100.00%", "86.07%", "74.08%"]  # e^-.15 = .8607, e^-.3 = .7408
    page.locator("#ranking-title").hover()
    expect(page.locator("#lens")).to_have_text("Bars: weight over the whole list")


def test_a_scorer_that_fails_is_an_error_with_words_and_the_page_recovers(open_page, site, watch):
    watch.expected = ("503",)
    page = open_page("/?user=196")
    site.console.fails = BundleError("the scorer is gone")
    page.locator("#users a[data-user='7']").click()
    expect(page.locator("[role=alert] h1")).to_have_text("No ranking")
    expect(page.locator("#stage")).to_contain_text("the scorer is gone")
    site.console.fails = None
    page.get_by_role("link", name="Try again").click()
    expect(page.locator("#ranking-title")).to_have_text("Ranking for 7")


def test_a_degraded_answer_says_what_is_missing(open_page, site):
    site.console.degraded = ["rank: deadline"]
    page = open_page("/?user=196")
    expect(page.locator(".chip.warn")).to_contain_text("degraded: rank: deadline")
    expect(page.locator(".degraded")).to_contain_text("order of popularity")


def test_events_that_wait_are_said_to_wait(open_page, site):
    site.console.degraded = ["events: waiting in the local log"]
    page = open_page("/?user=196")
    expect(page.locator(".chip.warn")).to_contain_text("degraded: events: waiting in the local log")
    expect(page.locator(".degraded")).to_contain_text("kept on this machine until it is back, and none is lost")


def test_waiting_dims_the_list_and_says_busy(open_page, site):
    page = open_page("/?user=196")
    site.console.delay = 0.8
    page.locator("#users a[data-user='7']").click()
    expect(page.locator("#stage[aria-busy=true]")).to_be_visible()
    expect(page.locator("#ranking-title")).to_have_text("Ranking for 7")
    expect(page.locator("#stage[aria-busy]")).to_have_count(0)


def test_a_server_that_does_not_answer_is_said_and_the_list_stays(open_page, watch):
    watch.expected = ("ERR_", "htmx:")
    page = open_page("/?user=196")
    before = order(page)
    page.route("**/playground/events", lambda route: route.abort())
    page.locator(".row .title").first.click()
    expect(page.locator("#notice")).to_contain_text("does not answer")
    assert order(page) == before


def test_the_curl_line_and_the_answer_are_there_to_copy(open_page, site):
    page = open_page("/?user=196")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".raw > summary").click()
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl -s {site.origin}/v1/recommend ")
    expect(page.locator("#json")).to_contain_text('"request_id"')


def test_it_works_without_scripts(open_page, site):
    page = open_page("/?user=196", scripts=False)
    before = shown(site.console, "196")
    page.locator(".row .title[value='3']").click()
    page.wait_for_url("**/?user=196")
    assert page.locator(".feed li").count() == 1
    assert site.console.user("196").history[0] == "3"
    assert shown(site.console, "196") != before


def test_back_returns_to_the_user_before(open_page):
    page = open_page("/?user=196")
    page.locator("#users a[data-user='7']").click()
    expect(page.locator("#ranking-title")).to_have_text("Ranking for 7")
    page.go_back()
    expect(page.locator("#ranking-title")).to_have_text("Ranking for 196")


@pytest.mark.parametrize(
    ("state", "width", "dark"),
    [
        ("ranking", 1280, False),
        ("ranking", 1280, True),
        ("ranking", 375, False),
        ("newcomer", 375, True),
        ("degraded", 1280, True),
        ("degraded", 375, False),
        ("error", 1280, False),
    ],
)
def test_axe_finds_no_fault_of_accessibility(open_page, site, watch, state, width, dark):
    try:
        import axe_playwright_python as package
    except ImportError:
        absent("axe-playwright-python is not installed: pip install -e '.[dev]'")
    axe = next(Path(package.__file__).parent.rglob("axe.min.js")).read_text()
    if state == "degraded":
        site.console.degraded = ["rank: deadline"]
    if state == "error":
        watch.expected = ("503",)
        site.console.fails = BundleError("the scorer is gone")
    page = open_page("/?user=nobody" if state == "newcomer" else "/?user=196", width=width, dark=dark)
    if state == "ranking":
        page.locator(".why summary").first.click()
        page.locator(".raw > summary").click()
        page.locator(".row .title").nth(3).click()
        expect(page.locator(".feed .fresh")).to_have_count(1)
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'best-practice']})")
    assert [(v["id"], v["nodes"][0]["html"][:120]) for v in found["violations"]] == []
