"""A Chromium without a window, for what looks at the page: web_page.py and web_picture.py."""
import tempfile

from selenium import webdriver


def open_browser(width=1180, height=900, scale=1):
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     f"--window-size={width},{height}", f"--force-device-scale-factor={scale}",
                     "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
                     "--user-data-dir=" + tempfile.mkdtemp()):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
