"""The page says that the model has learnt since it scored the list, without a click and without a reload."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser
SHOWN = "3f9a2c71"
"""The version of the small world's answers."""


def test_a_page_over_a_model_that_does_not_learn_says_nothing_of_it_and_does_not_ask(open_page):
    asked = []
    page = open_page("/?user=196")
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert page.locator("#learnt").count() == 0
    assert [url for url in asked if "/playground/" in url] == []


def test_a_newer_version_appears_by_itself_and_the_list_stays_as_it_is(open_page, site):
    from playwright.sync_api import expect

    site.console.learnt_version = SHOWN
    page = open_page("/?user=196")
    titles = page.locator("#stage .row .title").all_inner_texts()
    expect(page.locator("#learnt")).to_have_text("learns from clicks")
    site.console.learnt_version = f"{SHOWN}+1.7"
    expect(page.locator("#learnt.newer")).to_have_text("learnt since: +1.7")
    assert page.locator(".chip code").first.inner_text() == SHOWN, "the list was scored by the one before"
    assert page.locator("#stage .row .title").all_inner_texts() == titles
    site.console.learnt_version = f"{SHOWN}+1.8"
    expect(page.locator("#learnt.newer")).to_have_text("learnt since: +1.8")
    site.console.learnt_version = "aaaaaaaaaaaa"  # another bundle
    expect(page.locator("#learnt.newer")).to_have_text("learnt since: aaaaaaaaaaaa")


def test_what_a_request_says_it_shows_is_text_and_not_markup(open_page, site):
    site.console.learnt_version = "a1+1.1"
    page = open_page("/?user=196")
    evil = "%22%3E%3Cscript%3Ealert(1)%3C/script%3E" + "x" * 500
    text = page.request.get(f"{site.origin}/playground/version?shown={evil}").text()
    assert "<script" not in text
    assert '">' not in text.split("<code>")[0].removesuffix('">learnt since: '), "it left its attribute"
    assert len(text) < 800
