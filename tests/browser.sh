#!/bin/sh
# Makes sure that a Chromium is there for the tests of the report: one on PATH, else Debian's, else Playwright's own.
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium >/dev/null
else
    "$(dirname "$0")/../.venv/bin/playwright" install chromium
fi
