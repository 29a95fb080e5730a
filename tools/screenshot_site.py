"""Makes docs/images/site-*.png from the built site: ``python tools/screenshot_site.py [FOLDER]``; needs Chromium."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    "site-home": "",
    "site-tutorial": "tutorial/",
    "site-how-to": "how-to/watch/",
    "site-configuration": "reference/configuration/",
}


def main() -> None:
    """Build the site into a temporary folder, serve it, photograph its pages."""
    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("this script needs chromium or google-chrome")
    images = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site], cwd=ROOT, check=True)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            for name, page in PAGES.items():
                command = [
                    chromium,
                    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1000"),
                    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                    *("--no-first-run", f"--user-data-dir={folder}/browser", "--virtual-time-budget=5000"),
                    *(f"--screenshot={images / name}.png", f"http://127.0.0.1:{server.server_port}/{page}"),
                ]
                subprocess.run(command, check=True)
            server.shutdown()


if __name__ == "__main__":
    main()
