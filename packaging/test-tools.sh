#!/bin/sh
# Brings what some tests need beside Python packages: a headless browser and a Redis server. As root they are installed;
# otherwise the command is shown and those tests skip themselves, saying why.
set -eu

missing=
{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 || missing="chromium"
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing for the tests: $missing" >&2
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null 2>&1 && exit 0
fi
echo "some tests will be skipped; to run them too: sudo apt-get install $missing" >&2
