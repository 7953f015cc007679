"""The server's chat page in a real browser; needs the package playwright, and a Chromium of the system or of playwright."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyruntime
from pyruntime.server import Server, Settings

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with pyruntime.Model(folder, threads=1) as model:
        server = Server(model, Settings(name="tiny"), port=0, grace=1)
        thread = threading.Thread(target=server.run)
        thread.start()
        yield server.url
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium that starts: {str(error).strip().splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page; at the end, nothing may have been said on the console but what the test expects."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(url)
    page.locator("#model", has_text="tiny").wait_for()
    yield page
    page.close()


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def finish(page: Any) -> None:
    page.locator("#send", has_text="Send").wait_for()


def kinds(page: Any) -> list[str]:
    return [element.get_attribute("class").split()[-1] for element in page.locator("#log > .message").all()]


def short_answers(page: Any, n: int = 20) -> None:
    """A random model would go on until its context is full."""

    def shorten(route: Any) -> None:
        route.continue_(post_data={**route.request.post_data_json, "max_tokens": n, "ignore_eos": True})

    page.route("**/v1/chat/completions", shorten)


def test_first_visit_answer_and_new_chat(page: Any) -> None:
    assert page.title() == "tiny" and page.locator(".empty").is_visible()
    short_answers(page)
    send(page, "<b>Hello</b>")
    finish(page)
    assert kinds(page) == ["user", "assistant", "note"] and not page.locator(".empty").is_visible()
    assert page.locator(".user").inner_text() == "<b>Hello</b>"
    assert len(page.locator(".assistant").inner_text()) > 1
    assert "20 written" in page.locator(".note").inner_text()
    send(page, "again")
    finish(page)
    assert kinds(page) == ["user", "assistant", "note"] * 2 and "of them before" in page.locator(".note").last.inner_text()
    page.click("#clear")
    assert kinds(page) == [] and page.locator(".empty").is_visible()
    assert page.said == []


def test_stop(page: Any) -> None:
    send(page, "Hello")  # until the context is full, in some seconds
    page.locator("#send", has_text="Stop").wait_for()
    page.locator(".assistant", has_not_text="…").wait_for()
    page.click("#send")
    finish(page)
    assert kinds(page)[:2] == ["user", "assistant"] and "error" not in kinds(page)
    assert page.said == []


def test_errors_are_shown_and_the_message_comes_back(page: Any, url: str) -> None:
    send(page, "a" * 9000)
    page.locator(".error").wait_for()
    assert "max_context is 8192" in page.locator(".error").inner_text()
    assert kinds(page) == ["error"] and page.input_value("#input") == "a" * 9000
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "Hello")
    page.locator(".error", has_text="the server does not answer").wait_for()
    assert page.input_value("#input") == "Hello"
    assert len(page.said) == 2 and all("Failed to load resource" in line for line in page.said)  # what the browser says of any such answer
