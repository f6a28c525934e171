"""Take the screenshot docs/pictures/keys.png: `python -m docs.picture`. Needs Chromium."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.harness import Server, serve

PICTURE = Path(__file__).parent / "pictures" / "keys.png"
_DAY = 86400


def fill(server: Server) -> str:
    """Make keys in each state, and return an administrator's key."""
    store, now = server.store, time.time()
    _, admin = store.create(owner="Ops", scopes=["mlflow:admin"], name="Key management")
    store.create(
        owner="Initech", scopes=["model:read"], name="Dashboard", expires_at=now + 9 * _DAY
    )
    old, _ = store.create(owner="ACME", scopes=["model:write"], name="Training")
    _, used, _ = store.rotate(old.key_id, overlap=7 * _DAY)
    store.create(
        owner="Globex",
        scopes=["model:write"],
        name="CI",
        networks=["192.0.2.0/24"],
        rate_limit_per_hour=1000,
    )
    leaver, _ = store.create(owner="Umbrella", scopes=["mlflow:write"], name="Notebook")
    store.revoke(leaver.key_id)
    for _ in range(3):
        server.request("GET", "/api/2.0/mlflow/registered-models/search", key=used)
    return admin


def main() -> None:
    """Sign in as an administrator, and take a screenshot of the page."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        admin = fill(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 600}, color_scheme="light")
            page.goto(f"{server.origin}/hokusai/login?next=/hokusai/keys")
            page.get_by_label("API key").fill(admin)
            page.keyboard.press("Enter")
            page.get_by_text("Globex").wait_for()
            # The server stores uses every five seconds.
            for _ in range(60):
                if page.get_by_role("img", name="use").count() == 2:
                    break
                page.wait_for_timeout(500)
                page.reload()
            assert admin not in page.content()
            page.screenshot(path=PICTURE, full_page=True)
            browser.close()


if __name__ == "__main__":
    main()
