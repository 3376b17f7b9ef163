"""Takes the picture of the page that README shows: a question, both answers, the sources opened.

usage: web_picture.py URL QUESTION FILE.webp

    build/bin/memory3 demo                                # loads the demo's knowledge base
    build/bin/memory3 serve --model models/tiny --data build/demo/data
    .venv/bin/python tests/web_picture.py http://localhost:8080 \
        "Who discovered palladium?" docs/pictures/page.webp
"""
import base64
import sys

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from browser import open_browser

url, question, file = sys.argv[1:]
driver = open_browser(width=1100)


def find(selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


try:
    driver.get(url + "/")
    wait = WebDriverWait(driver, 60)
    wait.until(lambda _: find("#base").find_elements(By.TAG_NAME, "option"))
    find("#tokens").clear()
    find("#tokens").send_keys("32")
    find("#line").click()
    # The first question to a server also pays for what every later one finds ready.
    for prompt in ("Who?", question):
        driver.execute_script("document.querySelector('#prompt').value = arguments[0]",
                              f"Question: {prompt}\nAnswer:")
        find("#go").click()
        wait.until(lambda _: find("#go").is_enabled() and "tokens" in find("#with .numbers").text)
    for summary in driver.find_elements(By.CSS_SELECTOR, "summary")[-1:]:
        summary.click()
    width, height = driver.execute_script(
        "document.activeElement.blur(); return [innerWidth, document.documentElement.offsetHeight]")
    picture = driver.execute_cdp_cmd("Page.captureScreenshot", {
        "format": "webp", "quality": 85, "captureBeyondViewport": True,
        "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}})
    with open(file, "wb") as out:
        out.write(base64.b64decode(picture["data"]))
finally:
    driver.quit()
