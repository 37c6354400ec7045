#!/bin/sh
# Makes sure that the report page can be tested in a browser: installs Debian's chromium where that is possible, else
# says that the test is skipped.
{ command -v chromium || command -v google-chrome; } >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    install="timeout 300 apt-get install -qq -y --no-install-recommends chromium"
    { $install || { timeout 120 apt-get update -qq && $install; }; } >/dev/null 2>&1 && exit 0
fi
echo "chromium is not there and cannot be installed, so the report page is not tested in a browser; install it" >&2
