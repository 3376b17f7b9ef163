"""The page at / in a real Chromium: inference_http_test starts the server.

usage: web_page.py URL
Types a prompt, asks, watches both answers stream in, opens what a chunk read; and sees to it that
nothing was complained about, nothing asked elsewhere, and no text of a source became markup.
"""
import json
import re
import sys
import time

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from browser import open_browser

url = sys.argv[1]

driver = open_browser()


def wait(condition, what):
    return WebDriverWait(driver, 60, poll_frequency=0.02).until(lambda _: condition(), what)


def find(selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def text(selector):
    return driver.execute_script("return document.querySelector(arguments[0]).innerText", selector)


try:
    driver.get(url + "/")
    wait(lambda: "stories260K" in text("#model"), "the model's name")
    assert "dense mode" in text("#model")
    assert [o.text for o in find("#base").find_elements(By.TAG_NAME, "option")] == ["harbour"]

    # Every control has a name for those who do not see it.
    unnamed = driver.execute_script("""
        return [...document.querySelectorAll("input, select, textarea, button")]
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).length""")
    assert unnamed == 0, unnamed

    # Notes the lengths both answers had on their way.
    driver.execute_script("""
        window.seen = {with: new Set(), without: new Set()};
        for (const id of ["with", "without"]) {
          new MutationObserver(() => seen[id].add(document.querySelector(`#${id} .text`).textContent.length))
              .observe(document.querySelector(`#${id} .text`), {childList: true, subtree: true});
        }""")
    prompt = find("#prompt")
    prompt.send_keys("Lily had a red boat")
    tokens = find("#tokens")
    tokens.clear()
    tokens.send_keys("150")
    begin = time.monotonic()
    find("#go").click()
    wait(lambda: find("#go").is_enabled() and "tokens/s" in text("#with .numbers")
         and "tokens/s" in text("#without .numbers"), "both answers")
    for answer in ("with", "without"):
        steps = driver.execute_script("return seen[arguments[0]].size", answer)
        assert steps > 10, f"{answer} came in {steps} steps: that is no stream"
        numbers = text(f"#{answer} .numbers")
        assert "to the first token" in numbers and "tokens\n150" in numbers, numbers
        # The rate is the server's; the page's own clock would have run longer.
        rate = float(re.search(r"tokens/s\n([\d.]+)", numbers)[1])
        assert rate >= 149 / (time.monotonic() - begin), (rate, numbers)
    assert len(text("#without .text")) > 100
    assert text("#without .text") != text("#with .text")

    # Under each chunk what it read: the prompt's, and three of the answer's 150 tokens.
    chunks = driver.find_elements(By.CSS_SELECTOR, "#with .chunk[data-chunk]")
    assert [c.get_attribute("data-chunk") for c in chunks] == ["0", "1", "2", "3"]
    assert not driver.find_elements(By.CSS_SELECTOR, "#without details")
    # Each chunk's text is that of its own 64 tokens, its first included, as the API tells them.
    told = driver.execute_async_script("""
        const body = {model: "stories260K", prompt: "Lily had a red boat", max_tokens: 150, temperature: 0,
                      logprobs: 0, memory: {knowledge_base: "harbour"}};
        fetch("v1/completions", {method: "POST", body: JSON.stringify(body)})
            .then((answer) => answer.json()).then(arguments[0]);""")["choices"][0]["logprobs"]["tokens"]
    assert len(told) == 150, told
    shown = driver.execute_script("""
        return [...document.querySelectorAll("#with .chunk:not(.given) p:not(.empty)")].map((p) => p.textContent)""")
    assert shown == ["".join(told[i:i + 64]) for i in (0, 64, 128)], (shown, told)
    details = find("#with .chunk[data-chunk='2'] details")
    assert not details.get_attribute("open")
    assert not details.find_element(By.CSS_SELECTOR, "li").is_displayed()
    details.find_element(By.TAG_NAME, "summary").click()
    wait(lambda: details.find_element(By.CSS_SELECTOR, "li").is_displayed(), "the sources")
    first = details.find_element(By.CSS_SELECTOR, "li").text
    for expected in ("Story ", " <b>&amp;", "https://example.org/stories/", "characters 0 to ", "score ",
                     "from "):
        assert expected in first, (expected, first)
    assert not details.find_elements(By.CSS_SELECTOR, "li b b"), "a title became markup"

    # The keyboard alone: ask, and stop.
    tokens.clear()
    tokens.send_keys("400")
    # Remembered by the page itself: a fast answer may be over between two looks from here.
    driver.execute_script("""
        const stop = document.querySelector("#stop");
        window.started = false;
        new MutationObserver(() => { window.started ||= !stop.disabled; }).observe(stop, {attributes: true});
    """)
    prompt.send_keys(Keys.CONTROL, Keys.ENTER)
    wait(lambda: driver.execute_script("return window.started"), "the start")
    prompt.send_keys(Keys.ESCAPE)
    wait(lambda: find("#go").is_enabled(), "the stop")
    # One line: nothing after the first line break, which the answer above has.
    assert "\n" in shown[0] + shown[1], shown
    tokens.clear()
    tokens.send_keys("149")
    find("#line").click()
    find("#go").click()
    wait(lambda: find("#go").is_enabled() and find("#with .text").text, "one line")
    line = driver.execute_script("""
        return [...document.querySelectorAll("#with .chunk:not(.given) p:not(.empty)")].map((p) => p.textContent)""")
    assert "".join(line) == "".join(shown).split("\n")[0], (line, shown)
    find("#line").click()
    # As a chat.
    find("#mode").send_keys("a question")
    tokens.clear()
    tokens.send_keys("10")
    find("#go").click()
    wait(lambda: find("#go").is_enabled() and "tokens\n10" in text("#with .numbers"), "the chat")
    # An error of the server is shown where the answer would stand.
    driver.execute_script("document.querySelector('#prompt').value = 'word '.repeat(2000)")
    find("#go").click()
    wait(lambda: "longest context" in text("#with .text") or "too long" in text("#with .text")
         or "prompt" in text("#with .text"), "the error")

    # A narrow screen shows one answer under the other, and nothing sticks out.
    driver.set_window_size(500, 900)
    wait(lambda: driver.execute_script("""
        const [a, b] = ["with", "without"].map((id) => document.getElementById(id).getBoundingClientRect());
        return b.top >= a.bottom && document.documentElement.scrollWidth <= innerWidth;"""), "one column")

    asked = set()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    outside = {a for a in asked if not a.startswith((url + "/", "data:", "chrome", "about:"))}
    assert not outside, outside
    assert any(a.endswith("/v1/completions") for a in asked), asked
    # The 400 above is the browser's own note of a refused request.
    complaints = [e for e in driver.get_log("browser")
                  if e["level"] == "SEVERE" and "400 (Bad Request)" not in e["message"]]
    assert not complaints, complaints
    print("ok")
finally:
    driver.quit()
